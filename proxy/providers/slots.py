"""A backend's connections as a counted good: so many requests at once, first come first served, a bounded queue."""

from __future__ import annotations

import asyncio
from collections import deque

from ext.occupancy import Occupancy
from proxy.providers.base import Unreachable


class Slots:
    """Slots of one backend. Who takes one gives it back.

    Invariant: nobody waits while a slot is free; a slot given to a waiter that is cancelled in the same turn of the
    loop goes on to the next.
    """

    __slots__ = ("_most_waiting", "_name", "_waiters", "places")

    def __init__(self, name: str, most: int, most_waiting: int) -> None:
        """`places` may be taken and given without asking here: who waits then hears of it."""
        self._name = name
        self.places = Occupancy(most)
        self._most_waiting = most_waiting
        self._waiters: deque[asyncio.Future[None]] = deque()

    def take_now(self) -> bool:
        """Take a slot if one is free."""
        return self.places.take()

    async def take(self, timeout_s: float) -> None:
        """Take a slot, after waiting for it at most so long. Raises `Unreachable`."""
        if self.take_now():
            return
        if len(self._waiters) >= self._most_waiting:
            raise Unreachable(f"backend {self._name} has no free connection and {len(self._waiters)} requests wait")
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self.places.on_give = self._hand_on
        try:
            async with asyncio.timeout(timeout_s):
                await waiter
        except BaseException as error:
            if waiter.done() and not waiter.cancelled():
                self.give()  # it was ours already
            elif waiter in self._waiters:
                self._waiters.remove(waiter)
            if isinstance(error, TimeoutError):
                raise Unreachable(f"backend {self._name} had no free connection for {timeout_s:g} s") from None
            raise

    def give(self) -> None:
        """Give a slot back: the first who waits has it then."""
        self.places.give()

    def _hand_on(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                self.places.take()
                waiter.set_result(None)
                return
        self.places.on_give = None

    def __repr__(self) -> str:
        return f"<Slots of {self._name}: {self.places.taken} of {self.places.most} taken, {len(self._waiters)} wait>"
