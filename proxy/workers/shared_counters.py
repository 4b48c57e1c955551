"""The limits' counts in memory that the proxy and its workers share: a file without a name, inherited and mapped.

Each worker counts under the number of its place, so that what a dead one had in use can be told and is freed.
"""

from __future__ import annotations

import mmap
import os

from ext.rate_counters import RateCounters

MOST_NAMES = 1 << 17  # keys and models with a limit, ever, in the life of one proxy; pages are used as names come


class SharedCounters:
    """The memory, as its owner has it. `fd` is for workers to inherit."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self.fd = os.memfd_create("vramp-limits", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, RateCounters.bytes_for(MOST_NAMES, workers))
        self._counters = counters_in(self.fd, workers, 0)

    def forget(self, slot: int) -> None:
        """The worker in this place is gone: what it had in use is free."""
        self._counters.forget(slot)

    def close(self) -> None:
        """Nobody inherits it any more. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def counters_in(fd: int, workers: int, slot: int) -> RateCounters:
    """The counters in the memory behind `fd`, for one of so many workers. Raises ValueError where they are not native:
    those count in one process only."""
    return RateCounters(mmap.mmap(fd, 0), processes=workers, process=slot)
