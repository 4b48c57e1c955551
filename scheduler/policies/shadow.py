"""What llama-swap's rule would do with the same arrivals: a shadow run of `collate`, bookkeeping only.

It answers one question: the 99th percentile of the wait that this rule would cause. That is the yardstick for how long
a late request may reasonably be kept waiting on this machine under this load, which no fixed multiple of a deadline is.

Deterministic: answers take their model's mean time, loads theirs. The devices of a kind are one memory with as many
transfers at a time as there are devices. Cost: O(log n) an arrival, O(models log models) a load; the percentile looks
at the longest waits only.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Callable
from itertools import islice

SAMPLES = 500  # waits that the percentile is taken over


class _Model:
    """Its size in the shadow, and what it does there."""

    __slots__ = ("busy_until", "ready", "waiting")

    def __init__(self) -> None:
        self.ready = False
        self.busy_until = 0.0
        self.waiting: list[float] = []


class CollateShadow:
    """`needs(name)` gives (bytes, load seconds, seconds of an answer) of a model."""

    def __init__(self, memory_bytes: int, channels: int, needs: Callable[[str], tuple[int, float, float]]) -> None:
        self._free = memory_bytes
        self._channels = channels
        self._needs = needs
        self._models: dict[str, _Model] = {}
        self._recent: OrderedDict[str, None] = OrderedDict()  # the ready ones, least recently used first
        self._queue: OrderedDict[str, None] = OrderedDict()  # the wanted ones, longest waiting first
        self._loads: list[tuple[float, str]] = []
        self._retry_s = 0.0
        self._held: dict[str, int] = {}
        self._waits: deque[float] = deque(maxlen=SAMPLES)
        self._since: list[float] = []  # sorted: since when those wait who still do

    def arrive(self, name: str, now: float) -> None:
        """A request for this model."""
        self._advance(now)
        model = self._models.setdefault(name, _Model())
        if model.ready:
            self._serve(name, model, now, now)
        else:
            model.waiting.append(now)
            insort(self._since, now)
            if name not in self._held:  # else it is being loaded
                self._queue.setdefault(name)
                self._load(now)

    def p99_s(self, now: float) -> float:
        """The 99th percentile of the last waits; those that still wait count with what they have waited."""
        self._advance(now)
        count = len(self._waits) + len(self._since)
        longer = count - 1 - min(count - 1, int(0.99 * count))
        still = (now - since for since in self._since)
        return next(islice(heapq.merge(sorted(self._waits, reverse=True), still, reverse=True), longer, None), 0.0)

    def _serve(self, name: str, model: _Model, since: float, now: float) -> None:
        model.busy_until = max(model.busy_until, now + self._needs(name)[2])
        self._recent[name] = None
        self._recent.move_to_end(name)
        self._waits.append(now - since)

    def _advance(self, now: float) -> None:
        """Loads end, and victims become idle, up to this moment."""
        while True:
            ends = self._loads[0][0] if self._loads else now + 1.0
            at = min(ends, self._retry_s) if self._retry_s else ends
            if at > now:
                return
            self._retry_s = 0.0
            if ends <= at:
                _, name = heapq.heappop(self._loads)
                model = self._models[name]
                model.ready = True
                for since in model.waiting:
                    del self._since[bisect_left(self._since, since)]
                    self._serve(name, model, since, ends)
                model.waiting = []
            self._load(at)

    def _load(self, now: float) -> None:
        """The longest waiting model, as often as transfer and room are free. Nobody passes it, as in the real rule."""
        while self._queue and len(self._loads) < self._channels:
            name = next(iter(self._queue))
            size, load_s, _ = self._needs(name)
            if not self._make_room(size, now):
                return
            del self._queue[name]
            self._free -= size
            self._held[name] = size
            heapq.heappush(self._loads, (now + load_s, name))

    def _make_room(self, size: int, now: float) -> bool:
        """Evict the least recently used, if all of them are idle; else come back when the first is."""
        victims, free = [], self._free
        for name in self._recent:
            if free >= size:
                break
            if self._models[name].busy_until <= now:
                victims.append(name)
                free += self._held[name]
        if free < size:
            busy = [self._models[name].busy_until for name in self._recent if self._models[name].busy_until > now]
            if busy:
                self._retry_s = min(busy) if not self._retry_s else min(self._retry_s, *busy)
            return False
        for name in victims:
            self._models[name].ready = False
            del self._recent[name]
            self._free += self._held.pop(name)
        return True
