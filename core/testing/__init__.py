"""What every plugin must do, as checks that `hfl check` runs and as classes for pytest.

from hetfl.testing import ExtractChecks

class TestMine(ExtractChecks):
    plugin = Mine()
"""

from hetfl.testing.classes import AggregateChecks, ExtractChecks, ProfileChecks, WrapChecks
from hetfl.testing.report import Report, check_plugin

__all__ = ["AggregateChecks", "ExtractChecks", "ProfileChecks", "Report", "WrapChecks", "check_plugin"]
