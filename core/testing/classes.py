"""The checks as classes for pytest: `class TestMine(ExtractChecks): plugin = Mine()`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from hetfl.hooks.base import Plugin
from hetfl.testing.checks import Check, checks_of
from hetfl.testing.report import refuse_unknown, run_check
from hetfl.testing.subject import Oracle, Subject


class PluginChecks:
    """A test for every check of a role.

    `plugin`: an object, a class, a name or "package.module:Class". `expected_failures`: checks that it cannot pass, each with the
    reason; strict. `options` of the small runs; `oracles`: functions that raise AssertionError where its numbers are not those of
    its paper; `seconds` that a client's round may take.
    """

    plugin: ClassVar[Plugin | type[Plugin] | str]
    role: ClassVar[str]
    expected_failures: ClassVar[Mapping[str, str]] = {}
    options: ClassVar[Mapping[str, Any]] = {}
    oracles: ClassVar[Sequence[Oracle]] = ()
    seconds: ClassVar[float] = 5.0

    @classmethod
    def check(cls, one: Check) -> None:
        """Runs one check as a test."""
        import pytest

        subject = Subject(cls.role, cls.plugin, cls.options, cls.oracles, cls.seconds)
        expected = {**subject.kind.expected_failures, **cls.expected_failures}
        refuse_unknown(checks_of(cls.role), list(expected), expected)
        result = run_check(one, subject, expected.get(one.name))
        if result.status == "failed":
            pytest.fail(f"{one.about} {result.text}", pytrace=False)
        if result.status == "expected":
            pytest.xfail(result.text)
        if result.status == "skipped":
            pytest.skip(result.text)


def as_test(one: Check) -> Callable[[PluginChecks], None]:
    """The check as a method that pytest finds."""

    def test(self: PluginChecks) -> None:
        self.check(one)

    test.__name__, test.__doc__ = f"test_{one.name}", one.about
    return test


def add_tests(kind: type[PluginChecks]) -> type[PluginChecks]:
    """Gives a class a test for each check of its role."""
    for one in checks_of(kind.role):
        setattr(kind, f"test_{one.name}", as_test(one))
    return kind


class ExtractChecks(PluginChecks):
    """What every extraction must do."""

    role = "extract"


class AggregateChecks(PluginChecks):
    """What every aggregation must do."""

    role = "aggregate"


class ProfileChecks(PluginChecks):
    """What every profile must do."""

    role = "profile"


class WrapChecks(PluginChecks):
    """What every wrap must do."""

    role = "wrap"


for kind in (ExtractChecks, AggregateChecks, ProfileChecks, WrapChecks):
    add_tests(kind)
