"""What codecs that take an update tensor by tensor have in common, error feedback among it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import ClassVar

import torch
from torch import Generator, Tensor

from hetfl import ExtraSpec, Field, Plan, Plugin, Server, State, Task, hookimpl

PLACES = "codec places"  # the extra that tells a client's plans apart
SMALL = 128  # entries up to which a tensor travels as it is: the headers of a code's parts would be larger than what it saves


class TensorCodec(Plugin):
    """Base of a codec: `compress` says what travels in place of a tensor, `restore` what that stands for.

    With `feedback`, what was lost in a round is added to the client's next update (Seide et al., Interspeech 2014; Karimireddy et
    al., ICML 2019) as long as its plan stays the same: a submodel of other channels has nothing to make up for.
    """

    PARTS: ClassVar[tuple[str, ...]]  # names of what travels beside the tensor's own name
    extras_down: ClassVar[dict[str, ExtraSpec]] = {PLACES: ExtraSpec(1, torch.int64, 0)}

    feedback: bool = Field(False, description="what is lost in a round is added to the client's next update")

    def compress(self, values: Tensor, generator: Generator) -> State:
        """What travels in place of `values` (float32, any shape): under "" and the names in `PARTS`."""
        raise NotImplementedError

    def restore(self, parts: State, size: int) -> Tensor:
        """The values (number,) that `parts` stand for; the update had `size` entries. Raises ValueError."""
        raise NotImplementedError

    @property
    def inactive_hooks(self) -> Collection[str]:
        return () if self.feedback else ("client_extras",)

    @hookimpl
    def client_extras(self, server: Server, plan: Plan) -> State:
        return {PLACES: fingerprint(server, plan)} if self.feedback else {}

    @hookimpl
    def encode(self, task: Task, update: State, sent: State) -> State:
        kind = type(self).__name__
        encoded, generator, lost = dict(update), task.stream(kind), self._recall(task, kind)
        for name in sent:
            if not update[name].is_floating_point():
                raise ValueError(
                    f"a codec is left no numbers of {name} by the one inside it: give {kind.lower()} as a later --wrap"
                )
            if update[name].dtype != torch.float32 or update[name].numel() <= SMALL:
                continue
            values, makes_up = update[name], self.feedback and update[name].shape == sent[name].shape
            if makes_up and name in lost and lost[name].shape == values.shape:
                values = values + lost[name]
            parts = self.compress(values, generator)
            encoded |= {join(name, part): t for part, t in parts.items()}
            if makes_up:
                arrives = self.restore(parts, values.numel()).view(values.shape)
                task.client_state[f"{kind}/{name}"] = values - arrives
        return encoded

    def _recall(self, task: Task, kind: str) -> State:
        """What this client has to make up for, by tensor; nothing where its plan is not that of its last round."""
        if not self.feedback:
            return {}
        places, of = task.extras[PLACES], f"{kind}/"
        lost = {key.removeprefix(of): task.client_state.pop(key) for key in [*task.client_state] if key.startswith(of)}
        before = task.client_state.get(PLACES)
        task.client_state[PLACES] = places
        return lost if before is not None and torch.equal(before, places) else {}

    @hookimpl
    def decode(self, encoded: State, sent: State) -> State:
        found = dict(encoded)
        for name in [n for n in encoded if n in sent and join(n, self.PARTS[0]) in encoded]:
            parts = {part: found.pop(join(name, part)) for part in ("", *self.PARTS)}
            values = self.restore(parts, sent[name].numel())
            found[name] = values.view(sent[name].shape) if values.numel() == sent[name].numel() else values
        return found


def join(name: str, part: str) -> str:
    """The name under which a part of tensor `name` travels."""
    return f"{name}/{part}" if part else name


def fingerprint(server: Server, plan: Plan) -> Tensor:
    """A number, int64 (), that is another one where the plan takes other entries of the global model, or in another order."""
    digest = hashlib.blake2b(digest_size=8)
    for name, patch in plan.put(dict.fromkeys(server.state, torch.empty(0))).items():
        digest.update(name.encode())
        for dim, positions in sorted(patch.index.items()):
            digest.update(f"/{dim}/".encode() + positions.numpy().tobytes())
        digest.update(b"" if patch.coverage is None else patch.coverage.numpy().tobytes())
    return torch.tensor(int.from_bytes(digest.digest(), "big", signed=True))
