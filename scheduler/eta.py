"""When a waiting ticket will get its lease: an estimate with an 80 % interval that calibrates itself.

The estimate is plain: what is left of the load under way, of the drain, of the queue. What it leaves out (who comes in
between, how the plan will be revised) is learned: for every stage at which tickets begin to wait, the ratios of the
real wait to the estimate are kept, and the interval is the estimate times their 10 % and 90 % quantiles. So the
interval covers 80 % of the waits as long as the near future is like the near past, whatever the policy, and no model
of the errors is needed (this is split conformal prediction on a sliding window).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from enum import IntEnum

import msgspec

WINDOW = 200  # waits that a stage remembers
PRIOR = (0.5, 0.8, 1.0, 1.25, 2.0)  # ratios believed before there are any, and outweighed by them
LOW, HIGH = 0.1, 0.9
LEAST_S = 0.05  # a wait below this is not told from none


class Stage(IntEnum):
    """Where a ticket stands in line for the memory."""

    BUSY = 0  # its model is loaded and full
    LOADING = 1  # its model, or it wakes
    PLANNED = 2  # its model is the next to load
    QUEUED = 3  # other models go first


class Eta(msgspec.Struct, frozen=True):
    """Seconds from now: the median, and the ends of the 80 % interval."""

    expected_s: float
    low_s: float
    high_s: float


class Quote(msgspec.Struct, frozen=True):
    """What a ticket is in for, and the load seconds that it would cause and nobody else has yet."""

    eta: Eta
    damage_s: float


class Ratios:
    """The last real waits over their estimates, sorted. add is O(WINDOW) moves of a word, quantile O(1)."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(PRIOR)
        self._sorted = sorted(PRIOR)

    def add(self, ratio: float) -> None:
        """A wait is over."""
        if len(self._recent) >= WINDOW:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(ratio)
        insort(self._sorted, ratio)

    def quantile(self, share: float) -> float:
        """The ratio that this share of the waits stayed below, between neighbours by line."""
        place = share * (len(self._sorted) + 1) - 1.0
        lower = max(0, min(len(self._sorted) - 1, int(place)))
        upper = min(len(self._sorted) - 1, lower + 1)
        part = min(1.0, max(0.0, place - lower))
        return self._sorted[lower] + part * (self._sorted[upper] - self._sorted[lower])


class Calibration:
    """What the stages have learned."""

    def __init__(self) -> None:
        self._stages = tuple(Ratios() for _ in Stage)

    def eta(self, stage: Stage, estimate_s: float) -> Eta:
        """The estimate, corrected, with its interval. O(1)."""
        ratios = self._stages[stage]
        estimate_s = max(LEAST_S, estimate_s)
        low, middle, high = (estimate_s * ratios.quantile(share) for share in (LOW, 0.5, HIGH))
        return Eta(middle, low, high)

    def learn(self, stage: Stage, estimate_s: float, waited_s: float) -> None:
        """A ticket that was given this estimate at this stage when it came has been let in."""
        self._stages[stage].add(waited_s / max(LEAST_S, estimate_s))
