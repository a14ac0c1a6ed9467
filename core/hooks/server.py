"""The server as plugins see it: the global model, the width groups, the public data, and what can be done with them."""

from __future__ import annotations

import math
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from hetfl.config import RunOptions
from hetfl.data.dataset import Examples, ServerData
from hetfl.data.kinds import CLASSIFY, TaskKind
from hetfl.errors import NotApplicable
from hetfl.hooks.values import Client
from hetfl.models.early_exit import all_exits
from hetfl.models.state import State, copy_state, move_state
from hetfl.parallel import Pool
from hetfl.rng import secret_normal, stream
from hetfl.submodel.builder import SubmodelBuilder
from hetfl.submodel.depth import Depth
from hetfl.submodel.plan import Patches, Plan, Selection, grow
from hetfl.submodel.tracing.residual import find_blocks
from hetfl.submodel.widths import Kept
from hetfl.training.dropout import seeded_random
from hetfl.training.evaluation import Score, evaluate
from hetfl.training.tuning import TuningResult, explain_risen_loss, tune, tune_together


class Server:
    """`state` is the global model, `branches` further models by name, as patches of it; `widths` are the groups that can be cut;
    `clients` has every client by its id as it was when last sampled.

    `wanted` clients are to be chosen for the round; `sampled` of `population` take part, drawn uniformly, or all of as many.
    `averages` tells over whom the aggregation takes a mean ("covering" an entry, or "all"; None: it takes none). `key` is the
    server's secret: 32 bytes that never leave it but for its checkpoints; with `hides_sample` even who takes part is drawn from it.
    `reachable`, bool by name, is False at entries of the global model that no plan of the run ever takes, and that get no noise:
    set in `prepare` alone, and so from nothing that clients sent.
    `kind` is the run's kind of task, `classes` the numbers that a model answers with. `public` is the server's labelled data, if it
    `has_public`; `taken` counts the training steps on it by their batch size,
    `steps_saved` and `epochs_saved` what early stopping left out.
    """

    def __init__(
        self, options: RunOptions, builder: SubmodelBuilder, state: State, classes: int, public: ServerData | None, pool: Pool,
        kind: TaskKind = CLASSIFY,
    ) -> None:  # fmt: skip
        self.options, self.builder, self.state, self.classes, self.pool = options, builder, state, classes, pool
        self.kind = kind
        self.widths, self.has_public = builder.widths, public is not None
        self.branches: dict[str, Patches] = {}
        self.reachable: State = {}
        self.example: Tensor | None = None  # two random inputs, for a look at what a model computes
        self.clients: dict[int, Client] = {}
        self.taken, self.steps_saved, self.epochs_saved = Counter[int](), 0, 0.0
        self.notes: list[str] = []
        self.alarms: list[str] = []  # of this round, not said yet
        self.sampled, self.population, self.averages = 0, 0, cast(str | None, None)
        self.wanted = 0
        self.key, self.hides_sample = secrets.token_bytes(32), False
        self._public, self._counting = public, threading.Lock()
        self._selections: dict[tuple[Depth, tuple[tuple[int, ...], ...]], Selection] = {}

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """The residual blocks of the model that a submodel may leave out, by name, in order of execution.

        They are found and proven when first asked for; a model with several exits is looked at with all of them.
        """
        assert self.example is not None
        with all_exits(self.builder.model):
            return find_blocks(self.builder.model, self.example.cpu())

    @property
    def public(self) -> ServerData:
        """The server's own labelled examples. Raises UsageError where the run gives it none."""
        if self._public is None:
            raise NotApplicable("this strategy needs public data on the server; give it some with --server-data 0.05")
        return self._public

    @property
    def steps(self) -> int:
        """All training steps on the server's data."""
        return self.taken.total()

    def count_steps(self, steps: int, batch: int) -> None:
        """Counts training steps on the server's data that a plugin takes itself; the control takes as many of as many examples."""
        with self._counting:
            self.taken[batch] += steps

    def branch(self, name: str) -> State | None:
        """The whole state of a branch, the global model where the branch says nothing; None where there is no such branch."""
        return grow(self.branches[name], self.state)[0] if name in self.branches else None

    def stream(self, purpose: str, round: int = 0, client: int = -1) -> torch.Generator:
        """A random stream that belongs to (seed, purpose, round, client)."""
        return stream(self.options.seed, purpose, round, client)

    def secret_normal(self, purpose: str, round: int, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers of `shape`, float64, that nobody but this server can draw, whatever the run's seed."""
        return secret_normal(self.key, purpose, round, tuple(shape))

    def sample_stream(self, round: int) -> torch.Generator:
        """The random stream that decides who takes part in a round."""
        return stream(self.key.hex(), "sample", round) if self.hides_sample else self.stream("sample", round)

    def select(
        self, choose: Callable[[int], Tensor] | Kept = torch.arange, *,
        exits: int | None = None, blocks: Collection[str] | None = None,
    ) -> Selection:  # fmt: skip
        """The plan that keeps the units `choose(size)` of every width group, or those that `choose` lists for each; of a model with
        several exits the layers up to number `exits`, and of its residual blocks (`self.blocks`) the named ones.

        Equal selections are one object. Mask it with `dataclasses.replace`.
        """
        kept = self.widths.select(choose) if callable(choose) else choose
        if odd := set(blocks or ()) - set(self.blocks if blocks else ()):
            raise ValueError(f"'{min(odd)}' is none of the model's residual blocks ({', '.join(self.blocks)})")
        depth = Depth(exits, () if blocks is None else tuple(b for b in self.blocks if b not in blocks))
        key = depth, tuple(tuple(units.flatten().tolist()) for units in kept.values())
        if key not in self._selections:
            if len(self._selections) > 64:
                self._selections.clear()
            names = depth.select_names(self.builder.model, self.state)
            self._selections[key] = Selection(self.widths, kept, names=names, depth=depth)
        return self._selections[key]

    def share(self, plan: Plan) -> float:
        """The parameters of a plan's submodel that are trained, as a share of the whole model's."""
        own = {name for name, _ in self.builder.model.named_parameters()}
        sizes = [sum(t.numel() for name, t in s.items() if name in own) for s in (plan.take(self.state), self.state)]
        return sizes[0] / sizes[1]

    def logits(self, state: Mapping[str, Tensor], x: Tensor, sizes: Mapping[str, int] | None = None) -> Tensor:
        """The answers f(x; state) in evaluation mode, differentiable in `state`; with `sizes`, `state` is that submodel's."""
        return self.builder.logits(state, x, sizes)

    def predict(self, state: Mapping[str, Tensor], x: Tensor, sizes: Mapping[str, int] | None = None) -> Tensor:
        """`logits` without a gradient, in batches of evaluation."""
        with torch.no_grad():
            return torch.cat([self.logits(state, part, sizes) for part in x.split(self.options.eval_batch_size)])

    def score(self, state: State, data: Examples, sizes: Mapping[str, int] | None = None, model: str | None = None) -> Score:
        """Score and loss of `state` on `data`."""
        return evaluate(self.builder.load(state, sizes, model), data, self.options.eval_batch_size)

    def tune(
        self, parameters: list[Tensor], loss: Callable[[Tensor], Tensor], judge: Callable[[], float], purpose: str, round: int,
        *, steps: int, lr: float, batch: int, client: int = -1, keep: tuple[Tensor, ...] = (), patience: int = 0,
        watch: Callable[[int], None] | None = None,
    ) -> TuningResult:  # fmt: skip
        """`training.tuning.tune` on this server's tune split, with its steps counted."""
        generator = self.stream(purpose, round, client)
        how: dict[str, Any] = {"steps": steps, "lr": lr, "batch": batch, "keep": keep, "patience": patience, "watch": watch}
        return self._note_tuning([tune(self.public.tune, parameters, loss, judge, generator, **how)], steps, batch, purpose)[0]

    def tune_together(
        self, parameters: list[Tensor], loss: Callable[[Tensor], Tensor], judge: Callable[[], Tensor], purpose: str, round: int,
        clients: Sequence[int], *, steps: int, lr: float, batch: int, patience: int = 0,
    ) -> list[TuningResult]:  # fmt: skip
        """`tuning.tune_together` for several clients, each with the batches that it would have alone, with the steps counted."""
        orders = [self.stream(purpose, round, client) for client in clients]
        how: dict[str, Any] = {"steps": steps, "lr": lr, "batch": batch, "patience": patience}
        return self._note_tuning(tune_together(self.public.tune, parameters, loss, judge, orders, **how), steps, batch, purpose)

    def _note_tuning(self, tuned: list[TuningResult], steps: int, batch: int, purpose: str) -> list[TuningResult]:
        each, saved = math.ceil(len(self.public.tune) / batch), sum(steps - t.steps for t in tuned)
        self.count_steps(sum(t.steps for t in tuned), batch)
        with self._counting:
            self.alarms += [text for t in tuned if (text := explain_risen_loss(purpose, t.start, t.last, t.step))]
            self.steps_saved, self.epochs_saved = self.steps_saved + saved, self.epochs_saved + saved / each
        return tuned

    def train(
        self, state: State, steps: int, purpose: str, round: int = 0, *,
        sizes: Mapping[str, int] | None = None, lr: float | None = None, batch: int | None = None, client: int = -1,
        watch: Callable[[int], None] | None = None,
    ) -> State:  # fmt: skip
        """`state` after at most `steps` steps on the loss on server data, the best by hold-out loss.

        `lr` and `batch` (examples in a step) are the run's, --server-lr and --server-batch-size, where they are not given; `watch`
        is told the number of the step now and then.
        """
        if not steps:
            return state
        model, (x, y) = self.builder.load(state, sizes), self.public.tune.all()
        parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]

        def loss(rows: Tensor) -> Tensor:
            return self.kind.loss(model.train()(x[rows]), y[rows])

        def judge() -> float:
            return evaluate(model, self.public.holdout, self.options.eval_batch_size).loss

        with seeded_random(self.widths.draws, self.stream(f"{purpose} dropout", round, client)):
            self.tune(
                parameters, loss, judge, purpose, round, steps=steps, lr=lr or self.options.server_lr,
                batch=batch or self.options.server_batch_size, client=client, watch=watch,
                keep=tuple(buffer for name, buffer in model.named_buffers() if name in state),  # a frozen base is all threads'
            )  # fmt: skip
        model.zero_grad()
        return move_state(copy_state(model), "cpu")
