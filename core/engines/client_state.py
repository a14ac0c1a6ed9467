"""What a client remembers, on its own disk: a version for each round, so that a server that goes back finds the right one."""

from __future__ import annotations

from pathlib import Path

from flwr.app import ArrayRecord, RecordDict

from hetfl.files import write_file
from hetfl.models.state import pack_tensors, unpack_tensors

VERSIONS = 4  # that stay, beside the one in use


class StateLostError(Exception):
    """The server counts on a memory that is not there."""


class ClientStateStore:
    """The memory of one client in `folder`: files named after the round that they were left by."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, round: int) -> RecordDict:
        """What the client knew after `round` (0: nothing). Raises ForgottenError."""
        if round == 0:
            return RecordDict()
        try:
            tensors = unpack_tensors((self._folder / f"{round:06d}.safetensors").read_bytes())
        except Exception as error:
            raise StateLostError(f"the client's memory of round {round} is not there") from error
        records: dict[str, dict[str, object]] = {}
        for key, tensor in tensors.items():
            record, name = key.split("/", 1)
            records.setdefault(record, {})[name] = tensor
        return RecordDict({record: ArrayRecord(group) for record, group in records.items()})

    def save(self, round: int, before: int, state: RecordDict) -> None:
        """Keeps what the client knows after `round`; `before` is the round whose memory it began with."""
        self._folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{name}/{key}": t for name, r in state.array_records.items() for key, t in r.to_torch_state_dict().items()}
        write_file(self._folder / f"{round:06d}.safetensors", pack_tensors(tensors))
        versions = {int(path.stem): path for path in self._folder.glob("*.safetensors")}
        older = sorted(number for number in versions if number < round)
        for number in versions.keys() - {round, before, *older[-VERSIONS:]}:
            versions[number].unlink(missing_ok=True)
