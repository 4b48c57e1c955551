"""What a proxy is told to do, by signals and by its keeper: stop, leave, or read its configuration again."""

from __future__ import annotations

import asyncio
from enum import IntEnum


class Order(IntEnum):
    """The most pressing first."""

    STOP = 0  # refuse what is new, finish what is in flight, end
    LEAVE = 1  # another proxy serves: finish what is in flight, end
    RELOAD = 2


class Orders:
    """Orders that were given and not carried out. One that is given twice is carried out once."""

    def __init__(self) -> None:
        self._open: set[Order] = set()
        self._given = asyncio.Event()

    def give(self, order: Order) -> None:
        """Carry this out next, unless something else is more pressing."""
        self._open.add(order)
        self._given.set()

    async def next(self) -> Order:
        """The most pressing one, which is then carried out."""
        while not self._open:
            self._given.clear()
            await self._given.wait()
        order = min(self._open)
        self._open.remove(order)
        return order
