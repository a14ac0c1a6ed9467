"""What server and clients of a run have in common: its plugins, data, model, width groups and the means to build submodels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hetfl import registry
from hetfl.config import RunOptions
from hetfl.data import catalog
from hetfl.data import loading as data
from hetfl.data.dataset import FederatedDataset
from hetfl.errors import NotApplicable, UsageError
from hetfl.hooks import loading
from hetfl.hooks.answers import say_key
from hetfl.hooks.manager import PluginManager
from hetfl.models import factory, normalization, zoo
from hetfl.models.adapters import add_adapters, parse_adapter
from hetfl.models.early_exit import all_exits
from hetfl.models.folders import follow_model
from hetfl.models.frozen import freeze
from hetfl.models.state import load_weights, tensors
from hetfl.parallel import hold_little_memory, return_free_memory
from hetfl.profiling.meter import Meter
from hetfl.rng import seed_of
from hetfl.rounds.assignment import sample_size
from hetfl.rounds.client import ClientRuntime, Pack, leave_whole
from hetfl.rounds.norm_statistics import choose_norm_policy
from hetfl.rounds.reporting import Callback
from hetfl.submodel.builder import SubmodelBuilder, is_fully_named
from hetfl.submodel.slicing import build_submodel
from hetfl.submodel.tracing.groups import trace
from hetfl.submodel.widths import Widths
from hetfl.training import device, vectorized
from hetfl.training.local import make_optimizer


@dataclass(frozen=True, eq=False)
class Setup:
    """What server and clients of a run have in common. In `options` every default that depended on data or plugins is spelt out."""

    options: RunOptions
    federation: FederatedDataset
    plugins: PluginManager
    builder: SubmodelBuilder
    meter: Meter

    def runtime(self, pack: Pack = leave_whole, stays: bool = False) -> ClientRuntime:
        """What the clients need of it."""
        return ClientRuntime(self.options, self.federation, self.plugins, self.builder, self.meter, pack, stays)


def build_setup(options: RunOptions, callback: Callback) -> Setup:
    """Loads plugins, data and model, and traces the widths. Raises UsageError for what cannot work together."""
    plugins, options = loading.load_plugins(options), follow_model(options)
    callback.phase(0, "data")
    device.prepare_device(options)
    federation = data.load(options).on(options.device)
    loading.refuse_task(plugins.plugins, federation.kind.name)
    options = resolve_options(options, federation, plugins)
    callback.phase(0, "model")
    model, widths = trace_model(options, federation, plugins)
    return finish_setup(options, federation, plugins, freeze_base(options, model), widths)


def build_given_setup(options: RunOptions, federation: FederatedDataset, widths: Widths, model: nn.Module) -> Setup:
    """The same in another process, which is given the width groups and the model, its base frozen."""
    plugins = loading.load_plugins(options)
    device.prepare_device(options)
    return finish_setup(resolve_options(options, federation, plugins), federation, plugins, model, widths)


def finish_setup(
    options: RunOptions, federation: FederatedDataset, plugins: PluginManager, model: nn.Module, widths: Widths
) -> Setup:
    """The setup of a traced model."""
    builder = SubmodelBuilder(model, widths, partial(build_model, options, federation), options.device)
    if builder.base:
        hold_little_memory(sum(t.nbytes for t in builder.base.values()))
    return_free_memory()  # tracing took cut copies of the model
    return Setup(options, federation, plugins, builder, make_meter(options, builder, federation))


def build_node_setup(options: RunOptions, federation: FederatedDataset, widths: Widths) -> Setup:
    """The same on a node, whose `federation` has its own data and which knows the `widths`: no whole model is built for it."""
    plugins = loading.load_plugins(options)
    device.prepare_device(options)
    options = resolve_options(options, federation, plugins)
    with torch.device("meta" if zoo.in_zoo(model_of(options)) and "adapt_model" not in plugins.answered else "cpu"):
        model = build_model(options, federation, model_of(options))

    def whole() -> nn.Module:
        return freeze_base(options, adapt_model(options, federation, plugins))

    lean = not ("adapt_model" in plugins.answered or options.adapter or options.global_width < 1) and is_fully_named(model)
    other = partial(build_model, options, federation)
    builder = SubmodelBuilder(model if lean else whole(), widths, other, options.device, whole if lean else None)
    return Setup(options, federation, plugins, builder, make_meter(options, builder, federation))


def make_meter(options: RunOptions, builder: SubmodelBuilder, federation: FederatedDataset) -> Meter:
    """What measures the costs of submodels, with the run's own optimiser."""
    optimizer = partial(make_optimizer, options=options, round=1)
    return Meter(options, builder, federation.test, optimizer)


def resolve_options(options: RunOptions, federation: FederatedDataset, plugins: PluginManager) -> RunOptions:
    """`options` with every default that depended on the data or the plugins spelt out; what --levels gave is the plugin's now."""
    policy = choose_norm_policy(options.norm_policy, plugins.norm_policy, federation.public is not None)
    found: dict[str, Any] = {"model": options.model or federation.model, "norm_policy": policy, "levels": None}
    found["aggregate"] = options.aggregate or registry.partner_of(options.extract)
    found["augment"] = resolve_augmentation(options, federation)
    return options.model_copy(update={**found, **federation.preprocessing})


