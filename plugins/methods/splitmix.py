"""Split-Mix (Hong et al., ICLR 2022): the model is split into narrow base networks, whose answers are averaged.

After the official code (illidanlab/SplitMix); docs/strategies/splitmix.md says where ours differs.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from hetfl import (
    Client,
    ExtraSpec,
    Field,
    NotApplicable,
    Patch,
    Plan,
    Plugin,
    Reply,
    Selection,
    Server,
    State,
    Task,
    Update,
    Widths,
    hookimpl,
    running_mean,
)
from hetfl.models.state import apply_masks
from hetfl.submodel.blocks import cells
from hetfl.submodel.tracing.verify import draw_values


@dataclass(frozen=True, eq=False)
class Mix(Selection):
    """The units of some `bases`, a `share` of them all; `heads`: the weights that add up what the bases answer.

    Globally these are divided by the number of all bases, on a client by the number that it has: both models answer with a mean.
    """

    bases: tuple[int, ...] = ()
    share: float = 1.0
    heads: frozenset[str] = frozenset()

    def take(self, state: State) -> State:
        return {name: t / self.share if name in self.heads else t for name, t in super().take(state).items()}

    def put(self, trained: State) -> dict[str, Patch]:
        return super().put({name: t * self.share if name in self.heads else t for name, t in trained.items()})


class SplitMix(Plugin):
    """A client of width r gets r of the bases, drawn anew every round, and trains each of them by a loss of its own.

    A client's several plans are one: the units of all its bases, with masks over what would join one base to another.
    """

    expected_failures: ClassVar[dict[str, str]] = {
        "full_width_is_the_whole_model": "bases share nothing: what would join them is left out",
        "puts_back_what_it_takes": "the head's weights travel divided by the client's share of the bases",
    }
    extras_down: ClassVar[dict[str, ExtraSpec]] = {"bases": ExtraSpec(1 << 10, torch.int64, ndim=1, low=0)}

    bases: int = Field(4, ge=1, le=1 << 10, description="networks that the model is split into, each 1 / bases as wide")
    first_steps: int | None = Field(
        None, ge=0, description="server steps of each base before the first clients (none: together as many as --pretrain-steps)"
    )
    _trained: bool = PrivateAttr(False)

    @hookimpl
    def prepare(self, server: Server) -> None:
        """Cuts the bases apart and gives their weights the scale of layers of their own width."""
        if narrow := next((g for g in server.widths.groups if g.size < self.bases), None):
            raise NotApplicable(
                f"not applicable: {self.bases} bases need as many units in all layers, {narrow.name} has {narrow.size}"
            )
        if server.options.server_finetune_steps:
            raise NotApplicable("not applicable: fine-tuning on the server joins the bases: leave --server-finetune-steps at 0")
        masks = server.reachable = cut_apart(server.widths, self.bases)
        heads, root = find_heads(server.builder.model, server.widths), self.bases**0.5
        if frozen := heads - server.state.keys():
            raise NotApplicable(
                f"not applicable: {min(frozen)} is frozen: it adds up what the bases answer, by each client's number of them"
            )
        scales = dict.fromkeys(masks, root) | dict.fromkeys(heads, 1 / root)
        apart = apply_masks(server.state, masks)
        server.state = {name: t * scales[name] if name in scales else t for name, t in apart.items()}
        self._prove_mean(server)

    def _prove_mean(self, server: Server) -> None:
        """Raises NotApplicable where the model's answer is not the mean of its bases', with drawn values: layers may begin at 0."""
        x, generator = server.example, server.stream("splitmix proof")
        assert x is not None
        drawn = {name: draw_values(name, t, generator) for name, t in server.state.items()}
        state = apply_masks(drawn, server.reachable)
        plans = self._make_plans(server, [[base] for base in range(self.bases)])
        each = torch.stack([server.logits(plan.take(state), x, plan.sizes) for plan in plans])
        if not torch.allclose(server.logits(state, x), each.mean(0), rtol=1e-3, atol=1e-4 * float(each.abs().max())):
            raise NotApplicable(
                "not applicable: parts of this model act on each other (as norms or attention over channels do, or layers that are "
                "frozen whole): it is no mean of bases"
            )

    @hookimpl
    def extract(self, server: Server, clients: Sequence[Client], round: int) -> list[Plan]:
        if not self._trained:
            self._train_bases(server)
        turns = torch.randperm(self.bases, generator=server.stream("splitmix", round)).tolist()
        return self._make_plans(server, [self._draw(server, c, round, turns[i % self.bases]) for i, c in enumerate(clients)])

    def _train_bases(self, server: Server) -> None:
        """Trains each base on the server's data: cut apart, the model has forgotten most of what pre-training taught it."""
        steps = self.first_steps
        if steps is None:
            steps = server.options.pretrain_steps // self.bases if server.has_public else 0
        if steps:
            plans = self._make_plans(server, [[base] for base in range(self.bases)])
            own = [server.train(p.take(server.state), steps, "splitmix", 1, sizes=p.sizes, client=b) for b, p in enumerate(plans)]
            updates = [Update(b, plan.put(state), 1.0) for b, (plan, state) in enumerate(zip(plans, own, strict=True))]
            server.state = running_mean(server.state, updates)
        self._trained = True

    def state_dict(self) -> State:
        return {"trained": torch.tensor(self._trained)}

    def load_state_dict(self, state: State) -> None:
        self._trained = bool(state["trained"])

    def _draw(self, server: Server, client: Client, round: int, first: int) -> list[int]:
        """A client's bases: `first`, by which all get their turn, and others at random."""
        order = torch.randperm(self.bases, generator=server.stream("splitmix", round, client.id)).tolist()
        number = max(1, int(self.bases * client.profile.width + 1e-9))
        return sorted([first, *(base for base in order if base != first)][:number])

    def _make_plans(self, server: Server, draws: Iterable[Sequence[int]]) -> list[Plan]:
        """A plan of the bases of each draw."""
        parts = {g.name: split_units(g.size, self.bases) for g in server.widths.groups}
        heads, plans = find_heads(server.builder.model, server.widths), list[Plan]()
        for bases in draws:
            units = {name: torch.cat([part[b] for b in bases]) for name, part in parts.items()}
            masks = Selection(server.widths, units).take(server.reachable) if len(bases) > 1 else {}
            plans.append(Mix(server.widths, units, masks, bases=tuple(bases), share=len(bases) / self.bases, heads=heads))
        return plans

    @hookimpl
    def client_extras(self, plan: Plan) -> State | None:
        return {"bases": torch.tensor(plan.bases)} if isinstance(plan, Mix) else None

    @hookimpl(wrapper=True)
    def fit(self, task: Task) -> Generator[None, Reply, Reply]:
        held, supervise = task.extras["bases"].tolist(), task.loss
        parts = [task.make_part(units) for units in locate_bases(task.full_sizes, held, self.bases)]
        task.forward = lambda model, x: tuple(part(x) for part in parts)
        task.loss = lambda answers, y: torch.stack([supervise(z, y) for z in answers]).sum()
        names = find_heads(task.builder.model, task.builder.widths)
        heads = {name: p for name, p in task.model.named_parameters() if name in names}
        multiply(heads.values(), len(held))
        reply = yield
        multiply(heads.values(), 1 / len(held))
        reply.state = {name: t / len(held) if name in heads else t for name, t in reply.state.items()}
        return reply


