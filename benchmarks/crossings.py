"""Calls that cross a file of hetfl in one warm round of one client: `python benchmarks/crossings.py`.

A measure of how far a reader has to travel: heterofl x overlap on the local engine, the second round, server and client together.
"""

from __future__ import annotations

import dis
import sys
import threading
from collections import Counter
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import hetfl
from hetfl.config import resolve
from hetfl.rounds.loop import run_round
from hetfl.rounds.reporting import NoCallback
from hetfl.runs.experiment import prepare

HOME = Path(hetfl.__file__).resolve().parents[1]
FOLDERS = ("core", "plugins")
OPTIONS = {"extract": "heterofl", "aggregate": "overlap", "clients": 1, "limit": 200, "rounds": 9, "levels": "1", "workers": 1}


def name_of(frame: FrameType | None) -> str | None:
    """The file of a frame within hetfl, or None."""
    if frame is None:
        return None
    path = Path(frame.f_code.co_filename).resolve()
    inside = path.is_relative_to(HOME) and path.relative_to(HOME).parts[0] in FOLDERS
    return str(path.relative_to(HOME)) if inside else None


@cache
def begins_at(code: CodeType) -> int:
    """The offset at which a call of `code` begins; a generator that goes on does so further down."""
    return next((i.offset for i in dis.get_instructions(code) if i.opname == "RESUME"), 0)


def count_crossings() -> Counter[tuple[str, str]]:
    """(caller's file, callee's file) -> calls, in all threads; frames of other packages between the two are looked through."""
    found: Counter[tuple[str, str]] = Counter()
    counting = False

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if not counting or event != "call" or frame.f_lasti > begins_at(frame.f_code) or frame.f_code.co_name.startswith("<"):
            return
        callee, back = name_of(frame), frame.f_back
        while back is not None and name_of(back) is None:
            back = back.f_back
        caller = name_of(back)
        if callee is not None and caller is not None and caller != callee:
            found[caller, callee] += 1

    threading.setprofile(watch)
    sys.setprofile(watch)
    made = prepare(resolve(OPTIONS), NoCallback())
    run_round(made.state, 1, made.engine)
    counting = True
    run_round(made.state, 2, made.engine)
    counting = False
    sys.setprofile(None)
    threading.setprofile(None)
    made.close()
    return found


def main() -> None:
    found = count_crossings()
    for (caller, callee), count in found.most_common(25):
        print(f"{count:4d}  {caller} -> {callee}")
    files = {file for edge in found for file in edge}
    print(f"{sum(found.values())} calls cross a file, over {len(files)} files and {len(found)} edges")


if __name__ == "__main__":
    main()
