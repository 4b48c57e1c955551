"""Give up what costs least expected delay for the memory that it frees.

A model that is brought back costs its load, once per expected return. Its rate alone does not say when it returns: the
longer it has been idle, the more likely the rate is no longer what it was. If rates are spread exponentially about the
estimate (the gaps between requests are then Lomax distributed), the rate to expect after an idle time is
1 / (mean gap + idle time): that of the last minutes for a model in use, and after a long silence the silence alone.
"""

from __future__ import annotations

from scheduler.eviction.base import Candidate, Ranking

REST_LOADS = 0.5  # an idle time well below a load says nothing
# What a large victim frees beyond the need is of use later, or never: a byte more frees less than the one before.
SIZE_POWER = 0.8
LEAST_RATE = 1e-9


class ExpectedDelay(Ranking):
    """Worth = load seconds x expected returns a second, for the memory held."""

    name = "delay"

    def worth(self, candidate: Candidate, now: float) -> float:
        """Load seconds a second that keeping it saves, over its bytes to the power `SIZE_POWER`. O(1)."""
        return float(delay(candidate, now) / candidate.held_bytes**SIZE_POWER)


def delay(candidate: Candidate, now: float) -> float:
    """Seconds of delay to expect of its end, for each second that passes. O(1)."""
    idle_s = now - candidate.last_used_s + REST_LOADS * candidate.load_s
    return_s = 1.0 / max(candidate.rate, LEAST_RATE) + idle_s
    return candidate.load_s / return_s
