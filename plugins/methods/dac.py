"""DAC (Li & Sanyal): the server shrinks the model by gates that it learns, one snapshot for each budget (spec dac)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from hetfl import Client, Field, NotApplicable, Plan, Plugin, Server, State, Widths, flatten_state, hookimpl, unflatten_state
from hetfl.profiling.cost import count_macs, count_parameters
from hetfl.submodel.blocks import take
from hetfl.submodel.units import Gate, apply_gates, find_gates, locate_gates
from hetfl.submodel.widths import within
from hetfl.training.dropout import seeded_random
from hetfl.training.tuning import cycle_batches

Units = Mapping[str, Tensor]

Places = Mapping[str, list[Gate]]


@dataclass(frozen=True, eq=False)
class Gated:
    """A submodel under search: the units that are left of each group, its tensors, and the gates of the groups that have some."""

    kept: Units
    state: State
    gates: Units

    @property
    def sizes(self) -> dict[str, int]:
        return count_units(self.kept)

    def without_weakest(self, widths: Widths, number: int) -> Gated:
        """The submodel without the `number` units of the lowest gates."""
        remaining = drop_weakest(self.gates, number)
        index = within(widths, self.sizes, remaining)
        state = {name: take(tensor, index.get(name, {})).clone() for name, tensor in self.state.items()}
        kept = {name: units[remaining[name]] if name in remaining else units for name, units in self.kept.items()}
        return Gated(kept, state, {name: gate[remaining[name]] for name, gate in self.gates.items()})

    def scaled(self, widths: Widths, places: Places, by: Units) -> Gated:
        """The submodel with what reads each unit multiplied by the values `by` of the gated groups."""
        return replace(self, state={**self.state, **apply_gates(self.state, by, locate_gates(widths, places, self.sizes))})


class DAC(Plugin):
    """Clients of a budget get the first snapshot with fewer MACs and parameters than the plain slice of their width has.

    Gates stand on the hidden channels of inverted residual blocks, before the depthwise filters; nothing else is cut. In a model
    without such blocks they stand on every elastic group that feeds nothing but the next layer, before that layer.
    """

    entropy: float = Field(1.0, ge=0, description="coefficient of the gates' entropy (l1)")
    bound: float = Field(0.01, ge=0, description="coefficient of the hinge that holds gates in [0, 1] (l2)")
    threshold: float = Field(0.1, ge=0, description="a gate at or below this is removed")
    epochs: int = Field(5, ge=1, description="epochs over the server's data between removals; the paper does not say")
    lr: float = Field(0.01, gt=0, description="SGD learning rate of the weights in the search (the paper's for its clients)")
    momentum: float = Field(0.5, ge=0, lt=1, description="momentum of the search")
    gate_lr: float = Field(0.02, gt=0, description="Adam learning rate of the gates")
    lowest: float = Field(0.5, gt=0, lt=1, description="start of a group's weakest gate; the strongest starts at 1")
    patience: int = Field(8, ge=1, description="passes without a low gate after which the weakest go all the same")
    stall: float = Field(0.1, gt=0, lt=1, description="share of the gates that then go")
    tune: int = Field(100, ge=0, description="steps on the server's data without gates, once a budget is met")
    gates: Literal["blocks", "all"] = Field(
        "blocks", description="gates in inverted residual blocks alone, or wherever they can be"
    )
    start: Literal["searched", "global"] = Field("searched", description="clusters start from the searched weights, or the global")
    _kept: dict[float, State] = PrivateAttr(default_factory=dict)
    _states: dict[float, State] = PrivateAttr(default_factory=dict)

    @hookimpl
    def extract(self, server: Server, clients: Sequence[Client], round: int) -> list[Plan]:
        """Searches what no client had before, the largest budget first; a later, smaller one goes on from there."""
        for width in sorted({c.profile.width for c in clients} - set(self._kept), reverse=True):
            self._kept[width], self._states[width] = self._search(server, width)
            if self.start == "searched" and width < 1:
                level = next(c.profile.level for c in clients if c.profile.width == width)
                server.branches[f"level {level}"] = server.select(self._kept[width]).put(self._states[width])
        return [server.select(self._kept[client.profile.width]) for client in clients]

    def _search(self, server: Server, width: float) -> tuple[State, State]:
        """(units, tensors) of the first submodel below the budget of `width` (spec dac 1 ii).

        Until then gates are learned and low ones removed; the others are folded into the weights, which train on without.
        """
        larger = min((w for w in self._kept if w > width), default=None)
        kept: Units = server.widths.select(torch.arange) if larger is None else self._kept[larger]
        state = server.state if larger is None else self._states[larger]
        budget = measure_cost(server, {name: len(units) for name, units in server.widths.prefix(width).items()})
        if width == 1 or is_below(measure_cost(server, count_units(kept)), budget):
            return dict(kept), state
        places = place_gates(server.widths, server.builder.model, self.gates)
        self._refuse_unreachable(server, width, {**count_units(kept), **dict.fromkeys(places, 1)}, budget)
        net, turn, idle = start_gates(server, Gated(kept, state, {}), places, self.lowest), 0, 0
        while not is_below(measure_cost(server, net.sizes), budget) and (removable := count_low(net.gates, float("inf"))):
            turn += 1
            net = self._train_gates(server, net, places, f"dac {width:g}", turn)
            number = count_low(net.gates, self.threshold)
            idle = 0 if number else idle + 1
            if idle == self.patience:
                number, idle = max(1, int(self.stall * removable)), 0
            net = remove_down_to(server, net, number, budget)
        net = net.scaled(server.widths, places, net.gates)
        return dict(net.kept), server.train(net.state, self.tune, f"dac {width:g}", sizes=net.sizes)

    def _refuse_unreachable(self, server: Server, width: float, smallest: Mapping[str, int], budget: tuple[int, int]) -> None:
        """Raises NotApplicable where not even one unit in each gated group is within the budget."""
        cost = measure_cost(server, smallest)
        if cost[0] > budget[0] or cost[1] > budget[1]:
            more = "; --set dac.gates=all cuts more than blocks' hidden channels" if self.gates == "blocks" else ""
            raise NotApplicable(
                f"dac cannot reach level {width:g} with this model: with one unit in each gated group it has {cost[0]:,} MACs and "
                f"{cost[1]:,} parameters, and the budget is {budget[0]:,} and {budget[1]:,}{more}"
            )

    def _train_gates(self, server: Server, net: Gated, places: Places, purpose: str, turn: int) -> Gated:
        """`net` after a pass: weights, with the gates multiplied in, and gates trained together on eq. 3."""
        model, (x, y) = server.builder.load(net.state, net.sizes).train(), server.public.tune.all()
        where = locate_gates(server.widths, places, net.sizes)
        gates = {name: gate.to(x.device, copy=True).requires_grad_() for name, gate in net.gates.items()}
        weights = dict(model.named_parameters())
        optimizers = torch.optim.SGD(weights.values(), self.lr, self.momentum), torch.optim.Adam(gates.values(), self.gate_lr)
        generator, steps = server.stream(purpose, turn), self.epochs * -(-len(x) // server.options.server_batch_size)
        server.count_steps(steps, server.options.server_batch_size)
        with seeded_random(server.widths.draws, server.stream(f"{purpose} dropout", turn)):
            for _, rows in zip(range(steps), cycle_batches(len(x), server.options.server_batch_size, generator), strict=False):
                if len(rows) > 1 or len(x) == 1:
                    for optimizer in optimizers:
                        optimizer.zero_grad()
                    logits = functional_call(model, apply_gates(weights, gates, where), (x[rows],))
                    (server.kind.loss(logits, y[rows]) + self.entropy * entropy(gates) + self.bound * hinge(gates)).backward()
                    for optimizer in optimizers:
                        optimizer.step()
        trained = {**weights, **dict(model.named_buffers())}
        state = {name: t.detach().cpu().clone() for name, t in trained.items() if name in net.state}
        return Gated(net.kept, state, {name: gate.detach().cpu() for name, gate in gates.items()})

    def state_dict(self) -> State:
        return flatten_state(kept=self._kept, state=self._states)

    def load_state_dict(self, state: State) -> None:
        self._kept, self._states = unflatten_state(state, "kept", float), unflatten_state(state, "state", float)


def place_gates(widths: Widths, model: nn.Module, where: str = "blocks") -> dict[str, list[Gate]]:
    """Where the gate of each group stands that one layer makes and one layer reads, perhaps through depthwise filters.

    Under "blocks" only hidden channels of inverted residual blocks, which a 1x1 convolution makes and depthwise filters read first;
    all, where the model has no such blocks.
    """
    read = find_gates(widths, model)
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    makers: dict[str, list[str]] = {g.name: [] for g in widths.groups}
    for name in weights:
        for dim, axis in widths.axes.get(name, {}).items():
            for group in {axis.groups[g] for g in axis.group.unique().tolist() if g >= 0}:
                makers[group] += [] if (name, dim) in read[group] else [name]
    final = {name: [place for place in places if place[1] == 1] for name, places in read.items()}
    found = {name: read[name][:1] for name in read if len(makers[name]) == 1 and len(final[name]) == 1}
    pointwise = {name for name, p in weights.items() if p.ndim > 2 and p[0, 0].numel() == 1}
    hidden = {name: places for name, places in found.items() if places[0][1] == 0 and makers[name][0] in pointwise}
    return hidden if hidden and where == "blocks" else found


def start_gates(server: Server, net: Gated, places: Places, lowest: float) -> Gated:
    """`net` with gates at their start: from `lowest` to 1, evenly spaced, by the norm of the weights that read a unit.

    These weights are divided by them, so that it computes what it did. Gates that started alike would stay alike: there the
    entropy's gradient is 0, and at 1 the hinge holds them.
    """
    read = find_gates(server.widths, server.builder.model)
    final = {name: [place for place in read[name] if place[1] == 1] for name in places}
    strength = {name: torch.zeros(net.sizes[name]) for name in places}
    for dim in locate_gates(server.widths, final, net.sizes):
        squares = net.state[dim.name].square().movedim(dim.dim, 0).flatten(1).sum(1)
        strength[dim.group].index_add_(0, dim.unit[dim.ours], squares[dim.ours])
    ranks = {name: squares.argsort(stable=True).argsort() for name, squares in strength.items()}
    gates = {name: 1 - (1 - lowest) * (len(r) - 1 - r) / max(1, len(r) - 1) for name, r in ranks.items()}
    return replace(net, gates=gates).scaled(server.widths, places, {name: 1 / gate for name, gate in gates.items()})


def remove_down_to(server: Server, net: Gated, number: int, budget: tuple[int, int]) -> Gated:
    """`net` without the units of its `number` lowest gates, of fewer where they are enough to be below the budget."""

    def suffices(fewer: int) -> bool:
        left = drop_weakest(net.gates, fewer)
        return is_below(measure_cost(server, {**net.sizes, **count_units(left)}), budget)

    return net.without_weakest(server.widths, bisect_left(range(number), True, key=suffices))


def entropy(gates: Units) -> Tensor:
    """Sum over the blocks of the entropy of the softmax of their gates (eq. 1)."""
    return torch.stack([-(w.softmax(0) * w.log_softmax(0)).sum() for w in gates.values()]).sum() if gates else torch.zeros(())


def hinge(gates: Units) -> Tensor:
    """Sum of max(w - 1, 0) + max(-w, 0): what eq. 2 means; as printed its sign rewards leaving [0, 1]."""
    return torch.stack([(F.relu(w - 1) + F.relu(-w)).sum() for w in gates.values()]).sum() if gates else torch.zeros(())


def count_low(gates: Units, threshold: float) -> int:
    """How many gates are at or below the threshold, the highest of each group left out: of a group one unit stays."""
    return sum(int((gate <= threshold).sum()) - int(gate.max() <= threshold) for gate in gates.values())


def drop_weakest(gates: Units, number: int) -> dict[str, Tensor]:
    """The positions that remain of each group without the `number` lowest gates, the highest of each group left out."""
    values = torch.cat([gate.index_fill(0, gate.argmax(), float("inf")) for gate in gates.values()])
    stays = torch.ones(len(values), dtype=torch.bool).index_fill(0, values.argsort(stable=True)[:number], False)
    parts = stays.split([len(gate) for gate in gates.values()])
    return {name: part.nonzero().squeeze(1) for name, part in zip(gates, parts, strict=True)}


def measure_cost(server: Server, sizes: Mapping[str, int]) -> tuple[int, int]:
    """(MACs of one example, parameters) of the submodel of `sizes`."""
    model, data = server.builder.build(sizes), server.public.tune
    return count_macs(model, data.x[data.index[:1]].cpu()), count_parameters(model)


def is_below(cost: tuple[int, int], budget: tuple[int, int]) -> bool:
    """Whether both the MACs and the parameters are fewer than the budget's."""
    return cost[0] < budget[0] and cost[1] < budget[1]


def count_units(kept: Units) -> dict[str, int]:
    """The sizes of a submodel: units kept in each group."""
    return {name: len(units) for name, units in kept.items()}
