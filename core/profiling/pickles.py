"""Plain values out of a pickle of unknown origin: numbers, text, lists, tuples, dicts; what would run code is refused, not run."""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any, cast

from hetfl.errors import UsageError

READ_AS_THEY_ARE = {  # opcodes whose argument is the value
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING",
}  # fmt: skip
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple,
}  # fmt: skip
NOTHING = {"PROTO", "FRAME", "STOP"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
MARK = object()


def read_plain_pickle(data: bytes) -> Any:
    """The value of a pickle that holds plain values only. Raises UsageError for one that holds anything else, or is none.

    pickletools names the opcodes and executes none; those for classes, functions and calls are not among the ones known here.
    """
    try:
        return interpret(data)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"it is no whole pickle: {error or type(error).__name__}") from error


def interpret(data: bytes) -> Any:
    """What the opcodes make."""
    stack, memo = list[Any](), dict[int, Any]()
    for opcode, given, _ in pickletools.genops(data):
        name, arg = opcode.name, cast(Any, given)
        if name in READ_AS_THEY_ARE:
            stack.append(arg)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name]())
        elif name == "MARK":
            stack.append(MARK)
        elif name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if arg is None else int(arg)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(arg)])
        elif name in TUPLES:
            stack[-TUPLES[name] :] = [tuple(stack[-TUPLES[name] :])]
        elif name in GATHER:
            GATHER[name](stack)
        elif name not in NOTHING:
            shown = name if arg is None else f"{name} {arg}"
            raise UsageError(f"it holds more than numbers, text, lists and dicts ({shown:.60}), so it is not read")
    (value,) = stack
    if value is MARK:
        raise ValueError("it ends within a list")
    return value


def pop_marked(stack: list[Any]) -> list[Any]:
    """What lies above the last mark, which goes too."""
    place = len(stack) - 1 - next(i for i, each in enumerate(reversed(stack)) if each is MARK)
    found = stack[place + 1 :]
    del stack[place:]
    return found


def pair(flat: list[Any]) -> dict[Any, Any]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def extend(stack: list[Any], more: list[Any]) -> None:
    stack[-1] += more


def update(stack: list[Any], more: list[Any]) -> None:
    stack[-1].update(pair(more))


def pop(stack: list[Any], count: int) -> list[Any]:
    found = stack[-count:]
    del stack[-count:]
    return found


GATHER: dict[str, Callable[[list[Any]], None]] = {
    "LIST": lambda stack: stack.append(pop_marked(stack)),
    "TUPLE": lambda stack: stack.append(tuple(pop_marked(stack))),
    "DICT": lambda stack: stack.append(pair(pop_marked(stack))),
    "APPEND": lambda stack: extend(stack, pop(stack, 1)),
    "APPENDS": lambda stack: extend(stack, pop_marked(stack)),
    "SETITEM": lambda stack: update(stack, pop(stack, 2)),
    "SETITEMS": lambda stack: update(stack, pop_marked(stack)),
}
