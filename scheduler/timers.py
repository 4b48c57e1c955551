"""Moments to wake at, in a heap. Lazy: a timer whose reason has gone is dropped when it comes due."""

from __future__ import annotations

import heapq
from collections.abc import Callable

Timer = tuple[float, int, str, str | int]  # when, tie-breaker, kind, whose


class Timers:
    """push and pop are O(log n). `compact` keeps the heap in proportion to what is alive."""

    def __init__(self) -> None:
        self._heap: list[Timer] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, at_s: float, kind: str, key: str | int) -> None:
        """Come back at this moment."""
        self._count += 1
        heapq.heappush(self._heap, (at_s, self._count, kind, key))

    def pop_due(self, now: float) -> Timer | None:
        """The earliest timer that is due, or None."""
        if self._heap and self._heap[0][0] <= now:
            return heapq.heappop(self._heap)
        return None

    def next_at(self) -> float | None:
        """When the earliest timer is due."""
        return self._heap[0][0] if self._heap else None

    def compact(self, alive: Callable[[Timer], bool], live_count: int) -> None:
        """Drop dead timers once they are most of the heap: amortised O(1) a push."""
        if len(self._heap) > 64 and len(self._heap) > 4 * live_count:
            self._heap = [timer for timer in self._heap if alive(timer)]
            heapq.heapify(self._heap)
