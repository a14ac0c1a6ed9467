"""FedMD (Li & Wang, 2019): clients of any architecture agree on scores for public examples (spec fedmd)."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor, nn
from torch.nn import functional as F

from hetfl import (
    Client,
    Exchange,
    ExtraSpec,
    Field,
    Merged,
    OwnModel,
    Plan,
    Plugin,
    Reply,
    Server,
    State,
    Task,
    Update,
    hookimpl,
    prefix,
)
from hetfl.training.local import descend
from hetfl.training.tuning import cycle_batches

MOST = 1 << 24  # elements of an extra

MOMENTS = "digest/"  # in a client's memory: what Adam knows of each tensor from earlier digests

DISTANCES = {"mae": F.l1_loss, "mse": F.mse_loss}


class FedMD(Plugin):
    """An architecture for each tier; by default the widths of one family, which parameter aggregations can also merge."""

    models: dict[str, str] = Field({}, description='own architectures by level, e.g. {"0.5": "cnn", "0.25": "mlp"}')

    @property
    def takes_own_models(self) -> bool:
        return bool(self.models)

    @hookimpl
    def extract(self, server: Server, clients: Sequence[Client]) -> list[Plan]:
        return [self._plan(server, client) for client in clients]

    def _plan(self, server: Server, client: Client) -> Plan:
        model = self.models.get(client.profile.level)
        if model is None:
            return server.select(prefix(client.profile.width))
        return OwnModel(model, server.builder.initial(None, model))


class Consensus(Plugin):
    """Only scores travel: every client digests the mean of all clients' logits, then revisits its own data.

    A round is one exchange, so its scores are for the next: round 1 is the paper's preparation, and each later one digests the
    consensus of who took part in the round before. The clients' models stay with them; what an extraction says of values counts for
    nothing here, only its sizes and masks do.
    """

    tasks = ("classify", "regress", "multilabel")
    tasks_why = "scores of every token of the public examples would be many times the model"
    extras_down: ClassVar[dict[str, ExtraSpec]] = {
        "rows": ExtraSpec(MOST, torch.int64), "aligned": ExtraSpec(MOST, torch.int64), "consensus": ExtraSpec(MOST)
    }  # fmt: skip
    extras_up: ClassVar[dict[str, ExtraSpec]] = {"scores": ExtraSpec(MOST, ndim=2, low=-1e6, high=1e6)}

    align: int = Field(5000, ge=1, description="public examples that a round agrees on, stratified (all, where there are fewer)")
    loss: Literal["mae", "mse", "kl"] = Field("mae", description="digest loss between a client's logits and the consensus")
    digest_epochs: int = Field(1, ge=0, description="epochs of digestion a round")
    digest_batch: int = Field(256, ge=1, description="batch size of digestion")
    lr: float = Field(1e-3, gt=0, description="Adam learning rate of digestion and of the first training on public data")
    public_epochs: int = Field(20, ge=0, description="epochs on the labelled public data when a client first takes part")
    public_batch: int = Field(128, ge=1, description="batch size of these")
    distill_steps: int = Field(
        60, ge=0, description="server steps a round that teach the global model the consensus (0: the paper)"
    )
    distill_lr: float = Field(1e-3, gt=0, description="Adam learning rate of these steps")
    _aligned: Tensor = PrivateAttr(default_factory=lambda: torch.empty(0, dtype=torch.long))
    _consensus: Tensor = PrivateAttr(default_factory=lambda: torch.empty(0))

    @property
    def takes_own_models(self) -> bool:
        return True

    @hookimpl
    def prepare(self, server: Server) -> None:
        if server.options.fraction < 1:
            server.notes.append(
                f"fedmd: under --fraction {server.options.fraction:g} clients digest the consensus of those who took part in the "
                "round before, where the paper's is of all"
            )

    @hookimpl
    def exchange(self) -> Exchange:
        return Exchange(down=(), up=())

    @hookimpl
    def client_extras(self, server: Server, round: int) -> State:
        """The rows to score this round, and the consensus on the rows of the last."""
        digest = {"aligned": self._aligned, "consensus": self._consensus} if len(self._aligned) else {}
        return {"rows": self._draw_rows(server, round), **digest}

    def _draw_rows(self, server: Server, round: int) -> Tensor:
        """The public examples (row numbers) that all clients score in this round."""
        public = server.public.tune
        return draw_stratified(public.kind.group(public.y[public.index].cpu(), ())[1], self.align, server.stream("align", round))

    @hookimpl(wrapper=True)
    def fit(self, task: Task) -> Generator[None, Reply, Reply]:
        assert task.public is not None
        x, y = task.public.all()
        size = torch.tensor(sum(p.numel() for p in task.model.parameters()))
        if task.client_state.get("started") != size:
            self._learn_public(task, x, y)
            task.client_state["started"] = size
        if "consensus" in task.extras:
            self._digest(task, x)
        reply = yield
        with torch.no_grad():
            reply.extras["scores"] = torch.cat([task.model.eval()(part) for part in x[task.extras["rows"]].split(512)])
        return reply

    def _learn_public(self, task: Task, x: Tensor, y: Tensor) -> None:
        """Trains a client's model on the labelled public examples, before it first trains on its own; the moments of an
        earlier model are forgotten."""
        batches = shuffle_batches(x, y, self.public_batch, self.public_epochs, task.stream("public"))
        first = torch.optim.Adam(task.model.parameters(), self.lr)
        descend(task, first, batches, lambda a, b: task.kind.loss(task.model(a), b), "public dropout")
        task.client_state = {name: t for name, t in task.client_state.items() if not name.startswith(MOMENTS)}

    def _digest(self, task: Task, x: Tensor) -> None:
        """Trains a client's model towards the consensus on the public examples that it is of."""
        rows, goal = task.extras["aligned"], task.extras["consensus"]
        batches = shuffle_batches(x[rows], goal, self.digest_batch, self.digest_epochs, task.stream("digest"))
        optimizer = recall_adam(task.model, self.lr, task.client_state)
        distance = DISTANCES.get(self.loss, task.kind.divergence)
        descend(task, optimizer, batches, lambda a, b: distance(task.model(a), b), "digest dropout")
        task.client_state |= list_moments(task.model, optimizer)

    @hookimpl
    def aggregate(self, server: Server, updates: Iterable[Update], round: int) -> Merged:
        rows = self._draw_rows(server, round)
        scores = [u.extras["scores"] for u in updates if "scores" in u.extras]
        scores = [s for s in scores if s.shape == (len(rows), server.classes)]
        if not scores:
            return Merged(server.state)
        self._aligned, self._consensus = rows, average_scores(scores)
        return Merged(self._distill(server, round))

    def _distill(self, server: Server, round: int) -> State:
        """The global model after `distill_steps` steps towards the consensus, the best by hold-out loss."""
        if not self.distill_steps:
            return server.state
        (x, _), (hx, hy) = server.public.tune.all(), server.public.holdout.all()
        names = {name for name, _ in server.builder.model.named_parameters()}
        state = {name: t.clone().requires_grad_(name in names) for name, t in server.state.items()}

        def loss(rows: Tensor) -> Tensor:
            at = rows % len(self._aligned)
            return server.kind.divergence(server.logits(state, x[self._aligned[at]]), self._consensus[at].to(x.device))

        def judge() -> float:
            return float(server.kind.loss(server.logits(state, hx), hy))

        weights = [t for name, t in state.items() if name in names]
        server.tune(weights, loss, judge, "distill", round, steps=self.distill_steps, lr=self.distill_lr, batch=64)
        return {name: tensor.detach() for name, tensor in state.items()}

    def state_dict(self) -> State:
        return {"aligned": self._aligned, "consensus": self._consensus}

    def load_state_dict(self, state: State) -> None:
        self._aligned, self._consensus = state["aligned"], state["consensus"]


