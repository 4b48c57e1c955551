"""What requests add to: how many there were of each status class, how long they took and waited, what they used.

One thread writes, so nothing is locked: prometheus_client's own counters lock at every step, which costs more than all
else that ends a request.

This twin is the specification of `_tally.pyx`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from math import isnan

CLASSES = 6  # statuses below 600; a class of 0 is that of requests which got none


class Histogram:
    """How many durations were at most each of the bounds and above the one before, and their sum."""

    __slots__ = ("_bounds", "_counts", "_total_s")

    def __init__(self, bounds: Iterable[float]) -> None:
        """`bounds` in seconds, rising; what is above the last is counted too."""
        self._bounds = _rising(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total_s = 0.0

    def observe(self, seconds: float) -> None:
        """Count one more."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._total_s += seconds

    @property
    def counts(self) -> list[int]:
        """A copy, one for each bound and one for what is above."""
        return list(self._counts)

    @property
    def total_s(self) -> float:
        """The sum of what was observed."""
        return self._total_s

    def __repr__(self) -> str:
        return f"<Histogram of {sum(self._counts)}: {self._total_s:g} s>"


class Tally:
    """What the requests of one kind add to."""

    __slots__ = ("_statuses", "cached_tokens", "duration", "errors", "first_byte", "input_tokens", "load",
                 "output_tokens", "queue", "unwaited", "upstream")  # fmt: skip

    def __init__(self, bounds: Iterable[float]) -> None:
        bounds = _rising(bounds)
        self.duration, self.first_byte = Histogram(bounds), Histogram(bounds)
        self.queue, self.load, self.upstream = Histogram(bounds), Histogram(bounds), Histogram(bounds)
        self.unwaited = 0  # waited for neither: most do, and two sums are not worth their time then
        self.input_tokens = self.cached_tokens = self.output_tokens = 0
        self.errors = 0
        self._statuses = [0] * CLASSES

    @property
    def statuses(self) -> dict[int, int]:
        """How many ended with a status of each class that there was, by its first digit."""
        return {each: count for each, count in enumerate(self._statuses) if count}

    def ended(self, status: int, duration_s: float) -> None:
        """Count a request that ended. Raises ValueError for what is no status."""
        if not 0 <= status < 100 * CLASSES:
            raise ValueError(f"status is {status}; use 0 to {100 * CLASSES - 1}")
        self._statuses[status // 100] += 1
        self.duration.observe(duration_s)

    def failed(self) -> None:
        """Count one that ended with an error after its answer had begun."""
        self.errors += 1

    def answered(self, first_byte_s: float, upstream_s: float, queue_s: float, load_s: float) -> None:
        """Count an answer's waits."""
        self.first_byte.observe(first_byte_s)
        self.upstream.observe(upstream_s)
        if queue_s or load_s:
            self.queue.observe(queue_s)
            self.load.observe(load_s)
        else:
            self.unwaited += 1

    def used(self, input_tokens: int, cached_tokens: int, output_tokens: int) -> None:
        """Count tokens."""
        self.input_tokens += input_tokens
        self.cached_tokens += cached_tokens
        self.output_tokens += output_tokens

    def __repr__(self) -> str:
        return f"<Tally {self.statuses}>"


def _rising(bounds: Iterable[float]) -> tuple[float, ...]:
    rising = tuple(float(bound) for bound in bounds)
    if any(isnan(bound) for bound in rising) or list(rising) != sorted(set(rising)):
        raise ValueError(f"bounds are {rising}; use rising numbers")
    return rising