def resolve_augmentation(options: RunOptions, federation: FederatedDataset) -> tuple[str, ...]:
    """What --augment says, with what is usual for the data set spelt out. Raises UsageError for data that are no pictures."""
    known = catalog.KNOWN.get(federation.dataset)
    usual = known.augment if known else ()
    wanted = tuple(dict.fromkeys(each for given in options.augment for each in (usual if given == "usual" else [given])))
    if wanted and (len(federation.shape) != 3 or federation.inputs.vocab is not None):
        raise UsageError(
            f"--augment {','.join(wanted)} is for pictures (channels, height, width); "
            f"an input of '{federation.dataset}' has the shape {tuple(federation.shape)}"
        )
    return wanted


def model_of(options: RunOptions) -> str:
    """The name of the run's own model."""
    assert options.model is not None
    return options.model


def choose_group_size(setup: Setup) -> tuple[int, str | None]:
    """How many clients train as one batched model (vmap), and why no more than one where that is so."""
    options, builder, test = setup.options, setup.builder, setup.federation.test
    if options.engine != "local":
        return 1, f"the engine '{options.engine}' has each client by itself"
    fitting = {key: p for key, p in setup.plugins.plugins.items() if hasattr(p, "fit") and "fit" not in p.inactive_hooks}
    if alone := [key for key, plugin in fitting.items() if not plugin.stackable]:
        return 1, f"{say_key(alone[0])} takes part in local training, and does not say that it is stackable"
    size = vectorized.group_size(builder.model, options, setup.federation.shape, builder.widths.draws)
    if size < 2:
        return 1, "the model draws random numbers, is recurrent or has a base in bfloat16"
    why = vectorized.find_stacking_error(builder.build(), test.x[test.index[:2]].cpu())
    return (1, why) if why else (size, None)


def sums_on_device(setup: Setup) -> bool:
    """Whether the clients' tensors stay on the run's GPU from being sent to being summed: for means that take reply after reply,
    where a whole round of models fits."""
    options, sampled = setup.options, sample_size(len(setup.federation.clients), setup.options.fraction)
    model = sum(t.nbytes for t in tensors(setup.builder.model).values())
    plugins = setup.plugins
    plain = plugins.averages is not None and plugins.answered.isdisjoint(("encode", "encode_down", "finalize"))
    return options.engine == "local" and plain and device.fits_on_device(options.device, sampled * model)


def build_model(options: RunOptions, federation: FederatedDataset, name: str) -> nn.Module:
    """The model `name` of a run, with the run's arguments and first weights where it is the run's own model."""
    own = name == model_of(options)
    model = factory.build_model(name, options.model_args if own else {}, federation.inputs, options.seed)
    model = normalization.replace_norms(model, options.norm_policy)
    return load_weights(model, options.base) if own and options.base is not None else model


def trace_model(options: RunOptions, federation: FederatedDataset, plugins: PluginManager) -> tuple[nn.Module, Widths]:
    """The model of a run and its width groups. Raises UsageError where its answers do not fit the task."""
    name, x, model = model_of(options), sample(federation), adapt_model(options, federation, plugins)
    widths = trace_all_exits(options, federation, model, hollow=options.adapter is not None)
    factory.refuse_other_answers(name, model, x, federation.inputs.answer)
    return (adapt_model(options, federation, plugins) if options.adapter else model), widths


def adapt_model(options: RunOptions, federation: FederatedDataset, plugins: PluginManager) -> nn.Module:
    """The run's model with its adapters and as its plugins want it, untrained, of the width that the run gives it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(options.seed, "adapt"))
        model, x, inputs = build_model(options, federation, model_of(options)), sample(federation), federation.inputs
        if options.adapter and (adapters := parse_adapter(options.adapter)):
            model = add_adapters(model, adapters, x, inputs.answer)
        model = normalization.replace_norms(plugins.adapt_model(model, x, inputs.classes), options.norm_policy)
    if options.global_width == 1:
        return model
    widths = trace_all_exits(options, federation, model)
    if not widths.groups:
        raise UsageError(f"no width of model '{model_of(options)}' can be cut, so only --global-width 1 is possible with it")
    return build_submodel(widths, model, widths.prefix(options.global_width))


def freeze_base(options: RunOptions, model: nn.Module) -> nn.Module:
    """The model, once it is traced, with what a run with adapters does not train as a part of the architecture.

    Raises NotApplicable where all of it is trained.
    """
    if not options.adapter:
        return model
    if all(p.requires_grad for p in model.parameters()):
        raise NotApplicable("not applicable: --adapter own is for a model that freezes its base, and all of this one is trained")
    return freeze(model, options.base_dtype == "bfloat16")


def trace_all_exits(options: RunOptions, federation: FederatedDataset, model: nn.Module, hollow: bool = False) -> Widths:
    """The width groups of `model`, whose exits count alike where it has several; with `hollow` it loses what it does not train."""
    with all_exits(model):
        return trace(model, sample(federation), heads=options.heads, hollow=hollow)


def sample(federation: FederatedDataset) -> Tensor:
    """Two examples."""
    return federation.test.x[federation.test.index[:2]].cpu()