def recall_adam(model: nn.Module, lr: float, memory: State) -> torch.optim.Adam:
    """Adam of all parameters of `model` with the moments that `memory` has of them: the code has one for all digests (spec 5.4)."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for name, parameter in model.named_parameters():
        start = f"{MOMENTS}{name}/"
        if known := {key.removeprefix(start): t for key, t in memory.items() if key.startswith(start)}:
            optimizer.state[parameter] = {kind: t if kind == "step" else t.to(parameter.device) for kind, t in known.items()}
    return optimizer


def list_moments(model: nn.Module, optimizer: torch.optim.Adam) -> State:
    """What `optimizer` knows of each parameter of `model`, for the client's memory."""
    known = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
    return {f"{MOMENTS}{name}/{kind}": t for name, moments in known.items() for kind, t in moments.items()}


def average_scores(scores: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """The mean over clients of their scores (N, C), weighted by c_k (default 1 / m); NaN entries are left out."""
    c = torch.tensor(weights or [1.0] * len(scores)).reshape(-1, 1, 1)
    stack = torch.stack(list(scores))
    there = ~stack.isnan()
    return (torch.nan_to_num(stack) * c).sum(0) / (there * c).sum(0).clamp(min=torch.finfo(c.dtype).tiny)


def draw_stratified(y: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """At most `number` positions within the labels y (N,), of every class its share, ascending.

    Example: 8 of 30 labels 0 and 10 labels 1 are 6 of the former and 2 of the latter.
    """
    if number >= len(y):
        return torch.arange(len(y))
    order = torch.randperm(len(y), generator=generator)
    order = order[y[order].argsort(stable=True)]
    chosen: Tensor = order[torch.linspace(0, len(y) - 1, number).round().long()]
    return chosen.sort().values


def shuffle_batches(
    x: Tensor, goal: Tensor, batch: int, epochs: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of x (N, *shape) and of its goal (labels or scores, N first), `epochs` times in new orders; none of one example."""
    rows = cycle_batches(len(x), batch, generator)
    for _ in range(epochs * -(-len(x) // min(batch, len(x)))):
        at = next(rows)
        if len(at) > 1 or len(x) == 1:
            yield x[at], goal[at]
