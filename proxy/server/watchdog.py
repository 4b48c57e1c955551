"""Time limits for the waits of one request, cheap enough to move with every chunk.

`asyncio.timeout` around each read and write would cost two timer operations per chunk. Here moving the limit is an
assignment: the timer that is armed is left alone while it is early enough, and looks again when it fires.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from types import TracebackType

# A timer costs more than all the rest of a limit, and most requests are over by then: no limit below arms another one.
FIRST_LOOK_S = 1.0
ROUND_S = 0.5  # so often a `Watch` arms the timers of those that are still there

# Makes the error that a limit ends with. Most limits are never reached, and an error with its words takes a microsecond
# to make.
Failure = Callable[[], Exception]


class Watchdog:
    """Cancels the task inside its `with` block when a limit passes, and raises that limit's error instead.

    The total limit counts from entering the block; a second block after the first starts afresh.

    Invariant: an armed timer never fires later than the earlier of the two deadlines. A `lazy` one has none at first:
    it is a `Watch`'s, and most requests end before that comes round.
    A cancellation from outside is never turned into an error, also when both happen at once.
    """

    __slots__ = (
        "_active",
        "_armed_at",
        "_cancelling",
        "_deadline",
        "_error",
        "_expired",
        "_lazy",
        "_loop",
        "_task",
        "_timer",
        "_total",
        "_total_error",
        "_total_s",
    )

    def __init__(
        self,
        total_s: float,
        total_error: Failure,
        loop: asyncio.AbstractEventLoop | None = None,
        *,
        lazy: bool = False,
    ) -> None:
        self._loop = loop or asyncio.get_running_loop()
        self._lazy = lazy  # somebody calls `arm` every `ROUND_S`, which is soon enough for limits of a second
        self._active = False
        self._total_s = total_s
        self._total = math.inf
        self._total_error = total_error
        self._deadline = math.inf
        self._error = total_error
        self._expired: Exception | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._armed_at = math.inf  # when it fires; uvloop's handles cannot always tell

    def __enter__(self) -> Watchdog:
        task = asyncio.current_task(self._loop)
        if task is None:
            raise RuntimeError("a Watchdog guards a task")
        self._task = task
        self._cancelling = task.cancelling()
        self._expired = None
        self._deadline = math.inf
        now = self._loop.time()
        self._total = now + self._total_s
        self._active = True
        if not self._lazy or self._total_s < FIRST_LOOK_S:
            self._arm(min(self._total, now + FIRST_LOOK_S))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._active = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer, self._armed_at = None, math.inf
        if self._expired is not None and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise self._expired from None

    def limit(self, seconds: float, error: Failure) -> None:
        """From now on the task may take so long until the next `limit`, or it ends with what `error` makes."""
        self._error = error
        self._deadline = self._loop.time() + seconds
        if self._deadline < self._armed_at and (self._timer is not None or not self._lazy or seconds < FIRST_LOOK_S):
            self._arm(min(self._deadline, self._total))

    def arm(self) -> None:
        """From now on a timer of its own looks after the limits."""
        if self._active and self._timer is None:
            self._arm(min(self._deadline, self._total))

    def expire(self, error: Exception) -> None:
        """End the task with this error, now. Nothing if it is over or ending already."""
        if self._active and self._expired is None:
            self._expired = error
            self._task.cancel()

    def now(self) -> float:
        """The clock that the limits are measured by, in monotonic seconds."""
        return self._loop.time()

    def lift(self) -> None:
        """Only the total limit holds."""
        self._deadline = math.inf

    def _arm(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._armed_at = when
        self._timer = self._loop.call_at(when, self._look)

    def _look(self) -> None:
        due = min(self._deadline, self._total)
        self._timer, self._armed_at = None, math.inf
        if self._loop.time() < due:
            self._arm(due)
            return
        self._expired = self._error() if self._deadline <= self._total else self._total_error()
        self._task.cancel()


class Watch:
    """The watchdogs of all requests that are being answered, as one set with one timer."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._there: set[Watchdog] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, one: Watchdog) -> None:
        """Look after this one until `discard`."""
        self._there.add(one)
        if self._timer is None:
            self._timer = self._loop.call_later(ROUND_S, self._round)

    def discard(self, one: Watchdog) -> None:
        """Its request is over."""
        self._there.discard(one)

    def expire(self, make_error: Failure) -> None:
        """End all of them with such an error."""
        for one in self._there:
            one.expire(make_error())

    def _round(self) -> None:
        self._timer = None
        for one in self._there:
            one.arm()
        if self._there:
            self._timer = self._loop.call_later(ROUND_S, self._round)
