"""What passes between processes of one run, as bytes: calls, answers, data."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetfl.engines.local import Call
from hetfl.rounds.client import ClientRuntime
from hetfl.rounds.messages import Answer, ClientState, Content, Failure, Kind, too_long

LARGE = 1 << 16  # bytes from which an array is a buffer of its own

Packed = tuple[bytes, list[Any]]  # a pickle, and the large arrays in it as uint8 arrays


class TensorPickler(pickle.Pickler):
    """Pickles a tensor as its own entries alone, whatever storage it is a view of, and without shared memory."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            return torch.from_numpy, (obj.detach().cpu().contiguous().numpy(),)
        return NotImplemented


def to_bytes(value: object) -> bytes:
    """`value` as bytes for another process of this run."""
    buffer = io.BytesIO()
    TensorPickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def pack(value: object) -> Packed:
    """`value` with its large arrays apart, uncopied, so that processes of one machine can share them."""
    buffer, large = io.BytesIO(), list[Any]()

    def stays_within(part: pickle.PickleBuffer) -> bool:
        raw = part.raw()
        if raw.nbytes < LARGE:
            return True
        large.append(np.frombuffer(raw, dtype=np.uint8))
        return False

    TensorPickler(buffer, protocol=pickle.HIGHEST_PROTOCOL, buffer_callback=stays_within).dump(value)
    return buffer.getvalue(), large


def unpack(packed: Packed) -> Any:
    """The inverse of `pack`; large arrays are where they were, and are not to be written to."""
    return pickle.loads(packed[0], buffers=packed[1])


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
