"""What passes between processes of one run, as bytes: calls, answers, data."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hetfl.engines.local import Call
from hetfl.models.frozen import frozen
from hetfl.parallel import return_free_memory
from hetfl.rounds.client import ClientRuntime
from hetfl.rounds.messages import Answer, ClientState, Content, Failure, Kind, too_long

LARGE = 1 << 16  # bytes from which an array is a buffer of its own
ALIGNED = 64  # bytes at multiples of which arrays begin in a file

Packed = tuple[bytes, list[Any]]  # a pickle, and the large arrays in it as uint8 arrays
Mapped = tuple[Path, list[tuple[int, int]]]  # the same in a file: where each array begins and its bytes, the pickle last


class TensorPickler(pickle.Pickler):
    """Pickles a tensor as its own entries alone, whatever storage it is a view of, and without shared memory."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            return torch.from_numpy, (obj.detach().cpu().contiguous().numpy(),)
        return NotImplemented


class ModelPickler(TensorPickler):
    """Pickles a module whose tensors keep type and memory layout."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return NotImplemented
        strides = obj.stride()
        order = sorted(range(obj.ndim), key=lambda dim: -strides[dim])
        dense = obj.detach().cpu().permute(order).contiguous()
        entries = dense.reshape(-1).view(torch.uint8).numpy()
        trained = obj.requires_grad if isinstance(obj, nn.Parameter) else None
        return rebuild_tensor, (entries, obj.dtype, tuple(dense.shape), order, trained)


def rebuild_tensor(entries: Any, dtype: torch.dtype, shape: Sequence[int], order: Sequence[int], trained: bool | None) -> Tensor:
    """A tensor on the memory of `entries` (bytes), whose dims lie there in `order`; a parameter where `trained` is known."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # it is shared; nobody writes to it
        flat = torch.from_numpy(entries).view(dtype)
    tensor = flat.reshape(shape).permute([list(order).index(dim) for dim in range(len(order))])
    return tensor if trained is None else nn.Parameter(tensor, trained)


def to_bytes(value: object) -> bytes:
    """`value` as bytes for another process of this run."""
    buffer = io.BytesIO()
    TensorPickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def pack(value: object, pickler: type[pickle.Pickler] = TensorPickler) -> Packed:
    """`value` with its large arrays apart, uncopied, so that processes of one machine can share them."""
    buffer, large = io.BytesIO(), list[Any]()

    def stays_within(part: pickle.PickleBuffer) -> bool:
        raw = part.raw()
        if raw.nbytes < LARGE:
            return True
        large.append(np.frombuffer(raw, dtype=np.uint8))
        return False

    pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL, buffer_callback=stays_within).dump(value)
    return buffer.getvalue(), large


def unpack(packed: Packed) -> Any:
    """The inverse of `pack`; large arrays are where they were, and are not to be written to."""
    return pickle.loads(packed[0], buffers=packed[1])


def pack_based(model: nn.Module) -> Packed | None:
    """`model` for processes that are to share its frozen base; None where it has none, or is no module that can be pickled."""
    try:
        packed = pack(model, ModelPickler) if frozen(model) else None
        if packed is not None:
            unpack(packed)
    except Exception:  # whatever a module raises; then every process builds its own
        return None
    return packed


def rest_on(model: nn.Module, other: nn.Module) -> None:
    """Has the frozen tensors of `model` lie where those of `other`, its copy, do: what they took is free."""
    theirs = frozen(other)
    for name, tensor in frozen(model).items():
        there = theirs[name]
        tensor.set_(there.untyped_storage(), there.storage_offset(), there.size(), there.stride())
    return_free_memory()


def write_packed(packed: Packed, path: Path) -> Mapped:
    """Writes what `map_packed` reads: the large arrays, then the pickle."""
    places = list[tuple[int, int]]()
    with path.open("wb") as file:
        for part in (*packed[1], packed[0]):
            file.write(bytes(-file.tell() % ALIGNED))
            places.append((file.tell(), len(part)))
            file.write(part)
    return path, places


def map_packed(mapped: Mapped) -> Packed:
    """What `write_packed` wrote; all processes that read it have the large arrays once."""
    path, places = mapped
    whole = np.memmap(path, np.uint8, mode="c")
    *large, data = (whole[start : start + length] for start, length in places)
    return data.tobytes(), large


def answer_in_bytes(runtime: ClientRuntime, kind: Kind, client: int, content: Content, state: ClientState) -> tuple[bytes, bytes]:
    """What a client answers, a Failure where it raises, and what it keeps."""
    found: Answer
    try:
        found = runtime.answer(kind, client, content, state)
    except (Exception, SystemExit) as error:
        found = Failure.of(error)
    return to_bytes(found), to_bytes(state)


def read_answer(answered: tuple[bytes, bytes], call: Call) -> Answer:
    """The answer that `answer_in_bytes` gives, with what the client keeps put into the call; a Failure where it is too long."""
    reply, kept = answered
    if (failure := too_long(len(reply), call.content)) is not None:
        return failure
    call.state = pickle.loads(kept)
    return pickle.loads(reply)  # type: ignore[no-any-return]
