"""What strategies share whose clients agree on a prototype of each class, its mean features, and on nothing else."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import ClassVar

import torch
from pydantic import PrivateAttr
from torch import Tensor
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
    ReceivedReply,
    Reply,
    Server,
    State,
    Task,
    Update,
    hookimpl,
)
from hetfl.models.features import Features, find_head, watching_features

MOST = 1 << 24  # elements of an extra

NEAREST, PERSONAL = "prototype accuracy", "personal-prototype@own"  # of a client, in clients.csv; the mean of a round's clients


class Prototypes(Plugin):
    """Prototypes travel, both ways, and no parameters; how the server makes the global ones of the clients' is `merge`.

    A client trains its own model on CE + `weight` * the mean squared difference of the features before its head, averaged down (or
    repeated up) to `dim`, from the global prototype of their class; then it sends the mean features of each of its classes.
    """

    trains_global: ClassVar[bool] = False
    tasks = ("classify",)
    tasks_why = "a prototype is the mean of the features of a class"
    extras_down: ClassVar[dict[str, ExtraSpec]] = {
        "prototypes": ExtraSpec(MOST, ndim=2), "known": ExtraSpec(MOST, torch.bool, 1)
    }  # fmt: skip
    extras_up: ClassVar[dict[str, ExtraSpec]] = {
        "prototypes": ExtraSpec(MOST, ndim=2, low=-1e6, high=1e6), "counts": ExtraSpec(MOST, torch.int64, 1, 0, 1e9)
    }  # fmt: skip

    weight: float = Field(1.0, ge=0, description="weight of the distance from the global prototypes (lambda)")
    dim: int = Field(0, ge=0, le=1 << 16, description="numbers in a prototype; 0: as many as the whole model has features")
    _length: int = PrivateAttr(0)
    _prototypes: Tensor = PrivateAttr(default_factory=lambda: torch.empty(0))  # (classes, dim), once there are any
    _known: Tensor = PrivateAttr(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    _nearest: dict[int, float] = PrivateAttr(default_factory=dict)

    @property
    def takes_own_models(self) -> bool:
        return True

    @hookimpl
    def prepare(self, server: Server) -> None:
        self.length(server)

    def length(self, server: Server) -> int:
        """How many numbers a prototype has."""
        if not self._length:
            model, x = server.builder.module(), server.example
            assert x is not None
            with watching_features([model], find_head(model, x, server.classes)) as seen:
                server.predict(server.state, x)
            self._length = self.dim or seen.last.shape[1]
        return self._length

    @hookimpl
    def exchange(self) -> Exchange:
        return Exchange(down=(), up=())

    @hookimpl
    def client_extras(self, server: Server, client: Client, plan: Plan) -> State:
        """The global prototypes of the classes that have one, and which these are; before the first, none of their length."""
        if isinstance(plan, OwnModel):
            assert server.example is not None
            find_head(server.builder.untrained(plan.model), server.example.cpu(), server.classes)
        known = self._known if len(self._known) else torch.zeros(server.classes, dtype=torch.bool)
        prototypes = self._prototypes if len(self._known) else torch.zeros(server.classes, self.length(server))
        return {"prototypes": prototypes[known], "known": known}

    @hookimpl(wrapper=True, trylast=True)
    def fit(self, task: Task) -> Generator[None, Reply, Reply]:
        loss, known, train = task.loss, task.extras["known"], task.data.train
        dim = task.extras["prototypes"].shape[1]
        goals = torch.zeros(len(known), dim).to(task.extras["prototypes"])
        goals[known] = task.extras["prototypes"]
        head = find_head(task.model, train.x[train.index[:2]], len(known))
        with watching_features([task.model, *task.parts], head) as seen:
            task.loss = lambda out, y: loss(out, y) + self.weight * measure_distance(seen.last, goals[y], known[y])
            reply = yield
            read = partial(read_features, task, seen, dim)
            reply.extras |= average_by_class(task, read)
            if bool(known.any()) and len(task.data.test):
                reply.metrics[NEAREST] = score_by_nearest(task, read, goals, known)
        return reply

    @hookimpl
    def receive(self, server: Server, received: ReceivedReply) -> None:
        reply, empty = received.reply, torch.empty(0)
        counts, prototypes = reply.extras.get("counts", empty), reply.extras.get("prototypes", empty)
        if counts.shape != (server.classes,) or int(counts.sum()) != reply.examples:
            raise ValueError("its prototypes are not of as many examples as it has")
        if prototypes.shape != (int((counts > 0).sum()), self.length(server)):
            raise ValueError("its prototypes are not those of the classes that it counts")
        score = reply.metrics.get(NEAREST, -1.0)
        self._nearest = {**self._nearest, received.client.id: score} if 0 <= score <= 1 else self._nearest

    @hookimpl
    def aggregate(self, server: Server, updates: Iterable[Update], round: int) -> Merged:
        extras = {u.client: u.extras for u in updates}
        if not extras:
            return Merged(server.state)
        counts = torch.stack([extras[client]["counts"] for client in sorted(extras)])
        prototypes = torch.zeros(*counts.shape, self.length(server))
        prototypes[counts > 0] = torch.cat([extras[client]["prototypes"] for client in sorted(extras)])
        if not len(self._known):
            self._known, self._prototypes = torch.zeros(server.classes, dtype=torch.bool), torch.zeros(prototypes.shape[1:])
        self._known, self._prototypes = self.merge(server, prototypes, counts, round)
        scores = [self._nearest.pop(client) for client in sorted(extras) if client in self._nearest]
        return Merged(server.state, facts={PERSONAL: sum(scores) / len(scores)} if scores else {})

    def merge(self, server: Server, prototypes: Tensor, counts: Tensor, round: int) -> tuple[Tensor, Tensor]:
        """Which classes have a global prototype, bool (classes,), and these, (classes, dim), given the clients' (clients, classes,
        dim) and how many examples each is the mean of (clients, classes); 0 where a client has none of a class."""
        raise NotImplementedError

    def state_dict(self) -> State:
        return {"known": self._known, "prototypes": self._prototypes} if len(self._known) else {}

    def load_state_dict(self, state: State) -> None:
        self._known, self._prototypes = state["known"], state["prototypes"]


def pool(features: Tensor, dim: int) -> Tensor:
    """`features` (N, d) as (N, dim): means over equal shares of the features, which overlap or repeat where d is no multiple."""
    d = features.shape[1]
    return features if d == dim else features @ F.adaptive_avg_pool1d(torch.eye(d).to(features), dim)


def measure_distance(features: Tensor, goals: Tensor, known: Tensor) -> Tensor:
    """The mean over examples and numbers of (features - goals)^2, both (N, ·), 0 for the examples that are not `known` (N,)."""
    return ((pool(features, goals.shape[1]) - goals).square() * known[:, None]).mean()


def read_features(task: Task, seen: Features, dim: int, x: Tensor) -> Tensor:
    """The pooled features (N, dim) of x (N, *shape), without a gradient and in evaluation mode."""
    with torch.no_grad():
        task.model.eval()(x)
    return pool(seen.last, dim)


def average_by_class(task: Task, read: Callable[[Tensor], Tensor]) -> State:
    """The mean features of each class that the client has examples of, in the classes' order, and of how many each class's are."""
    classes, sums, counts = len(task.data.class_counts), torch.zeros(()), torch.zeros(())
    for x, y in task.data.train.batches(task.options.eval_batch_size):
        one_hot = F.one_hot(y, classes)
        sums, counts = sums + one_hot.T.float() @ read(x), counts + one_hot.sum(0)
    held = counts > 0
    return {"prototypes": sums[held] / counts[held, None], "counts": counts.long()}


def score_by_nearest(task: Task, read: Callable[[Tensor], Tensor], goals: Tensor, known: Tensor) -> float:
    """The accuracy on the client's own test data of taking the class of the nearest `known` one of the prototypes `goals`."""
    right = 0
    for x, y in task.data.test.batches(task.options.eval_batch_size):
        apart = torch.cdist(read(x), goals, compute_mode="donot_use_mm_for_euclid_dist")
        right += int((apart.masked_fill(~known, torch.inf).argmin(1) == y).sum())
    return right / len(task.data.test)
