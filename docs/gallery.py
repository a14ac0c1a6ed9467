"""Plays the recipes of gallery.md and writes what their commands print: `python docs/gallery.py`.

A block of `sh` holds commands (hfl, and cd), one of `python` is executed, or written to the file that its first line names
(`# my_net.py`); the block of `text` after one of these is what that printed. All recipes are played in one folder, in their order.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hetfl.cli.console import console
from hetfl.cli.main import main

PAGE = Path(__file__).with_name("gallery.md")

BLOCK = re.compile(r"^```(sh|python|text)\n(.*?)^```$", re.S | re.M)

WIDTH = 100  # columns


def recipes() -> list[tuple[str, list[tuple[str, str]]]]:
    """The recipes: their titles, and their blocks as (language, text)."""
    parts = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]
    return [(part.splitlines()[0], [(m[1], m[2]) for m in BLOCK.finditer(part)]) for part in parts]


def play(blocks: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Plays a recipe in the current folder; yields what each text block shows and what was printed instead."""
    printed = ""
    for language, text in blocks:
        if language == "text":
            yield text, printed
            continue
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            run_commands(text) if language == "sh" else run_python(text)
        printed = "".join(f"{line.rstrip()}\n" for line in said.getvalue().strip("\n").splitlines())


def run_commands(text: str) -> None:
    """The lines of a block of commands, in this process. Raises RuntimeError where one ends with another code than 0."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["cd"]:
            os.chdir(words[1])
        elif words:
            assert words[0] == "hfl", line
            try:
                main(words[1:])
            except SystemExit as ended:
                if ended.code:
                    raise RuntimeError(f"{line}: exit code {ended.code}") from ended


def run_python(text: str) -> None:
    """Writes a block to the file that it names, or executes it."""
    named = re.match(r"# (\S+\.py)\n", text)
    if named:
        Path(named[1]).write_text(text, encoding="utf-8")
    else:
        exec(compile(text, str(PAGE), "exec"), {"__name__": "gallery"})


@contextlib.contextmanager
def kitchen(place: Path) -> Iterator[None]:
    """The current folder, the path of imports and the width of the terminal while recipes are played in `place`."""
    before, path, width = Path.cwd(), list(sys.path), console.width
    os.chdir(place)
    sys.path[:] = [str(place), *(folder for folder in path if Path(folder) != PAGE.parent)]  # datasets.py here hides a library
    console.width = WIDTH
    try:
        yield
    finally:
        os.chdir(before)
        sys.path[:] = path
        console.width = width


def write() -> None:
    """Puts what is printed into the page."""
    page = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as place, kitchen(Path(place)):
        for title, blocks in recipes():
            os.chdir(place)
            sys.stderr.write(f"{title}\n")
            for shown, printed in play(blocks):
                page = page.replace(f"```text\n{shown}```", f"```text\n{printed}```", 1)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    write()
