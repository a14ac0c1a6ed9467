"""What the checks of a plugin came to."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from hetfl.errors import UsageError, unknown
from hetfl.testing import bronze, silver  # noqa: F401 (they fill CHECKS)
from hetfl.testing.checks import CHECKS, Check, Tier, checks_of
from hetfl.testing.subject import NotChecked, Subject

Status = Literal["passed", "failed", "skipped", "expected"]


@dataclass(frozen=True)
class Result:
    """What one check came to; `text` is what it looked at, or why it failed, was skipped or was expected to fail."""

    name: str
    tier: str
    about: str
    status: Status
    text: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """What all checks of a plugin in one role came to."""

    role: str
    name: str
    results: list[Result] = field(default_factory=list)

    def count(self, status: Status) -> int:
        return sum(result.status == status for result in self.results)

    @property
    def ran(self) -> int:
        """How many checks said something: all but those that were skipped."""
        return len(self.results) - self.count("skipped")

    @property
    def tier(self) -> Tier:
        """The highest tier of which, and of those below, no check failed; gold takes an oracle that was asked."""
        reached = Tier.NONE
        for tier in (Tier.BRONZE, Tier.SILVER, Tier.GOLD):
            mine = [result for result in self.results if result.tier == tier.name.lower()]
            open_ = ("failed", "skipped", "expected") if tier == Tier.GOLD else ("failed",)
            if not mine or any(result.status in open_ for result in mine):
                break
            reached = tier
        return reached

    def facts(self) -> dict[str, Any]:
        """The report for JSON."""
        counts = {status: self.count(status) for status in get_args(Status)}
        facts = {"role": self.role, "name": self.name, "tier": self.tier.name.lower(), "ran": self.ran, **counts}
        return {**facts, "checks": [asdict(result) for result in self.results]}


def check_plugin(
    subject: Subject, expected_failures: Mapping[str, str] | None = None, only: Collection[str] = (),
    tell: Callable[[Result], None] = lambda result: None,
) -> Report:  # fmt: skip
    """Runs the checks of the plugin's role, or those named in `only`; `tell` hears of each as it ends.

    `expected_failures`: checks that it cannot pass, by name, each with the reason; one of them that passes is a failure. What the
    plugin's own class says under that name counts too.
    """
    expected = {**subject.kind.expected_failures, **(expected_failures or {})}
    wanted = checks_of(subject.role)
    refuse_unknown(wanted, [*expected, *only], expected)
    report = Report(subject.role, subject.plugin if isinstance(subject.plugin, str) else subject.kind.__name__)
    for one in (c for c in wanted if not only or c.name in only):
        report.results.append(run_check(one, subject, expected.get(one.name)))
        tell(report.results[-1])
    return report


def refuse_unknown(wanted: Sequence[Check], named: Sequence[str], expected: Mapping[str, str]) -> None:
    """Raises UsageError for a name that is no check, and for an expected failure without a reason."""
    for name in named:
        if name not in CHECKS:
            raise unknown("check", name, {c.name for c in wanted})
    if bare := [name for name, reason in expected.items() if not reason.strip()]:
        raise UsageError(f"the check '{bare[0]}' is expected to fail without a reason; give one")


def run_check(one: Check, subject: Subject, expected: str | None = None) -> Result:
    """What one check comes to; `expected`: why it is to fail."""
    began = time.perf_counter()
    status, text = carry_out(one, subject)
    if expected is not None:
        if status == "failed":
            status, text = "expected", expected
        elif status == "passed":
            status, text = "failed", f"it was expected to fail ({expected}) and passes: strike it from expected_failures"
    return Result(one.name, one.tier.name.lower(), one.about, status, text, time.perf_counter() - began)


def carry_out(one: Check, subject: Subject) -> tuple[Status, str]:
    """Passed, failed or skipped, and the text to it."""
    try:
        return "passed", one.run(subject) or ""
    except NotChecked as reason:
        return "skipped", str(reason)
    except AssertionError as error:
        return "failed", str(error) or "it raised AssertionError"
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}"