def multiply(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiplies them in place."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(factor)


def split_units(size: int, bases: int) -> Sequence[Tensor]:
    """The units of each base: as many for each as can be, the first ones having one more. Of 10 units 4 bases have 3, 3, 2, 2."""
    return torch.arange(size).tensor_split(bases)


def locate_bases(full: dict[str, int], held: Sequence[int], bases: int) -> list[dict[str, Tensor]]:
    """For each of the bases `held` the positions of its units, by group, in the model of them all; `full`: units of the whole."""
    found: list[dict[str, Tensor]] = [{} for _ in held]
    for name, size in full.items():
        counts = [len(split_units(size, bases)[base]) for base in held]
        for part, positions in zip(found, torch.arange(sum(counts)).split(counts), strict=True):
            part[name] = positions
    return found


def cut_apart(widths: Widths, bases: int) -> State:
    """For each tensor whose inputs and outputs are channels: where both are of one base, bool in the tensor's shape."""
    wide = [name for name, axes in widths.axes.items() if len(axes) > 1 and name in widths.shapes]
    masks = {name: torch.zeros(widths.shapes[name], dtype=torch.bool) for name in wide}
    for base in range(bases):
        index = widths.index({group.name: split_units(group.size, bases)[base] for group in widths.groups})
        for name, mask in masks.items():
            mask[cells(index[name], mask)] = True
    return masks


def find_heads(model: nn.Module, widths: Widths) -> frozenset[str]:
    """The weights whose inputs are channels and whose outputs are none."""
    embeddings = (path for path, m in model.named_modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag))
    tables = {f"{path}.weight" for path in embeddings}  # of rows, not of inputs
    return frozenset(
        n for n, axes in widths.axes.items() if len(widths.shapes.get(n, ())) > 1 and 0 not in axes and n not in tables
    )
