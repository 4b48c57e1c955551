"""The weighted semaphore for tasks: `async with semaphore.lease(weight): ...`.

A thin face over `ext.weighted_semaphore`, which decides; here is only the waiting. What always holds: whoever leaves
`lease`, in whatever way, holds nothing, and everyone whom that lets in has been woken. A grant that reaches a task
which is cancelled in the same turn of the loop is given back, and wakes the next.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ext.errors import NeverFits
from ext.weighted_semaphore import SemaphoreStats, WeightedSemaphore

_NO_LIMIT = 1 << 62


class Semaphore:
    """Weights in two units, classes (0 is the most urgent), first come first served in a class. For one event loop."""

    def __init__(self, tokens: int, sequences: int = _NO_LIMIT, classes: int = 1) -> None:
        self._core = WeightedSemaphore(tokens, sequences, classes)
        self._waiters: dict[int, asyncio.Future[None]] = {}  # the tickets that wait in the core
        self._granted: set[int] = set()  # hold their weight in the core, but their task has not run since

    @asynccontextmanager
    async def lease(
        self, tokens: int, sequences: int = 1, *, priority: int = 0, timeout_s: float | None = None
    ) -> AsyncIterator[None]:
        """Hold the weight for the length of the block, after waiting for it at most `timeout_s` seconds.

        Raises `TimeoutError` when the wait was too long, `NeverFits` for a weight above capacity (also for one that
        `resize` leaves above it while it waits), `ValueError` or `TypeError` for a bad one.
        """
        ticket = self._core.try_acquire(tokens, sequences, priority)
        if not ticket:
            ticket = self._core.park(tokens, sequences, priority)
            await self._wait(ticket, timeout_s)
        try:
            yield
        finally:
            self._wake(self._core.release(ticket))

    def resize(self, tokens: int, sequences: int = _NO_LIMIT) -> None:
        """Set the capacity: wakes whom growth lets in, refuses with `NeverFits` whom a shrink leaves without hope."""
        granted, refused = self._core.resize(tokens, sequences)
        self._wake(granted)
        for ticket in refused:
            waiter = self._waiters.pop(ticket)
            if not waiter.done():
                waiter.set_exception(NeverFits(f"the capacity shrank to {tokens} tokens, {sequences} sequences"))

    def stats(self) -> SemaphoreStats:
        """The core's counts."""
        return self._core.stats()

    async def _wait(self, ticket: int, timeout_s: float | None) -> None:
        waiter = self._waiters[ticket] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_s):
                await waiter
        except BaseException:
            self._give_up(ticket)
            raise
        self._granted.remove(ticket)

    def _give_up(self, ticket: int) -> None:
        if ticket in self._granted:
            self._granted.remove(ticket)
            self._wake(self._core.release(ticket))
        elif self._waiters.pop(ticket, None) is not None:
            self._wake(self._core.cancel(ticket))
        # else it was refused, and has left the core already

    def _wake(self, granted: list[int]) -> None:
        for ticket in granted:
            self._granted.add(ticket)
            waiter = self._waiters.pop(ticket)
            if not waiter.done():  # cancelled in this turn of the loop: its task will give up what it was granted
                waiter.set_result(None)

    def __repr__(self) -> str:
        return repr(self._core)
