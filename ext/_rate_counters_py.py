"""Rate limits by GCRA: requests and tokens per minute, decided together, reserved before and settled after.

The generic cell rate algorithm (ATM Forum TM 4.0, 1996; ITU-T I.371) keeps one number per limit: the theoretical
arrival time, "the moment at which the bucket is full again". A cost of n at a limit of L per minute moves it n * 60 /
L seconds on, and is allowed while it stays within one minute of now. So a key at rest may burst a whole minute's
worth, and from then on gets an even flow; nothing is swept, no window jumps. Refused: fixed windows, which let twice
the limit through at their seam.

Limits come with each call, not with the key: a reload of the limits then needs no second state to be kept in step.
This twin is the specification of `_rate_counters.pyx`.
"""

from __future__ import annotations

from math import inf, isnan
from operator import index
from typing import NamedTuple

from ext.errors import ClockWentBack

WINDOW_S = 60.0
MAX_UNITS = 1 << 62
_FEWEST_KEYS = 1024  # below this nothing is forgotten


def _count(amount: int, what: str) -> int:
    amount = index(amount)
    if amount < 0:
        raise ValueError(f"{what} is {amount}; use 0 or more")
    if amount > MAX_UNITS:
        raise OverflowError(f"{what} is {amount}; use at most {MAX_UNITS}")
    return amount


class Remaining(NamedTuple):
    """What a key may still use at once, and the seconds until each limit is whole again. -1 where there is no limit."""

    requests: int
    tokens: int
    requests_reset_s: float
    tokens_reset_s: float


class RateCounters:
    """Two limits for each of any number of keys. One call is one decision, O(1); a limit of 0 means no limit.

    Keys at rest are forgotten, so memory follows the keys that were used within the last minute or owe something. Bad
    amounts raise `ValueError`, `OverflowError` or `TypeError`, a `now` before an earlier one `ClockWentBack`; nothing
    has changed then.
    """

    def __init__(self) -> None:
        self._full_at: dict[str, list[float]] = {}  # key -> when its [requests, tokens] bucket is full again
        self._now = -inf
        self._forget_above = _FEWEST_KEYS

    def __len__(self) -> int:
        return len(self._full_at)

    def reserve(
        self, key: str, tokens: int, now: float, requests_per_minute: int = 0, tokens_per_minute: int = 0
    ) -> float:
        """Take one request and `tokens` from the key's limits: 0.0, or the seconds after which both would be allowed.

        Both are taken or neither. Infinity: the cost is above a whole minute's limit and never fits.
        """
        tokens = _count(tokens, "tokens")
        requests_per_minute = _count(requests_per_minute, "requests_per_minute")
        tokens_per_minute = _count(tokens_per_minute, "tokens_per_minute")
        self._advance(now)
        full_at = self._full_at.get(key)
        requests_at, tokens_at = full_at or (now, now)
        if requests_per_minute:
            requests_at = max(requests_at, now) + WINDOW_S / requests_per_minute
        if tokens_per_minute:
            if tokens > tokens_per_minute:
                return inf
            tokens_at = max(tokens_at, now) + tokens * (WINDOW_S / tokens_per_minute)
        wait_s = 0.0
        if requests_per_minute:
            wait_s = max(wait_s, requests_at - now - WINDOW_S)
        if tokens_per_minute:
            wait_s = max(wait_s, tokens_at - now - WINDOW_S)
        if wait_s > 1e-9:  # a billionth of a second is rounding, not a wait
            return wait_s
        if full_at is None:
            self._full_at[key] = [requests_at, tokens_at]
        else:
            full_at[:] = requests_at, tokens_at
        return 0.0

    def settle(self, key: str, reserved: int, used: int, now: float, tokens_per_minute: int = 0) -> None:
        """Correct a reservation by what the answer really used: more is owed (and delays the next), less is given back.

        Never gives back above a full bucket. Without a limit there is nothing to settle.
        """
        reserved, used = _count(reserved, "reserved"), _count(used, "used")
        tokens_per_minute = _count(tokens_per_minute, "tokens_per_minute")
        self._advance(now)
        if not tokens_per_minute:
            return
        full_at = self._full_at.get(key)
        if full_at is None:
            full_at = self._full_at[key] = [now, now]
        full_at[1] = max(full_at[1], now) + (used - reserved) * (WINDOW_S / tokens_per_minute)

    def remaining(self, key: str, now: float, requests_per_minute: int = 0, tokens_per_minute: int = 0) -> Remaining:
        """What the rate-limit headers say. Changes nothing but the clock."""
        requests_per_minute = _count(requests_per_minute, "requests_per_minute")
        tokens_per_minute = _count(tokens_per_minute, "tokens_per_minute")
        self._advance(now)
        requests_at, tokens_at = self._full_at.get(key) or (now, now)
        requests_s, tokens_s = max(requests_at - now, 0.0), max(tokens_at - now, 0.0)
        return Remaining(
            _left(requests_s, requests_per_minute), _left(tokens_s, tokens_per_minute),
            requests_s if requests_per_minute else -1.0, tokens_s if tokens_per_minute else -1.0,
        )  # fmt: skip

    def _advance(self, now: float) -> None:
        if isnan(now):
            raise ValueError("now is NaN; use seconds of a monotonic clock")
        if now < self._now:
            raise ClockWentBack(f"now is {now}, it was {self._now} before")
        self._now = now
        if len(self._full_at) > self._forget_above:
            # At rest is the same as never seen. Amortised O(1): the next sweep waits for as many new keys as were kept.
            self._full_at = {key: at for key, at in self._full_at.items() if max(at) > now}
            self._forget_above = max(_FEWEST_KEYS, 2 * len(self._full_at))

    def __repr__(self) -> str:
        return f"<RateCounters {len(self._full_at)} keys>"


def _left(reset_s: float, per_minute: int) -> int:
    if not per_minute:
        return -1
    return max(0, int((WINDOW_S - reset_s) * per_minute / WINDOW_S + 1e-6))
