"""How far one reply may go before the server leaves it out: bounds learned from the run's own past, on by default.

A finite number can ruin a run as surely as NaN does: one client that sends 1e30 once leaves every later training without a number.
The bounds are far above what honest clients do (docs/federation.md says how far), so that they cost an honest run nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from hetfl.models.state import State
from hetfl.rounds.rows import CHANGE, EXAMPLES, FAULT, Row
from hetfl.rounds.validation import MOST_EXAMPLES, Change
from hetfl.submodel.encoding import VARIANCE
from hetfl.training.task import Reply

LARGEST_CHANGE = 10.0  # of a client's weights in a round, as a share of the norm of what it was sent
LARGEST_JUMP = 1e6  # the same with the running statistics of batch norm
CHANGES = 50.0  # times the median change of the clients before
COUNTS = 1000.0  # times the median number of examples of the clients before


class Limits:
    """What replies of this round may be, after the last rows of clients, `people`: those without a fault count."""

    def __init__(self, largest_change: float | None, people: Iterable[Row]) -> None:
        accepted = [row for row in people if FAULT not in row]
        changes = [row[CHANGE] for row in accepted if row.get(CHANGE)]
        counts = [row[EXAMPLES] for row in accepted if row.get(EXAMPLES)]
        usual = CHANGES * statistics.median(changes) if changes else 0.0
        self._change = max(LARGEST_CHANGE, usual) if largest_change is None else largest_change
        self._examples = COUNTS * statistics.median(counts) if counts else float(MOST_EXAMPLES)

    def fault(self, reply: Reply, change: Change) -> str | None:
        """Why a reply, which went as far as `change`, is beyond the bounds, or None.

        Running statistics may jump where weights may not: in a new submodel activations are others.
        """
        for kind, far, bound in (("weights", change.weights, self._change), ("running statistics", change.whole, LARGEST_JUMP)):
            if self._change and far > bound:
                return f"it changed its {kind} by {far:.3g} times their norm, of which {bound:.3g} is allowed (--max-change)"
        if reply.examples > self._examples:
            return f"it says that it has {reply.examples:,} examples, of which {self._examples:,.0f} are believed"
        negative = find_negative_variance(reply.state)
        return None if negative is None else f"the variances {negative} are negative"


def find_negative_variance(state: State) -> str | None:
    """The name of batch norm variances of which some are negative, or None."""
    return next((name for name, t in state.items() if name.endswith(VARIANCE) and bool((t < 0).any())), None)
