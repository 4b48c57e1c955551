"""How much each model is asked for, and how long its answers take: all that eviction, ordering and ETA know ahead.

The hot path only counts (`Demand.count`, `served`, `busy_s` are plain numbers); the exponentials are worked out when
somebody asks. Arrivals that were counted together are taken as spread evenly over the time since the last question.
"""

from __future__ import annotations

from math import exp, inf

FAST_S, SLOW_S = 7.5, 300.0  # a burst, and the trade of some minutes
SHARE_FAST = 0.5
FIRST_SERVICE_S = 3.0  # until a model's first answer has ended
SERVICE_MEMORY = 0.9  # weight of what was known when new ends are counted in
LEAST_WATCHED_S = 1.0


class Demand:
    """Arrivals and service of one model. `rate` is arrivals a second; every operation is O(1)."""

    __slots__ = ("_fast", "_seen_s", "_slow", "busy_s", "count", "served", "service_s", "total")

    def __init__(self) -> None:
        self.count = 0  # arrivals since `_seen_s`
        self.total = 0  # arrivals before that
        self.served = 0  # answers ended since the last look, and
        self.busy_s = 0.0  # the seconds they took
        self.service_s = FIRST_SERVICE_S
        self._seen_s = inf  # the last look; before the first, nobody knows since when they have come
        self._fast = self._slow = 0.0

    def rate(self, now: float, watched_s: float) -> float:
        """Expected arrivals a second: half what the last seconds say, half what the last minutes say.

        `watched_s` is for how long anybody has been counting: a young average is divided by what it could have seen.
        """
        slow = self.slow_rate(now, watched_s)
        return SHARE_FAST * self._fast / (1.0 - exp(-watched_s / FAST_S)) + (1.0 - SHARE_FAST) * slow

    def slow_rate(self, now: float, watched_s: float) -> float:
        """Arrivals a second over the last minutes only."""
        self._roll(now)
        return self._slow / (1.0 - exp(-watched_s / SLOW_S))

    def glance(self, now: float, watched_s: float) -> float:
        """The slow rate, for whoever is only curious: changes nothing."""
        slow = _decayed(self._slow, self.count, now - self._seen_s, SLOW_S)
        return slow / (1.0 - exp(-watched_s / SLOW_S))

    def mean_service_s(self) -> float:
        """Seconds that an answer of this model keeps its place."""
        if self.served:
            seen = self.busy_s / self.served
            keep = SERVICE_MEMORY**self.served if self.service_s != FIRST_SERVICE_S else 0.0
            self.service_s = keep * self.service_s + (1.0 - keep) * seen
            self.served, self.busy_s = 0, 0.0
        return self.service_s

    def _roll(self, now: float) -> None:
        passed = now - min(now, self._seen_s)
        if not passed and not self.count:
            return
        self._fast = _decayed(self._fast, self.count, passed, FAST_S)
        self._slow = _decayed(self._slow, self.count, passed, SLOW_S)
        self.total += self.count
        self.count = 0
        self._seen_s = now if self._seen_s == inf else max(self._seen_s, now)


def _decayed(rate: float, count: int, passed: float, memory: float) -> float:
    if passed <= 0.0:
        return rate + count / memory
    keep = exp(-passed / memory)
    return rate * keep + count * (1.0 - keep) / passed


def drain_s(in_flight: int, service_s: float) -> float:
    """Expected seconds until so many answers have ended, for exponential lengths: mean x harmonic number. O(1)."""
    if in_flight < len(_HARMONIC):
        return service_s * _HARMONIC[in_flight]
    return service_s * (_HARMONIC[-1] + (in_flight - len(_HARMONIC) + 1) / in_flight)


_HARMONIC = [0.0]
for _n in range(1, 257):
    _HARMONIC.append(_HARMONIC[-1] + 1.0 / _n)
