"""Rate limits by GCRA: requests and tokens per minute and concurrency, reserved before and settled after, together.

The generic cell rate algorithm (ATM Forum TM 4.0, 1996; ITU-T I.371) keeps one number per limit: the theoretical
arrival time, "the moment at which the bucket is full again". A cost of n at a limit of L per minute moves it n * 60 /
L seconds on, and is allowed while it stays within one minute of now. So a name at rest may burst a whole minute's
worth, and from then on gets an even flow; nothing is swept, no window jumps. Refused: fixed windows, which let twice
the limit through at their seam.

One number a limit is also what several processes can share: the native twin keeps them in memory that the caller gives
and moves them by compare-and-swap. Counts belong to a name and limits to a `Meter` of it, so that a reload changes the
limits and keeps the counts.

This twin is the specification of `_rate_counters.pyx`. It counts within one process only.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, inf, isnan
from operator import index
from typing import NamedTuple

from ext.errors import NotHeld

WINDOW_S = 60.0
MAX_UNITS = 1 << 60
REQUESTS, TOKENS, CONCURRENCY = "requests_per_minute", "tokens_per_minute", "concurrency"
_ROUNDING_S = 1e-9  # less is no wait
_LONGEST_S = 1e9  # that a header says


def _count(amount: int, what: str) -> int:
    amount = index(amount)
    if amount < 0:
        raise ValueError(f"{what} is {amount}; use 0 or more")
    if amount > MAX_UNITS:
        raise OverflowError(f"{what} is {amount}; use at most {MAX_UNITS}")
    return amount


def _time(now: float) -> float:
    if isnan(now):
        raise ValueError("now is NaN; use seconds of a monotonic clock")
    return now


class Remaining(NamedTuple):
    """What a name may still use at once, and the seconds until each limit is whole again. -1: there is no limit."""

    requests: int
    tokens: int
    requests_reset_s: float
    tokens_reset_s: float


class Refusal(NamedTuple):
    """Why nothing was reserved: `limit` of `meter`, and the seconds after which the same would be allowed.

    Infinity: never. 0: somebody must settle first, and nobody knows when (concurrency). `headers` as a grant has them.
    """

    meter: Meter
    limit: str
    wait_s: float
    headers: str


class _Entry:
    """The counts of one name."""

    __slots__ = ("in_use", "requests_at", "tokens_at")

    def __init__(self) -> None:
        self.requests_at = 0.0  # when the bucket is full again
        self.tokens_at = 0.0
        self.in_use = 0


class Meter:
    """The limits of one name on its counts. 0 means no limit."""

    __slots__ = ("_entry", "concurrency", "name", "requests_per_minute", "tokens_per_minute")

    def __init__(self, entry: _Entry, name: str, requests: int, tokens: int, concurrency: int) -> None:
        self._entry = entry
        self.name = name
        self.requests_per_minute = requests
        self.tokens_per_minute = tokens
        self.concurrency = concurrency

    @property
    def in_use(self) -> int:
        """Grants that were not settled yet, in all processes."""
        return self._entry.in_use

    def remaining(self, now: float) -> Remaining:
        """What is left. Changes nothing."""
        _time(now)
        requests_s, tokens_s = max(self._entry.requests_at - now, 0.0), max(self._entry.tokens_at - now, 0.0)
        return Remaining(
            _left(requests_s, self.requests_per_minute), _left(tokens_s, self.tokens_per_minute),
            requests_s if self.requests_per_minute else -1.0, tokens_s if self.tokens_per_minute else -1.0,
        )  # fmt: skip

    def _cost(self, stated: int, guessed: int) -> int:
        return min(stated + guessed, self.tokens_per_minute)

    def _check(self, stated: int, guessed: int, now: float) -> tuple[float, str]:
        """The wait and the limit that causes it; -1 where there is room."""
        wait_s, limit = -1.0, ""
        if self.concurrency and self._entry.in_use >= self.concurrency:
            wait_s, limit = 0.0, CONCURRENCY
        if self.requests_per_minute:
            at = max(self._entry.requests_at, now) + WINDOW_S / self.requests_per_minute
            if at - now - WINDOW_S > max(wait_s, _ROUNDING_S):
                wait_s, limit = at - now - WINDOW_S, REQUESTS
        if self.tokens_per_minute:
            if stated > self.tokens_per_minute:
                return inf, TOKENS
            at = max(self._entry.tokens_at, now) + self._cost(stated, guessed) * (WINDOW_S / self.tokens_per_minute)
            if at - now - WINDOW_S > max(wait_s, _ROUNDING_S):
                wait_s, limit = at - now - WINDOW_S, TOKENS
        return wait_s, limit

    def _take(self, cost: int, now: float) -> None:
        entry = self._entry
        entry.in_use += 1
        if self.requests_per_minute:
            entry.requests_at = max(entry.requests_at, now) + WINDOW_S / self.requests_per_minute
        if self.tokens_per_minute:
            entry.tokens_at = max(entry.tokens_at, now) + cost * (WINDOW_S / self.tokens_per_minute)

    def _settle(self, more: int, now: float) -> None:
        self._entry.in_use -= 1
        if more and self.tokens_per_minute:
            self._entry.tokens_at = max(self._entry.tokens_at, now) + more * (WINDOW_S / self.tokens_per_minute)

    def _cancel(self, cost: int) -> None:
        self._entry.in_use -= 1
        if self.requests_per_minute:
            self._entry.requests_at -= WINDOW_S / self.requests_per_minute
        if self.tokens_per_minute:
            self._entry.tokens_at -= cost * (WINDOW_S / self.tokens_per_minute)

    def __repr__(self) -> str:
        return (
            f"<Meter {self.name}: {self.requests_per_minute} requests, {self.tokens_per_minute} tokens a minute, "
            f"{self.in_use} of {self.concurrency} at once>"
        )


class Grant:
    """What was reserved. `settle` or `cancel` it, once; again raises `NotHeld`.

    `headers` are OpenAI's `x-ratelimit-*` as header lines: of requests and of tokens those of the meter that has fewer
    left, this grant counted. Empty where nothing is limited per minute.
    """

    __slots__ = ("_held", "headers")

    def __init__(self, held: list[tuple[Meter, int]], headers: str) -> None:
        self._held: list[tuple[Meter, int]] | None = held
        self.headers = headers

    def settle(self, used: int | None, now: float) -> None:
        """The request is over and used so many tokens: more is owed (and delays the next), less is given back.

        Never gives back above a full bucket. None: nobody knows, and what was reserved stays taken.
        """
        used = None if used is None else _count(used, "used")
        _time(now)
        for meter, cost in self._take_held():
            meter._settle(0 if used is None else used - cost, now)

    def cancel(self) -> None:
        """There was no request after all: everything is as if nothing had been reserved."""
        for meter, cost in self._take_held():
            meter._cancel(cost)

    def _take_held(self) -> list[tuple[Meter, int]]:
        held, self._held = self._held, None
        if held is None:
            raise NotHeld("this grant was settled or cancelled before")
        return held


class RateCounters:
    """The counts of any number of names. One reservation is one decision, O(1).

    Names are never forgotten, so they must be those of a configuration. Bad amounts raise `ValueError`,
    `OverflowError` or `TypeError`; nothing has changed then. A clock that runs back, as those of two processes may by
    a little, costs that little.

    With a `buffer`, zeroed at first and of `bytes_for(...)` bytes, all processes that share it count together, each
    under its own number `process` of `processes`; its room is bounded, and one name too many raises `OverflowError`.
    Native only: this twin raises `ValueError`, for two processes of it would let through twice the limit.
    """

    def __init__(self, buffer: object = None, *, processes: int = 1, process: int = 0) -> None:
        if buffer is not None:
            raise ValueError("the pure rate counters count in one process only; build the native ones")
        if not 0 <= process < processes:
            raise ValueError(f"process is {process} of {processes}; use 0 to {processes - 1}")
        self._entries: dict[str, _Entry] = {}

    @staticmethod
    def bytes_for(names: int, processes: int) -> int:
        """The size of a buffer for so many names."""
        return 8 * _count(names, "names") * (3 + _count(processes, "processes"))

    def meter(self, name: str, requests_per_minute: int = 0, tokens_per_minute: int = 0, concurrency: int = 0) -> Meter:
        """Limits on the counts of `name`, which go on from those of an earlier meter of that name."""
        limits = (
            _count(requests_per_minute, REQUESTS),
            _count(tokens_per_minute, TOKENS),
            _count(concurrency, CONCURRENCY),
        )
        return Meter(self._entries.setdefault(name, _Entry()), name, *limits)

    def reserve(
        self, first: Meter | None, second: Meter | None, stated: int, guessed: int, now: float
    ) -> Grant | Refusal:
        """Take one request, one of the concurrency and `stated + guessed` tokens from both meters, or from neither.

        What is `stated` above a whole minute's limit never fits. What is only guessed never is a reason for that: a
        guess that is too large takes the whole minute's worth, and settling corrects it.
        """
        stated, guessed = _count(stated, "stated"), _count(guessed, "guessed")
        _time(now)
        meters = [meter for meter in (first, second) if meter is not None]
        checks = [(*meter._check(stated, guessed, now), meter) for meter in meters]
        wait_s, limit, meter = max(checks, key=lambda check: check[0], default=(-1.0, "", None))
        if meter is not None and wait_s >= 0.0:
            return Refusal(meter, limit, wait_s, _headers(meters, now))
        held = [(meter, meter._cost(stated, guessed)) for meter in meters]
        for meter, cost in held:
            meter._take(cost, now)
        return Grant(held, _headers(meters, now))

    def forget(self, process: int) -> None:
        """This process is gone: what it had in use is free again."""
        if process != 0:
            raise ValueError(f"process is {process} of 1; use 0")
        for entry in self._entries.values():
            entry.in_use = 0

    def __repr__(self) -> str:
        return f"<RateCounters {len(self._entries)} names>"


def _left(reset_s: float, per_minute: int) -> int:
    if not per_minute:
        return -1
    return max(0, int((WINDOW_S - reset_s) * per_minute / WINDOW_S + 1e-6))


def _headers(meters: Sequence[Meter], now: float) -> str:
    all_left = [(meter, meter.remaining(now)) for meter in meters]
    requests = [(left.requests, meter.requests_per_minute, left.requests_reset_s) for meter, left in all_left]
    tokens = [(left.tokens, meter.tokens_per_minute, left.tokens_reset_s) for meter, left in all_left]
    return _lines("requests", requests) + _lines("tokens", tokens)


def _lines(unit: str, figures: list[tuple[int, int, float]]) -> str:
    """Of (left, limit, reset): the first of those with the fewest left."""
    left, limit, reset_s = min((each for each in figures if each[1]), key=lambda each: each[0], default=(0, 0, 0.0))
    if not limit:
        return ""
    return (
        f"x-ratelimit-limit-{unit}: {limit}\r\n"
        f"x-ratelimit-remaining-{unit}: {left}\r\n"
        f"x-ratelimit-reset-{unit}: {_duration(reset_s)}\r\n"
    )


def _duration(seconds: float) -> str:
    """As OpenAI writes them, which is as Go does: 6ms, 1s, 1.5s, 6m0s. Rounded up to milliseconds."""
    whole_s, ms = divmod(max(0, ceil(min(seconds, _LONGEST_S) * 1000.0 - 1e-3)), 1000)
    if not whole_s:
        return f"{ms}ms" if ms else "0s"
    minutes, whole_s = divmod(whole_s, 60)
    fraction = f".{ms:03}".rstrip("0").rstrip(".")
    return f"{minutes}m{whole_s}{fraction}s" if minutes else f"{whole_s}{fraction}s"
