"""What passes between the server's loop and a client, and the engine that carries it."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from hetfl.hooks.values import Client
from hetfl.models.state import State
from hetfl.profiling.node import Profile
from hetfl.submodel import encoding
from hetfl.submodel.plan import Plan
from hetfl.training.task import Reply

Kind = Literal["profile", "train", "statistics", "evaluate"]
ClientState = dict[str, State]  # "memory": what plugins keep with the client; "home": tensors of its model that do not travel

SENTENCE = re.compile(r"^hetfl\.errors\.\w+: ")  # before what says itself which plugin failed

NO_ANSWER = "it is no answer to what was asked"
MOST_WORDS = 1 << 20  # bytes of an answer without tensors, or of all that stands in it beside their values
MOST_TEXT, LONGEST_LINE = 20_000, 500  # characters of a traceback, and of a sentence


@dataclass(frozen=True, eq=False)
class Instruction:
    """What a client is sent: tensors of its submodel, what it needs to build that submodel, and extras.

    `model`: its own architecture, in place of a part of the run's (`sizes`). Tensors that are not sent are the client's own, as
    it left them, or those of an untrained model. `up`: the names that travel back, None for all. `lasting`: of the others, those
    that the client keeps, None for all. `local`: normalisation
    statistics stay with the clients, so they are not among the tensors and start anew. `held`: evaluate with the logits of
    classes that the client does not hold put to 0. `state_version`: the round whose client state the server counts on.
    `most_bytes`: of the answer's message (None: any), which stays with the engine. `steps`: train so many, in place of what the
    options say; 0: those.
    `encoded`: what codecs (hook `encode_down`) made of tensors that are then not in `state`.
    """

    round: int
    state: State
    sizes: dict[str, int] | None
    model: str | None = None
    masks: State = field(default_factory=dict)
    extras: State = field(default_factory=dict)
    up: Collection[str] | None = None
    held: bool = False
    local: bool = False
    state_version: int = 0
    most_bytes: int | None = None
    steps: int = 0
    encoded: State = field(default_factory=dict)
    lasting: Collection[str] | None = None


@dataclass(frozen=True)
class Failure:
    """Why a client gave no answer: a sentence, or the traceback of what it raised."""

    text: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """The failure of a client that raised `error`."""
        return cls("".join(traceback.format_exception(error)))

    @property
    def reason(self) -> str:
        """The last line, without the name of an error of hetfl's own."""
        lines = self.text.strip().splitlines()
        return SENTENCE.sub("", lines[-1])[:LONGEST_LINE] if lines else "no reason given"

    @property
    def details(self) -> str:
        """The end of the whole text."""
        return self.text[-MOST_TEXT:]


Content = int | Instruction  # a round's number asks for a profile
Answer = Profile | Reply | dict[str, float] | Failure


class Engine(Protocol):
    """Where clients run. It is asked, and answers: nothing of a round is known to it. `notices`: what is still to be said."""

    notices: list[str]

    def ask(self, kind: Kind, contents: Mapping[int, Content]) -> Iterator[tuple[int, Any]]:
        """(client, Answer) as they come, in any order; a client may be absent."""

    def drive(self, work: Callable[[], None]) -> None:
        """Does `work`, which asks, while the engine runs."""

    def client_states(self) -> dict[int, ClientState]:
        """What every client keeps between rounds; empty where clients keep it on their own disks."""

    def restore_client_states(self, states: Mapping[int, ClientState]) -> None:
        """Gives clients back what `client_states` gave."""

    def revert(self, client: int) -> None:
        """Has the client keep what it kept before this round's training, whose reply was refused."""

    def close(self) -> None:
        """Ends what the engine began."""


class PostalEngine(Engine, Protocol):
    """An engine that can be asked without waiting for the answers."""

    def send(self, kind: Kind, contents: Mapping[int, Content]) -> None:
        """Asks."""

    def collect(self) -> Iterator[tuple[int, Any]]:
        """(client, Answer) of those that have answered since, in the order in which they came; in the end of all."""


def too_long(size: int, content: Content) -> Failure | None:
    """The failure of an answer whose message has `size` bytes, where that is more than what was asked for can have."""
    most = content.most_bytes if isinstance(content, Instruction) else MOST_WORDS
    return None if most is None or size <= most else Failure(f"its message has {size:,} bytes, of which {most:,} are taken")


def exchange(engine: Engine, kind: Kind, contents: Mapping[int, Content]) -> Iterator[tuple[int, Any]]:
    """(client, Answer) of all clients of `contents` in the order of their ids, each as soon as it is its turn."""
    waiting: dict[int, Any] = {}
    turns = iter(sorted(contents))
    turn = next(turns, None)
    for client, answer in engine.ask(kind, contents) if contents else ():
        waiting.setdefault(client, answer)
        while turn in waiting:
            yield turn, waiting[turn]
            waiting[turn], turn = None, next(turns, None)
    while turn is not None:
        yield turn, waiting.get(turn, Failure("it gave no answer"))
        turn = next(turns, None)


@dataclass(eq=False)
class Assignment:
    """What one client was sent this round."""

    client: Client
    plan: Plan
    source: State  # what the plan was taken from
    state: State
    travels: State  # of `state`, what crosses the network
    up: frozenset[str]  # the tensors that are to come back
    personal: bool  # whether its model is not just a part of the global one
    lasting: frozenset[str] | None = None  # of those that do not come back, which the client keeps (None: all)
    extras: State = field(default_factory=dict)
    encoded: State = field(default_factory=dict)  # what travels in place of some of `travels`
    arrived: State = field(default_factory=dict)  # these, as the client then has them
    steps: int = 0  # of training, where they are fewer than the options say

    @property
    def bytes(self) -> int:
        """Bytes of the download as it is encoded."""
        plain, masks = {n: t for n, t in self.travels.items() if n not in self.arrived}, self.plan.masks
        positions = sum(encoding.mask_bytes(name, masks[name]) for name in self.arrived if name in masks)
        return positions + encoding.payload_bytes(plain, masks, self.encoded, self.extras)

    def instruction(self, kind: Kind, round: int, local: bool, state_version: int) -> Instruction:
        """The message of `kind`, which has the client train, measure statistics or evaluate what it is sent."""
        plan, train = self.plan, kind == "train"
        up = None if len(self.up) == len(self.state) or not train else self.up
        extras, encoded = (self.extras, self.encoded) if train else ({}, {})
        state = {n: t for n, t in self.travels.items() if n not in self.arrived} if encoded else self.travels
        return Instruction(
            round, state, dict(plan.sizes), plan.model, plan.masks, extras, up, local=local, state_version=state_version,
            most_bytes=MOST_WORDS + (0 if kind == "evaluate" else 2 * sum(t.nbytes for t in self.state.values())),
            steps=self.steps if train else 0, encoded=encoded, lasting=self.lasting if train else None,
        )  # fmt: skip
