"""Messages as Flower records: what crosses process and network boundaries, and the checks before any of it is believed.

A message holds one ArrayRecord, the tensors of the model, and one ConfigRecord with everything else, so that Flower's own client
mods can work on it. Nothing is unpickled or evaluated, and no more memory is taken than the message itself has bytes (a mask
takes a byte for each of its bits).
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from numpy.lib import format as npy
from torch import Tensor

from hetfl.models.state import State
from hetfl.profiling.node import Profile
from hetfl.rounds.messages import Instruction
from hetfl.submodel import encoding
from hetfl.training.task import Reply

DTYPES = {str(dtype).removeprefix("torch.") for dtype in encoding.TRAVELS}

LONGEST = 10_000  # characters of an array's header

Values = dict[str, Any]


class MalformedError(ValueError):
    """A message that is not what it should be; the text says why."""


class RecordCodec:
    """Writes what passes between server and client as Flower records, and reads it.

    Empty texts are left out, for Flower's mods fail on them.
    """

    def encode(self, content: object) -> RecordDict:
        """The records of a message that carries `content`."""
        for kind, write, _ in FORMS.values():
            if isinstance(content, kind):
                return write(content)
        raise TypeError(f"{type(content).__name__} does not travel")

    def decode(self, content: RecordDict) -> Any:
        """What the records of a message carry. Raises MalformedError."""
        try:
            config = content["config"]
            assert isinstance(config, ConfigRecord)
            return FORMS[str(config["form"])][2](content)
        except MalformedError:
            raise
        except Exception as error:
            raise MalformedError(
                f"the message cannot be read: {' '.join(str(error).split())[:200] or type(error).__name__}"
            ) from error

    def pack(self, reply: Reply, masks: Mapping[str, Tensor]) -> Reply:
        """The reply with only the values that exist of tensors with a mask."""
        names = masks.keys() & reply.state.keys()
        return replace(reply, state=encoding.select_existing(reply.state, {n: masks[n] for n in names}), packed=frozenset(names))


def encode_array(tensor: Tensor) -> bytes:
    """A tensor in numpy's .npy form."""
    buffer = io.BytesIO()
    npy.write_array(buffer, tensor.detach().cpu().contiguous().numpy(), allow_pickle=False)
    return buffer.getvalue()


def decode_array(data: Any) -> Tensor:
    """The inverse of `encode_array`. Raises MalformedError; what the header claims is checked against the bytes that are there."""
    stream = io.BytesIO(data)
    try:
        version = npy.read_magic(stream)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, fortran, dtype = read(stream, max_header_size=LONGEST)
    except Exception as error:
        raise MalformedError("an array has no readable header") from error
    if dtype.name not in DTYPES or not dtype.isnative or min(shape, default=0) < 0:
        raise MalformedError(f"an array is of type {dtype}, which does not travel")
    if math.prod(shape) * dtype.itemsize != len(data) - stream.tell():
        raise MalformedError(f"an array claims the shape {shape}, but has {len(data) - stream.tell()} bytes")
    flat = np.frombuffer(data, dtype, offset=stream.tell()).copy()
    return torch.from_numpy(flat.reshape(shape[::-1]).T.copy() if fortran else flat.reshape(shape))


def message(config: Values, state: State | None = None) -> RecordDict:
    records: Any = {"config": ConfigRecord(config)}
    return RecordDict(
        records if state is None else {"arrays": ArrayRecord({n: t.contiguous() for n, t in state.items()}), **records}
    )


def count_bytes(content: RecordDict) -> int:
    """Bytes of the arrays, texts and byte strings of a message, before any of it is read."""
    arrays = sum(len(array.data) for record in content.array_records.values() for array in record.values())
    values = [value for record in content.config_records.values() for value in record.values()]
    return arrays + sum(len(value) if isinstance(value, bytes | str) else 8 for value in values)


def config(content: RecordDict) -> Values:
    return dict(content.config_records["config"])


def arrays(content: RecordDict) -> State:
    return {name: decode_array(array.data) for name, array in content.array_records["arrays"].items()}


def write_group(prefix: str, tensors: Mapping[str, Tensor]) -> Values:
    """Tensors that do not belong to the model, as bytes."""
    return {f"{prefix}/{name}": encode_array(tensor) for name, tensor in tensors.items()}


def read_group(prefix: str, values: Values) -> State:
    return {key.split("/", 1)[1]: decode_array(value) for key, value in values.items() if key.startswith(prefix + "/")}


