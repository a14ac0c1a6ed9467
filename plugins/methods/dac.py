"""DAC (Li & Sanyal): the server shrinks the model by gates that it learns, one snapshot for each budget (spec dac)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from hetfl import Client, Field, Plan, Plugin, Server, State, Widths, flatten_state, hookimpl, unflatten_state
from hetfl.profiling.cost import count_macs, count_parameters
from hetfl.submodel.blocks import take
from hetfl.submodel.units import Gate, apply_gates, find_gates, locate_gates, select_largest
from hetfl.submodel.widths import within
from hetfl.training.dropout import seeded_random
from hetfl.training.tuning import cycle_batches

Units = Mapping[str, Tensor]


class DAC(Plugin):
    """Clients of a budget get the first snapshot with fewer MACs and parameters than the plain slice of their width has.

    Gates stand on every elastic group that feeds nothing but the next layer, before that layer (or its depthwise filter).
    """

    entropy: float = Field(0.1, ge=0, description="coefficient of the gates' entropy (l1)")
    bound: float = Field(0.01, ge=0, description="coefficient of the hinge that holds gates in [0, 1] (l2)")
    threshold: float = Field(0.1, ge=0, description="a gate at or below this is removed")
    epochs: int = Field(5, ge=1, description="epochs over the server's data between removals; the paper does not say")
    lr: float = Field(0.01, gt=0, description="SGD learning rate of the search (the paper's for its clients)")
    momentum: float = Field(0.5, ge=0, lt=1, description="momentum of the search")
    stall: float = Field(0.1, gt=0, lt=1, description="share of the gates removed, weakest first, where none has become low")
    start: Literal["searched", "global"] = Field("searched", description="clusters start from the searched weights, or the global")
    _kept: dict[float, State] = PrivateAttr(default_factory=dict)
    _states: dict[float, State] = PrivateAttr(default_factory=dict)

    @hookimpl
    def extract(self, server: Server, clients: Sequence[Client], round: int) -> list[Plan]:
        """Searches what no client had before, the largest budget first; a later, smaller one goes on from there."""
        for width in sorted({c.profile.width for c in clients} - set(self._kept), reverse=True):
            self._search(server, width)
            if self.start == "searched" and width < 1:
                level = next(c.profile.level for c in clients if c.profile.width == width)
                server.branches[f"level {level}"] = server.select(self._kept[width]).put(self._states[width])
        return [server.select(self._kept[client.profile.width]) for client in clients]

    def _search(self, server: Server, width: float) -> None:
        """Removes units until the submodel is below the budget of `width`, then trains on without gates (spec dac 1 ii)."""
        larger = min((w for w in self._kept if w > width), default=None)
        kept: Units = server.widths.select(torch.arange) if larger is None else self._kept[larger]
        state = server.state if larger is None else self._states[larger]
        budget = measure_cost(server, {name: len(units) for name, units in server.widths.prefix(width).items()})
        turn = 0
        while width < 1 and not is_below(measure_cost(server, count_units(kept)), budget):
            turn += 1
            state, gates = self._train_gates(server, state, count_units(kept), f"dac {width:g}", turn)
            remaining = prune_gates(gates, self.threshold, self.stall)
            if all(len(units) == len(gates[name]) for name, units in remaining.items()):
                server.notes.append(f"dac: no gate is left to remove, and level {width:g} is still above its budget")
                break
            index = within(server.widths, count_units(kept), remaining)
            state = {name: take(tensor, index.get(name, {})).clone() for name, tensor in state.items()}
            kept = {name: units[remaining[name]] if name in remaining else units for name, units in kept.items()}
        if turn:
            steps = self._count_steps(server)
            state = server.train(state, steps, f"dac {width:g}", sizes=count_units(kept), lr=self.lr / 10)
        self._kept[width], self._states[width] = dict(kept), state

    def _count_steps(self, server: Server) -> int:
        """Steps between two removals."""
        return self.epochs * -(-len(server.public.tune) // server.options.server_batch_size)

    def _train_gates(
        self, server: Server, state: State, sizes: dict[str, int], purpose: str, turn: int
    ) -> tuple[State, dict[str, Tensor]]:
        """Trains weights and gates together (eq. 3): the weights with the gates multiplied in, and the gates of each group."""
        model, (x, y) = server.builder.load(state, sizes).train(), server.public.tune.all()
        places = place_gates(server.widths, server.builder.model)
        where = locate_gates(server.widths, places, sizes)
        gates = {name: torch.ones(sizes[name], device=x.device, requires_grad=True) for name in places}
        weights = dict(model.named_parameters())
        optimizer = torch.optim.SGD([*weights.values(), *gates.values()], self.lr, self.momentum)
        generator, steps = server.stream(purpose, turn), self._count_steps(server)
        server.count_steps(steps, server.options.server_batch_size)
        with seeded_random(server.widths.draws, server.stream(f"{purpose} dropout", turn)):
            for _, rows in zip(range(steps), cycle_batches(len(x), server.options.server_batch_size, generator), strict=False):
                if len(rows) > 1 or len(x) == 1:
                    optimizer.zero_grad()
                    logits = functional_call(model, apply_gates(weights, gates, where), (x[rows],))
                    (F.cross_entropy(logits, y[rows]) + self.entropy * entropy(gates) + self.bound * hinge(gates)).backward()
                    optimizer.step()
        trained = {n: t.detach().cpu().clone() for n, t in {**weights, **dict(model.named_buffers())}.items() if n in state}
        learned = {name: gate.detach().cpu() for name, gate in gates.items()}
        return {**trained, **apply_gates(trained, learned, where)}, learned

    def state_dict(self) -> State:
        return flatten_state(kept=self._kept, state=self._states)

    def load_state_dict(self, state: State) -> None:
        self._kept, self._states = unflatten_state(state, "kept", float), unflatten_state(state, "state", float)


def place_gates(widths: Widths, model: nn.Module) -> dict[str, list[Gate]]:
    """Where the gate of each group stands that one layer makes and one layer reads, perhaps through depthwise filters."""
    read = find_gates(widths, model)
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    makers = {g.name: 0 for g in widths.groups}
    for name in weights:
        for dim, axis in widths.axes.get(name, {}).items():
            for group in {axis.groups[g] for g in axis.group.unique().tolist() if g >= 0}:
                makers[group] += (name, dim) not in read[group]
    final = {name: [place for place in places if place[1] == 1] for name, places in read.items()}
    return {name: read[name][:1] for name in read if makers[name] == 1 and len(final[name]) == 1}


def entropy(gates: Units) -> Tensor:
    """Sum over the blocks of the entropy of the softmax of their gates (eq. 1)."""
    return torch.stack([-(w.softmax(0) * w.log_softmax(0)).sum() for w in gates.values()]).sum() if gates else torch.zeros(())


def hinge(gates: Units) -> Tensor:
    """Sum of max(w - 1, 0) + max(-w, 0): what eq. 2 means; as printed its sign rewards leaving [0, 1]."""
    return torch.stack([(F.relu(w - 1) + F.relu(-w)).sum() for w in gates.values()]).sum() if gates else torch.zeros(())


def prune_gates(gates: Units, threshold: float, stall: float) -> dict[str, Tensor]:
    """The units whose gate is above the threshold, at least the strongest of each group.

    Where every gate is, the weakest `stall` share of all gates goes.
    """
    least = threshold
    if gates and all(bool((gate > threshold).all()) for gate in gates.values()):
        values = torch.cat([gate for gate in gates.values() if len(gate) > 1] or list(gates.values()))
        least = float(values.sort().values[max(0, int(stall * len(values)) - 1)])
    return {
        name: keep if len(keep := (gate > least).nonzero().squeeze(1)) else select_largest(gate, 1) for name, gate in gates.items()
    }


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
