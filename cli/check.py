"""`hfl check`: whether a plugin does what every plugin must."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hetfl.cli.console import clean, say
from hetfl.cli.options import Debug, ModelArgs, parse_pairs
from hetfl.cli.show import find_in_any_role
from hetfl.errors import RunError, UsageError, nearest

if TYPE_CHECKING:
    from hetfl.testing.report import Report, Result
    from hetfl.testing.subject import Oracle

LOOKS = {"passed": "green", "failed": "bold red", "expected": "yellow", "skipped": "yellow"}

NEXT = {"NONE": "bronze", "BRONZE": "silver", "SILVER": "gold"}


def check(
    name: Annotated[str, typer.Argument(help="a plugin's name, role.name or package.module:Class")],
    set: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="options of plugins; may be repeated")] = None,
    model: Annotated[str | None, typer.Option(help="the model of the small runs (default: an mlp of 8 and 6 units)")] = None,
    model_args: ModelArgs = None,
    only: Annotated[str, typer.Option(help="names of checks with commas (default: all)")] = "",
    expect: Annotated[
        list[str] | None, typer.Option(metavar="CHECK=REASON", help="a check that must fail, and why; may be repeated")
    ] = None,
    oracle: Annotated[
        list[str] | None, typer.Option(help="module:function that raises AssertionError, or a file of tests; may be repeated")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object a role and nothing else")] = False,
    debug: Debug = False,
) -> None:
    """Check a plugin by what it does in small runs: how many checks ran, which failed, and its tier."""
    given: dict[str, Any] = {"set": parse_pairs(set or [], "--set")}
    if model is not None:
        given |= {"model": model, "model_args": parse_pairs(model_args or [], "--model-args")}
    expected = dict(parse_reason(text) for text in expect or [])
    oracles = [find_oracle(text) for text in oracle or []]
    entries = find_in_any_role(name)
    from hetfl.testing.report import check_plugin
    from hetfl.testing.subject import Subject

    failed = 0
    for entry in entries:
        by_module = entry.source == entry.plugin.partition(":")[0]
        subject = Subject(entry.role, entry.plugin if by_module else entry.name, given, oracles)
        if not as_json:
            say(f"{entry.role} {entry.name} ({entry.source})", "bold")
        report = check_plugin(subject, expected, [n for n in only.split(",") if n], (lambda _: None) if as_json else show_result)
        failed += report.count("failed")
        if as_json:
            sys.stdout.write(json.dumps(report.facts()) + "\n")
        else:
            conclude(report)
    if failed:
        raise RunError(f"{failed} check{'s' * (failed > 1)} of {name} failed")


def show_result(result: Result) -> None:
    """One line a check."""
    text = result.text or (result.about if result.status == "failed" else "")
    say(f"  {result.status:8}  {result.name:30}  {clean(text)}".rstrip(), LOOKS[result.status])


def conclude(report: Report) -> None:
    """How many checks ran, and the tier."""
    bad = (("failed", report.count("failed")), ("failed as expected", report.count("expected")))
    counts = [f"{report.count('passed')} passed", *(f"{n} {what}" for what, n in bad if n)]
    skipped = report.count("skipped")
    say(f"{report.ran} checks ran: {', '.join(counts)}" + (f"; {skipped} skipped" if skipped else ""), "bold")
    missing = NEXT.get(report.tier.name)
    why = next((f"{r.name}: {r.text}" for r in report.results if r.tier == missing and r.status != "passed"), "")
    say(f"tier {report.tier.name.lower()}" + (f"; {missing} needs {why}" if why else ""))


def parse_reason(text: str) -> tuple[str, str]:
    """`check=reason` as a pair."""
    name, equals, reason = text.partition("=")
    if not equals or not reason.strip():
        raise UsageError(f"--expect takes check=reason, not '{text}'")
    return name, reason


def find_oracle(text: str) -> Oracle:
    """The function that `module:function` names, or the path of a file of tests."""
    if text.endswith(".py") or ":" not in text:
        if not Path(text).is_file():
            raise UsageError(f"--oracle takes module:function or a file of tests, and '{text}' is no file")
        return str(Path(text).resolve())
    module, _, name = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"--oracle '{text}' cannot be imported: {error}") from error
    if not callable(getattr(found, name, None)):
        raise UsageError(f"--oracle: module '{module}' has no function '{name}'{nearest(name, dir(found))}")
    function: Oracle = getattr(found, name)
    return function
