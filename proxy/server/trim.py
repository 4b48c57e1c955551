"""Memory goes back to the system when a crowd has gone.

The allocator keeps what was freed for the next crowd: after ten thousand streams a process stayed a quarter above what
it had been. `malloc_trim` gives it back in some milliseconds, so it is asked only after a crowd, not all the time.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable

LOOK_S = 5.0
CROWD = 500  # requests at once: fewer leave nothing worth the call
GONE = 4  # a crowd has gone when no more than one in so many is left
LOOKS = 12  # so many more times: idle connections upstream and timers let go of theirs within a minute


def malloc_trim() -> Callable[[], object] | None:
    """glibc's; None on a system that has another allocator."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return None if trim is None else lambda: trim(0)


class Trimmer:
    """`in_flight` tells how many requests there are; `give_back` is called when they were many and are few."""

    def __init__(self, in_flight: Callable[[], int], give_back: Callable[[], object]) -> None:
        self._in_flight = in_flight
        self._give_back = give_back
        self._most = 0
        self._left = 0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Look every few seconds, on the running loop, until `stop`."""
        self.look()
        self._timer = asyncio.get_running_loop().call_later(LOOK_S, self.start)

    def stop(self) -> None:
        """Idempotent."""
        if self._timer is not None:
            self._timer.cancel()

    def look(self) -> None:
        """Once the crowd has gone, give back what it left, and for a minute what it leaves behind."""
        now = self._in_flight()
        if self._most >= CROWD and now * GONE <= self._most:
            self._most, self._left = 0, LOOKS
        self._most = max(self._most, now)
        if self._left:
            self._left -= 1
            self._give_back()
