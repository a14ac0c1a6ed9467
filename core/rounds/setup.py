"""What server and clients of a run have in common: its plugins, data, model, width groups and the means to build submodels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from hetfl import registry
from hetfl.config import RunOptions
from hetfl.data import loading as data
from hetfl.data.dataset import FederatedDataset
from hetfl.errors import UsageError
from hetfl.hooks import loading
from hetfl.hooks.manager import PluginManager
from hetfl.models import factory, normalization, zoo
from hetfl.models.early_exit import every
from hetfl.profiling.meter import Meter
from hetfl.rng import seed_of
from hetfl.rounds.client import ClientRuntime, Transport
from hetfl.rounds.reporting import Callback
from hetfl.submodel import builder as builder_
from hetfl.submodel.builder import SubmodelBuilder
from hetfl.submodel.tracing.groups import trace
from hetfl.submodel.widths import Widths
from hetfl.training import device


@dataclass(frozen=True, eq=False)
class Setup:
    options: RunOptions
    federation: FederatedDataset
    plugins: PluginManager
    builder: SubmodelBuilder
    meter: Meter

    def site(self, desk: Transport) -> ClientRuntime:
        """What the clients need of it."""
        return ClientRuntime(self.options, self.federation, self.plugins, self.builder, desk, self.meter)


def build_setup(options: RunOptions, watch: Callback) -> Setup:
    """Loads plugins, data and model, and traces the widths. Raises UsageError for what cannot work together."""
    plugins = loading.load_plugins(options)
    watch.phase(0, "data")
    device.check_device(options)
    federation = data.load(options).on(options.device)
    watch.phase(0, "model")
    model, widths = trace_model(options, federation, plugins)
    return assemble(
        options, federation, plugins, SubmodelBuilder(model, widths, partial(build_model, options, federation), options.device)
    )


def build_node_setup(options: RunOptions, federation: FederatedDataset, widths: Widths) -> Setup:
    """The same on a node, whose `federation` has its own data and which knows the `widths`: no whole model is built for it."""
    plugins, name = loading.load_plugins(options), options.model or federation.model
    with torch.device("meta" if zoo.in_zoo(name) and not plugins.adapts_model else "cpu"):
        model = build_model(options, federation, name)
    whole = partial(adapt_model, options, federation, plugins)
    if plugins.adapts_model or not builder_.is_fully_named(model):
        model = whole()
    other = partial(build_model, options, federation)
    return assemble(options, federation, plugins, SubmodelBuilder(model, widths, other, options.device, whole))


def assemble(options: RunOptions, federation: FederatedDataset, plugins: PluginManager, builder: SubmodelBuilder) -> Setup:
    return Setup(options, federation, plugins, builder, Meter(options, builder, federation.test, len(federation.classes)))


def build_model(options: RunOptions, federation: FederatedDataset, name: str) -> nn.Module:
    """The model `name` of a run, with the run's arguments where it is the run's own model."""
    args = options.model_args if name == (options.model or federation.model) else {}
    return normalization.replace_norms(factory.build(name, args, federation.inputs, options.seed), options.norm_policy)


def trace_model(options: RunOptions, federation: FederatedDataset, plugins: PluginManager) -> tuple[nn.Module, Widths]:
    """The model of a run and its width groups. Raises UsageError where its outputs do not fit the classes."""
    name, x, model = options.model or federation.model, sample(federation), adapt_model(options, federation, plugins)
    with every(model):
        widths = trace(model, x, heads=options.heads)
    with torch.no_grad():
        out = model.eval()(x)
    shown = f"a tensor of shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
    if not isinstance(out, Tensor) or out.shape != (len(x), len(federation.classes)):
        wanted = (len(x), len(federation.classes))
        raise UsageError(f"model '{name}' returns {shown} for {len(x)} examples; logits of shape {wanted} are needed")
    return model, widths


def adapt_model(options: RunOptions, federation: FederatedDataset, plugins: PluginManager) -> nn.Module:
    """The run's model as its plugins want it, untrained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(options.seed, "adapt"))
        model = build_model(options, federation, options.model or federation.model)
        return plugins.adapt_model(model, sample(federation), len(federation.classes))


def sample(federation: FederatedDataset) -> Tensor:
    """Two examples."""
    return federation.test.x[federation.test.index[:2]].cpu()


def resolve_defaults(
    options: RunOptions, federation: FederatedDataset, plugins: PluginManager, policy: str, cohorts: str
) -> RunOptions:
    """`options` with every default that depended on the data or the plugins spelt out."""
    aggregate, model = options.aggregate or registry.partner_of(options.extract), options.model or federation.model
    found = {"aggregate": aggregate, "model": model, "norm_policy": policy, "cohorts": cohorts, "levels": None}
    return options.model_copy(update={**found, **federation.preprocessing})
