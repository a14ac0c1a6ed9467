"""Any torch module made smaller, and its width groups, for a script or a notebook: no run, no plugins."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hetfl.errors import UsageError
from hetfl.models.state import State, tensors
from hetfl.submodel.blocks import Index
from hetfl.submodel.plan import Selection, grow
from hetfl.submodel.slicing import build_submodel
from hetfl.submodel.tracing.groups import trace
from hetfl.submodel.tracing.table import Heads
from hetfl.submodel.widths import Widths


@dataclass(frozen=True, eq=False)
class Shrunk:
    """A smaller module and where its tensors lie in those of the `full` one.

    `model` has parameters of its own, which begin with the values of the full model's leading channels; `plan` says which units of
    each width group it keeps, and cuts and places states for federated averaging (`plan.take`, `plan.put`).
    """

    model: nn.Module
    full: nn.Module
    plan: Selection

    @property
    def widths(self) -> Widths:
        """The width groups of the full model."""
        return self.plan.widths

    @property
    def index(self) -> dict[str, Index]:
        """For each tensor that can be cut: dim -> the positions in the full tensor that the smaller one has, int64 in its order."""
        return self.plan.index

    def grow(self, state: Mapping[str, Tensor] | None = None) -> tuple[State, State]:
        """(state, coverage) at full size, from `state` in the smaller model's shapes (None: its tensors as they are now).

        Coverage is 1 where an entry comes from `state` and 0 elsewhere; there the state has what `full` has now. The state has the
        names of `full.state_dict()`. Raises UsageError where a tensor is missing or has another shape.
        """
        own = tensors(self.model)
        state = own if state is None else state
        for name, tensor in own.items():
            if name not in state or state[name].shape != tensor.shape:
                given = f"of shape {tuple(state[name].shape)}" if name in state else "not there"
                raise UsageError(
                    f"tensor '{name}' of the smaller model has the shape {tuple(tensor.shape)}, but the one given is {given}"
                )
        values, coverage = grow(self.plan.put({name: state[name].detach() for name in own}), tensors(self.full))
        names = {id(t): name for name, t in [*self.full.named_parameters(), *self.full.named_buffers()]}
        first = {name: names[id(t)] for name, t in self.full.state_dict(keep_vars=True).items() if id(t) in names}  # tied ones too
        return {name: values[first[name]] for name in first}, {name: coverage[first[name]] for name in first}

    def __repr__(self) -> str:
        small, large = (sum(p.numel() for p in m.parameters()) for m in (self.model, self.full))
        return f"<{type(self.full).__name__} shrunk from {large:,} to {small:,} parameters, {len(self.plan.kept)} width groups>"


def shrink(model: nn.Module, example: Tensor, ratio: float, *, heads: Heads = "width") -> Shrunk:
    """Makes `model` smaller: of every width group the leading `ceil(ratio * size)` channels stay (HeteroFL's submodel).

    `example` is a batch that the model runs on. `heads` says what is cut of attention: the width of every head ("width") or whole
    heads ("whole"). `model` is not changed.

    Examples:
        >>> net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> small = shrink(net, torch.randn(2, 64), 0.5)
        >>> small.model(torch.randn(5, 64)).shape, small.model[0].weight.shape
        (torch.Size([5, 10]), torch.Size([16, 64]))
        >>> _, coverage = small.grow()
        >>> int(coverage["0.weight"].sum())  # how many of the full weight's entries the smaller one covers
        1024

    Raises UsageError where the ratio is not in (0, 1], the model does not run on the example or nothing of it can be cut.
    """
    if not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise UsageError(f"the ratio must be a number above 0 and up to 1, not {ratio!r}")
    traced, widths = _trace(model, example, heads)
    if ratio < 1 and not widths.groups:
        reasons = "; ".join(f"'{name}': {why}" for name, why in widths.frozen.items())
        reasons = reasons or "it has no layers with channels between them"
        raise UsageError(f"no width of the {type(model).__name__} can be cut ({reasons})")
    plan = Selection(widths, widths.prefix(ratio))
    small = build_submodel(widths, traced, plan.kept)
    return Shrunk(small if traced is model else small.to(next(model.parameters()).device), model, plan)


def width_groups(model: nn.Module, example: Tensor, *, heads: Heads = "width") -> Widths:
    """The width groups of `model`: which channels can only be cut together, in which tensors, and why others cannot be.

    `example` is a batch that the model runs on. Every group is proven by two random cuts. `model` is not changed. The answer shows
    itself; `groups`, `frozen` (name -> reason) and `members()` have the same for code.

    Examples:
        >>> net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> width_groups(net, torch.randn(2, 64))
        1 width group; 99.6% of the entries are in tensors that it cuts
          0: 32 units in 0.weight[0], 0.bias[0], 2.weight[1]
        not cut:
          2.bias: the model's output

    Raises UsageError where the model does not run on the example.
    """
    return _trace(model, example, heads)[1]


def _trace(model: nn.Module, example: Tensor, heads: Heads) -> tuple[nn.Module, Widths]:
    """(the model that was traced: `model`, or a copy on the CPU where it is elsewhere; its width groups)."""
    if not isinstance(model, nn.Module):
        raise UsageError(f"the model must be a torch.nn.Module, not {type(model).__name__}")
    if not isinstance(example, Tensor) or example.ndim < 1 or not len(example):
        raise UsageError("the example must be a tensor with a batch of one or more inputs for the model")
    if heads not in ("width", "whole"):
        raise UsageError(f"heads must be 'width' or 'whole', not {heads!r}")
    devices = {t.device.type for t in (*model.parameters(), *model.buffers())}
    if "meta" in devices:
        raise UsageError("the model has tensors without values (device 'meta')")
    on_cpu = model if devices <= {"cpu"} else copy.deepcopy(model).cpu()
    batch = torch.cat([example, example]) if len(example) == 1 else example  # batch norm needs two
    return on_cpu, trace(on_cpu, batch.detach().cpu(), heads=heads)