def read_masks(values: Values) -> State:
    """Masks from their bits; a shape that asks for more bits than are there is refused."""
    shapes = json.loads(values.get("shapes", "{}"))
    bits, found = read_group("mask", values), dict[str, Tensor]()
    for name, packed in bits.items():
        shape = tuple(int(n) for n in shapes[name])
        if min(shape, default=0) < 0 or packed.dtype != torch.uint8 or len(packed) != math.ceil(math.prod(shape) / 8):
            raise MalformedError(f"the mask of {name} has {packed.numel()} bytes for the shape {shape}")
        found[name] = encoding.unpack_bits(packed, shape)
    return found


def write_masks(masks: State) -> Values:
    shapes = json.dumps({name: list(mask.shape) for name, mask in masks.items()})
    return (
        {"shapes": shapes, **write_group("mask", {name: encoding.pack_bits(mask) for name, mask in masks.items()})} if masks else {}
    )


def write_instruction(sent: Instruction) -> RecordDict:
    values: Values = {"form": "instruction", "round": sent.round, "held": sent.held, "local": sent.local}
    values |= {"state_version": sent.state_version, **({"model": sent.model} if sent.model else {})}
    values |= {"steps": sent.steps} if sent.steps else {}
    values |= {} if sent.sizes is None else {"sizes": json.dumps(sent.sizes)}
    names = {"up": sent.up, "lasting": sent.lasting}
    values |= {key: json.dumps(sorted(given)) for key, given in names.items() if given is not None}
    values |= {**write_masks(sent.masks), **write_group("extra", sent.extras), **write_group("encoded", sent.encoded)}
    return message(values, encoding.select_existing(sent.state, sent.masks))


def read_instruction(content: RecordDict) -> Instruction:
    values = config(content)
    masks = read_masks(values)
    up, lasting = (frozenset(json.loads(values[key])) if key in values else None for key in ("up", "lasting"))
    return Instruction(
        int(values["round"]), encoding.fill_masked(arrays(content), masks),
        {str(k): int(v) for k, v in json.loads(values["sizes"]).items()} if "sizes" in values else None,
        values.get("model"), masks, read_group("extra", values), up,
        bool(values["held"]), bool(values["local"]), int(values["state_version"]),
        steps=int(values.get("steps", 0)), encoded=read_group("encoded", values), lasting=lasting,
    )  # fmt: skip


def write_reply(reply: Reply) -> RecordDict:
    values: Values = {"form": "reply", "examples": int(reply.examples), "values": json.dumps(sorted(reply.packed))}
    values |= {f"metric/{name}": float(value) for name, value in reply.metrics.items()}
    values |= {**write_masks(reply.masks), **write_group("kept", reply.kept)}
    return message({**values, **write_group("extra", reply.extras), **write_group("encoded", reply.encoded)}, reply.state)


def read_reply(content: RecordDict) -> Reply:
    values = config(content)
    metrics = {key.split("/", 1)[1]: float(value) for key, value in values.items() if key.startswith("metric/")}
    return Reply(
        arrays(content), int(values["examples"]), metrics,
        read_group("extra", values), read_group("kept", values), read_masks(values),
        frozenset(map(str, json.loads(values["values"]))), read_group("encoded", values),
    )  # fmt: skip


def write_scores(scores: dict[str, float]) -> RecordDict:
    return message({"form": "scores", **{f"metric/{name}": float(value) for name, value in scores.items()}})


def read_scores(content: RecordDict) -> dict[str, float]:
    return {key.split("/", 1)[1]: float(value) for key, value in config(content).items() if key.startswith("metric/")}


def add_next_profile(content: RecordDict, round: int, profile: Profile) -> None:
    """Has a message say beside what it says what its client affords in the coming `round`."""
    values = content.config_records["config"]
    values["next/round"], values["next/width"] = round, float(profile.width)
    if profile.bottleneck:
        values["next/bottleneck"] = profile.bottleneck


def read_next_profile(content: RecordDict) -> tuple[int, Profile] | None:
    """The round and what the client affords in it, as `add_next_profile` wrote it; None where a message does not say so."""
    try:
        values = config(content)
        return int(values["next/round"]), Profile(float(values["next/width"]), str(values.get("next/bottleneck", "")))
    except (LookupError, TypeError, ValueError, OverflowError):
        return None


FORMS: dict[str, tuple[type, Callable[[Any], RecordDict], Callable[[RecordDict], Any]]] = {
    "round": (int, lambda n: message({"form": "round", "round": n}), lambda c: int(config(c)["round"])),
    "profile": (
        Profile,
        lambda p: message({"form": "profile", "width": float(p.width), **({"bottleneck": p.bottleneck} if p.bottleneck else {})}),
        lambda c: Profile(float(config(c)["width"]), str(config(c).get("bottleneck", ""))),
    ),
    "instruction": (Instruction, write_instruction, read_instruction),
    "reply": (Reply, write_reply, read_reply),
    "scores": (dict, write_scores, read_scores),
}
