"""What a client keeps between rounds, on its own disk: a version for each round, so that a server that goes back finds its own."""

from __future__ import annotations

from pathlib import Path

from hetfl.files import write_file
from hetfl.models.state import join_states, pack_tensors, split_states, unpack_tensors
from hetfl.rounds.messages import ClientState

VERSIONS = 4  # that stay of the rounds up to now, and up to each checkpoint, beside the one in use


class StateLostError(Exception):
    """The server counts on a state that is not there."""


class ClientStateStore:
    """The state of one client in `folder`: files named after the round that left them, for their owner's eyes alone.

    `every` and `keep`: of how many rounds the server has a checkpoint (0: none), and how many of these it may go back to.
    """

    def __init__(self, folder: Path, every: int, keep: int) -> None:
        self._folder, self._every, self._keep = folder, every, keep

    def load(self, round: int) -> ClientState:
        """What the client kept after `round` (0: nothing). Raises StateLostError."""
        if round == 0:
            return {}
        try:
            return split_states(unpack_tensors((self._folder / f"{round:06d}.safetensors").read_bytes()))
        except Exception as error:
            raise StateLostError(f"the client's memory of round {round} is not there") from error

    def save(self, round: int, before: int, state: ClientState) -> None:
        """Keeps what the client has after `round`; `before` is the round whose state it began with."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_file(self._folder / f"{round:06d}.safetensors", pack_tensors(join_states(state)), private=True)
        versions = {int(path.stem): path for path in self._folder.glob("*.safetensors")}
        last = (round - 1) // self._every if self._every else 0
        marks = [round - 1, *(number * self._every for number in range(last, max(last - self._keep, 0), -1))]
        wanted = {number for mark in marks for number in sorted(n for n in versions if n <= mark)[-VERSIONS:]}
        for number in versions.keys() - {round, before, *wanted}:
            versions[number].unlink(missing_ok=True)
