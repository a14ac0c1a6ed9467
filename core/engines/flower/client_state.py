"""What a client keeps between rounds, on its own disk: a version for each round, so that a server that goes back finds its own."""

from __future__ import annotations

from pathlib import Path

from hetfl.files import write_file
from hetfl.models.state import join_states, pack_tensors, split_states, unpack_tensors
from hetfl.rounds.messages import ClientState

VERSIONS = 4  # that stay, beside the one in use


class StateLostError(Exception):
    """The server counts on a state that is not there."""


class ClientStateStore:
    """The state of one client in `folder`: files named after the round that left them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

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
        write_file(self._folder / f"{round:06d}.safetensors", pack_tensors(join_states(state)))
        versions = {int(path.stem): path for path in self._folder.glob("*.safetensors")}
        older = sorted(number for number in versions if number < round)
        for number in versions.keys() - {round, before, *older[-VERSIONS:]}:
            versions[number].unlink(missing_ok=True)
