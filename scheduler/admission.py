"""What waits for one model: latency classes, FIFO inside a class, cancel in O(1).

The semaphore of an engine only counts (`ext.weighted_semaphore.Capacity`); tickets wait here. A head that does not fit
keeps its place: nobody behind it passes, else a large request could starve behind small ones for ever.
"""

from __future__ import annotations

from collections import OrderedDict

from scheduler.model import LatencyClass, Ticket


class Waiting:
    """A ticket in the queue. `order` grows with every arrival; `since_s` is when it came."""

    __slots__ = ("order", "since_s", "ticket")

    def __init__(self, ticket: Ticket, order: int, since_s: float) -> None:
        self.ticket = ticket
        self.order = order
        self.since_s = since_s

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller goes first: class, then arrival."""
        return (self.ticket.latency_class, self.order)


class WaitQueue:
    """Tickets by class, each class in order of arrival. push, remove, head and pop are O(1)."""

    __slots__ = ("_classes", "_length")

    def __init__(self) -> None:
        # OrderedDict, not dict: the head of a dict that loses its head again and again is found in O(n)
        self._classes: tuple[OrderedDict[int, Waiting], ...] = tuple(OrderedDict() for _ in LatencyClass)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        counts = " ".join(f"{c.name.lower()}={len(self._classes[c])}" for c in LatencyClass if self._classes[c])
        return f"<WaitQueue {counts or 'empty'}>"

    def push(self, waiting: Waiting) -> None:
        """Join the end of one's class."""
        self._classes[waiting.ticket.latency_class][waiting.ticket.id] = waiting
        self._length += 1

    def head(self) -> Waiting | None:
        """Who is next."""
        for tickets in self._classes:
            for waiting in tickets.values():
                return waiting
        return None

    def remove(self, ticket: Ticket) -> Waiting | None:
        """Take out a ticket wherever it stands; None when it is not here."""
        waiting = self._classes[ticket.latency_class].pop(ticket.id, None)
        if waiting is not None:
            self._length -= 1
        return waiting

    def drain(self) -> list[Waiting]:
        """Everybody, in order; the queue is empty afterwards. O(n)."""
        everybody = [waiting for tickets in self._classes for waiting in tickets.values()]
        for tickets in self._classes:
            tickets.clear()
        self._length = 0
        return everybody

    def count(self, latency_class: LatencyClass) -> int:
        """How many of a class wait."""
        return len(self._classes[latency_class])

    def ahead(self, waiting: Waiting) -> int:
        """At most this many go first; an upper bound, since cancelled ones are counted too. O(1)."""
        own = waiting.ticket.latency_class
        before = sum(len(self._classes[c]) for c in range(own))
        first = next(iter(self._classes[own].values()), waiting)
        return before + min(waiting.order - first.order, len(self._classes[own]) - 1)
