"""When devices are there: sessions and gaps in simulated time, each client's from its own random stream."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from hetfl.rng import seed_of, stream

HOUR, CHUNK, CANDIDATES = 3600.0, 32, 512  # seconds; cycles drawn at a time; and for the interval under way at time 0


class Availability:
    """Alternating sessions and gaps, lognormal with (mu, sigma) of seconds, none longer than `longest`.

    `rhythm` maps hours of the day to how much of a session's time is used then, relative to the mean, straight lines between them:
    on each day a client keeps to the hours whose rate, as a share of the largest, is above a number drawn for that day. At time 0
    the process has run for ever: the interval under way is one chosen with a chance in proportion to its length.
    """

    def __init__(
        self, session: tuple[float, float], gap: tuple[float, float], longest: float, rhythm: dict[float, float], seed: int
    ) -> None:
        self._longest, self._seed = longest, seed
        self._middles, self._spreads = np.array([gap, session]).T[:, :, None]
        points = sorted(rhythm.items()) or [(0.0, 1.0)]
        rates = [interpolate(points, hour) for hour in range(24)]
        self._rates = [rate / max(rates) for rate in rates]
        self._ends: dict[int, list[float]] = {}  # by client: the ends of its intervals
        self._first: dict[int, bool] = {}  # by client: whether its first interval is a session
        self._chunks: dict[int, int] = {}
        self._days: dict[tuple[int, int], float] = {}  # by client and day: the number drawn for its rhythm

    def is_ready(self, client: int, now: float) -> bool:
        """Whether the client is there at `now`."""
        return self._place(client, now)[1] and self._keeps_to(client, int(now // HOUR))

    def next_change(self, client: int, now: float, until: float = math.inf) -> float:
        """When a client that is there leaves, or one that is not comes; some moment from `until` on where it is not before."""
        ready, time = self.is_ready(client, now), now
        while time < until and (time == now or self.is_ready(client, time) == ready):
            place, session = self._place(client, time)
            end = self._ends[client][place]
            time = min(end, (time // HOUR + 1) * HOUR) if session else end
        return time

    def _keeps_to(self, client: int, hour: int) -> bool:
        """Whether the client's sessions are used in an hour, counted from time 0."""
        day = client, hour // 24
        if day not in self._days:
            self._days[day] = seed_of(self._seed, "rhythm", hour // 24, client) / 2**63
        return self._rates[hour % 24] > self._days[day]

    def _place(self, client: int, now: float) -> tuple[int, bool]:
        """The number of the interval at `now`, and whether it is a session."""
        while not self._ends.get(client) or self._ends[client][-1] <= now:
            self._draw(client)
        place = bisect_right(self._ends[client], now)
        return place, self._first[client] == (place % 2 == 0)

    def _draw(self, client: int) -> None:
        """The client's next intervals."""
        chunk = self._chunks.get(client, 0)
        self._chunks[client] = chunk + 1
        generator, cycles = stream(self._seed, "availability", chunk, client), CHUNK + (0 if chunk else CANDIDATES)
        normal = torch.randn(2, cycles, generator=generator, dtype=torch.float64).numpy()
        lengths = np.exp(self._middles + self._spreads * normal).clip(1.0, self._longest)
        if chunk == 0:
            self._begin(client, lengths[:, CHUNK:], torch.rand(2, generator=generator, dtype=torch.float64).tolist())
        gaps, sessions = lengths[:, :CHUNK]
        ends = self._ends[client]
        for gap, session in zip(gaps.tolist(), sessions.tolist(), strict=True):
            for _ in range(2):
                ready = self._first[client] == (len(ends) % 2 == 0)
                ends.append(ends[-1] + (session if ready else gap))

    def _begin(self, client: int, lengths: np.ndarray, drawn: Sequence[float]) -> None:
        """The rest of the interval under way at time 0, one of gaps and sessions (2, CANDIDATES) by two numbers in [0, 1)."""
        ends = lengths.ravel().cumsum()
        picked = int(np.searchsorted(ends, drawn[0] * ends[-1], side="right"))
        self._first[client] = picked >= lengths.shape[1]
        self._ends[client] = [float(lengths.ravel()[picked]) * drawn[1]]


def interpolate(points: Sequence[tuple[float, float]], hour: float) -> float:
    """The value at `hour` on the closed line through (hour, value) points of a day."""
    around = [(points[-1][0] - 24, points[-1][1]), *points, (points[0][0] + 24, points[0][1])]
    for (start, low), (end, high) in pairwise(around):
        if start <= hour <= end:
            return low + (high - low) * (hour - start) / (end - start) if end > start else low
    return points[0][1]
