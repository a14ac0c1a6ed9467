"""Writes presets.md: `python docs/presets.py`."""

from __future__ import annotations

from pathlib import Path

from hetfl.presets import presets

PAGE = Path(__file__).with_name("presets.md")


def text() -> str:
    """The page."""
    head = [
        "# Presets",
        "",
        "Generated from plugins/presets.toml by `python docs/presets.py`. None of them was run to its end by us",
        "unless [results](results.md) or [the published tables](reproduction.md) say so.",
        "",
    ]
    rows = [
        f"| `{p.name}` | {p.about} | {p.unlike} | `{p.digest[:12]}` |" for p in sorted(presets().values(), key=lambda p: p.name)
    ]
    return "\n".join([*head, "| preset | what | unlike the paper | sha256 |", "|---|---|---|---|", *rows]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(text())
