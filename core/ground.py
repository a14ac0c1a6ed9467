"""What server and clients of a run have in common: its plugins, data, model, width groups and the means to build submodels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from hetfl.core import blueprint, data, device, factories, norms, roles
from hetfl.core.apps import Means, Site
from hetfl.core.config import RunOptions
from hetfl.core.data import Federation
from hetfl.core.errors import UsageError
from hetfl.core.exits import every
from hetfl.core.groups import trace
from hetfl.core.meter import Meter
from hetfl.core.rounds import Watch
from hetfl.core.streams import seed_of
from hetfl.core.widths import Widths
from hetfl.core.workshop import Workshop


@dataclass(frozen=True, eq=False)
class Ground:
    options: RunOptions
    federation: Federation
    plugins: roles.Roles
    workshop: Workshop
    meter: Meter

    def site(self, desk: Means) -> Site:
        """What the clients need of it."""
        return Site(self.options, self.federation, self.plugins, self.workshop, desk, self.meter)


def laid(options: RunOptions, watch: Watch) -> Ground:
    """Loads plugins, data and model, and traces the widths. Raises UsageError for what cannot work together."""
    plugins = roles.load(options)
    watch.phase(0, "data")
    device.check(options)
    federation = data.load(options).on(options.device)
    watch.phase(0, "model")
    model, widths = traced(options, federation, plugins)
    return standing(options, federation, plugins, Workshop(model, widths, partial(built, options, federation), options.device))


def outlined(options: RunOptions, federation: Federation, widths: Widths) -> Ground:
    """The same on a node, whose `federation` has its own data and which knows the `widths`: no whole model is built for it."""
    plugins, name = roles.load(options), options.model or federation.model
    with torch.device("meta" if blueprint.plain_name(name) and not plugins.adapts else "cpu"):
        model = built(options, federation, name)
    whole = partial(adapted, options, federation, plugins)
    if plugins.adapts or not blueprint.hollow(model):
        model = whole()
    other = partial(built, options, federation)
    return standing(options, federation, plugins, Workshop(model, widths, other, options.device, whole))


def standing(options: RunOptions, federation: Federation, plugins: roles.Roles, workshop: Workshop) -> Ground:
    return Ground(options, federation, plugins, workshop, Meter(options, workshop, federation.test, len(federation.classes)))


def built(options: RunOptions, federation: Federation, name: str) -> nn.Module:
    """The model `name` of a run, with the run's arguments where it is the run's own model."""
    args = options.model_args if name == (options.model or federation.model) else {}
    return norms.replaced(factories.build(name, args, federation.inputs, options.seed), options.norm_policy)


def traced(options: RunOptions, federation: Federation, plugins: roles.Roles) -> tuple[nn.Module, Widths]:
    """The model of a run and its width groups. Raises UsageError where its outputs do not fit the classes."""
    name, x, model = options.model or federation.model, sample(federation), adapted(options, federation, plugins)
    with every(model):
        widths = trace(model, x, heads=options.heads)
    with torch.no_grad():
        out = model.eval()(x)
    shown = f"a tensor of shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
    if not isinstance(out, Tensor) or out.shape != (len(x), len(federation.classes)):
        wanted = (len(x), len(federation.classes))
        raise UsageError(f"model '{name}' returns {shown} for {len(x)} examples; logits of shape {wanted} are needed")
    return model, widths


def adapted(options: RunOptions, federation: Federation, plugins: roles.Roles) -> nn.Module:
    """The run's model as its plugins want it, untrained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(options.seed, "adapt"))
        model = built(options, federation, options.model or federation.model)
        return plugins.adapt(model, sample(federation), len(federation.classes))


def sample(federation: Federation) -> Tensor:
    """Two examples."""
    return federation.test.x[federation.test.index[:2]].cpu()


def settled(options: RunOptions, federation: Federation, plugins: roles.Roles, policy: str, cohorts: str) -> RunOptions:
    """`options` with every default that depended on the data or the plugins spelt out."""
    names = {key.split(".")[0]: key.split(".")[1] for key in plugins.plugins}
    model = options.model or federation.model
    found = {"aggregate": names["aggregate"], "model": model, "norm_policy": policy, "cohorts": cohorts, "levels": None}
    return options.model_copy(update={**found, **federation.preprocessing})
