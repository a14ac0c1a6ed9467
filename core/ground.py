"""What server and clients of a run have in common: its plugins, data, model, width groups and the means to build submodels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from hetfl.core import data, device, factories, norms, roles
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
    workshop = Workshop(model, widths, partial(built, options, federation), options.device)
    return Ground(options, federation, plugins, workshop, Meter(options, workshop, federation.test, len(federation.classes)))


def built(options: RunOptions, federation: Federation, name: str) -> nn.Module:
    """The model `name` of a run, with the run's arguments where it is the run's own model."""
    args = options.model_args if name == (options.model or federation.model) else {}
    return norms.replaced(factories.build(name, args, federation.inputs, options.seed), options.norm_policy)


def traced(options: RunOptions, federation: Federation, plugins: roles.Roles) -> tuple[nn.Module, Widths]:
    """The model of a run and its width groups. Raises UsageError where its outputs do not fit the classes."""
    name = options.model or federation.model
    x = federation.test.x[federation.test.index[:2]].cpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(options.seed, "adapt"))
        model = plugins.adapt(built(options, federation, name), x, len(federation.classes))
    with every(model):
        widths = trace(model, x, heads=options.heads)
    with torch.no_grad():
        out = model.eval()(x)
    shown = f"a tensor of shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
    if not isinstance(out, Tensor) or out.shape != (len(x), len(federation.classes)):
        wanted = (len(x), len(federation.classes))
        raise UsageError(f"model '{name}' returns {shown} for {len(x)} examples; logits of shape {wanted} are needed")
    return model, widths
