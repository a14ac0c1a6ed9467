"""The terminal. Text that others wrote (paths, error messages, plugin options) is printed as it is: never read as markup, and
without control characters."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console
from rich.text import Text

# ANSI sequences, then C0 and C1 control characters but tab and newline, then what turns the direction of writing, then
# halves of characters, which no stream takes (a name that is not in UTF-8 has them)
CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str) -> str:
    """`text` without control characters."""
    return CONTROL.sub("", text)


def plain_text(text: str, style: str = "") -> Text:
    """`text` in a style, for what is put together from several lines."""
    return Text(clean(text), style)


class PlainConsole(Console):
    """A console that reads no markup and no emoji codes in strings, and prints no control characters of theirs."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:  # strings come through here, those in tables too
        return super().render_str(clean(text), **options)


console = PlainConsole()

errors = PlainConsole(stderr=True, soft_wrap=True)


def say(text: str, style: str = "") -> None:
    """One line, however long, so that it can be searched and copied."""
    console.print(text, style=style, soft_wrap=True)


def complain(text: str) -> None:
    """One error sentence on stderr."""
    errors.print(f"hfl: {text}", style="red")
