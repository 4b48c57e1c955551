"""What waits for one model, and who of it is let into its engine next.

The semaphore of an engine only counts (`ext.weighted_semaphore.Capacity`); tickets wait here, in an
`ext.fair_queue.FairQueue`: latency classes, inside a class tenants by what they have been charged
(`scheduler.fairness`), inside a tenant first come, first served. Grants are made in one call for all that fits; of
what goes together, prompts that begin alike stand together, so that their engine reads the beginning once (its prefix
cache). That changes the order of those who go now, never who goes: it costs nobody anything.

A head that does not fit keeps its place: the room that frees is kept for it and nobody passes, else a large request
could starve behind small ones for ever. A ticket that is overdue goes out of turn, but only every `AGEING_SHARE`-th
grant is such a one: under a flood everybody is overdue, and then order of arrival would be all that counts and whoever
floods would have what he wants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import inf

from ext.backlog import Backlog
from ext.fair_queue import FairQueue
from ext.weighted_semaphore import Capacity
from scheduler.eta import Stage
from scheduler.fairness import MOST_TOKENS, Fairness, Line
from scheduler.model import LatencyClass, Ticket

AGEING_SHARE = 4
MOST_WAITING = 1 << 20  # a queue's own limit; what a model lets wait is a setting of its own


class Waiting:
    """A ticket in the queue. `order` grows with every arrival; `since_s` is when it came, `due_s` until when it is on
    time, `overdue_s` from when it may go out of turn. `tokens` is what it is charged, and holds in the engine."""

    __slots__ = ("due_s", "estimate_s", "order", "overdue_s", "since_s", "stage", "ticket", "tokens")

    def __init__(
        self, ticket: Ticket, order: int, since_s: float, due_s: float, overdue_s: float, tokens: int = 1
    ) -> None:
        self.ticket = ticket
        self.order = order
        self.since_s = since_s
        self.due_s = due_s
        self.overdue_s = overdue_s
        self.tokens = tokens
        self.stage = Stage.QUEUED  # where it stood when it came, and
        self.estimate_s = 0.0  # for how long it was thought to wait


class WaitQueue:
    """Tickets by class, tenant and arrival. `take` is O(log n) for each ticket that it lets in, push and remove
    O(log n), the rest O(1) where it says nothing else.

    The same tickets are in `_tickets` by number, in `_fair`, which knows their order, in `backlog` as sums, and in
    `_fairness` by tenant.
    """

    __slots__ = ("_fair", "_fairness", "_now", "_tickets", "_turned", "backlog")

    def __init__(self, fairness: Fairness | None = None, turned: Callable[[], None] = lambda: None) -> None:
        """`turned` is called when the first has come, and when the last has gone."""
        self._fair = FairQueue(
            MOST_WAITING, patience_s=(0.0,) * len(LatencyClass), ageing_share=AGEING_SHARE, max_passes=0
        )
        self._fairness = fairness if fairness is not None else Fairness()
        self._tickets: dict[int, Waiting] = {}
        self._turned = turned
        self._now = -inf
        self.backlog = Backlog()

    def __len__(self) -> int:
        return len(self._tickets)

    def __repr__(self) -> str:
        counts = " ".join(f"{c.name.lower()}={self.count(c)}" for c in LatencyClass if self.count(c))
        return f"<WaitQueue {counts or 'empty'}>"

    def push(self, waiting: Waiting) -> None:
        """Join the end of one's tenant's line."""
        ticket = waiting.ticket
        waiting.tokens = max(1, min(waiting.tokens, MOST_TOKENS))
        self._fairness.catch_up(self._fair)
        self._fair.push(
            ticket.id,
            ticket.tenant,
            waiting.tokens,
            self._clock(waiting.since_s),
            latency_class=ticket.latency_class,
            overdue_s=waiting.overdue_s,
            prefix=ticket.prefix,
        )
        self._tickets[ticket.id] = waiting
        self._fairness.waits(ticket.tenant, self._fair, ticket.latency_class)
        self.backlog.add(waiting.since_s, waiting.due_s)
        if len(self._tickets) == 1:
            self._turned()

    def take(self, capacity: Capacity, now: float) -> list[Waiting]:
        """Everybody who goes now, in order; their weights have been taken from the capacity and charged.

        An engine where nobody is takes the head, however large it looks: its weight is an estimate, and the capacity
        may have been made smaller since it came.
        """
        now = self._clock(now)
        out: list[Waiting] = []
        # again while there was somebody: what a grant charges in other classes may change whose turn it is there
        while batch := self._next_batch(capacity, now):
            out += [self._grant(ticket_id, capacity) for ticket_id in batch]
        head = None if out or capacity.held_sequences else self.head()
        if head is not None and capacity.try_take(min(head.tokens, capacity.tokens)):
            self.remove(head.ticket)
            head.tokens = min(head.tokens, capacity.tokens)
            self.charge(head.ticket.tenant, head.ticket.latency_class, head.tokens)
            out.append(head)
        return out

    def head(self) -> Waiting | None:
        """Whose turn it is."""
        self._fairness.catch_up(self._fair)
        ticket_id = self._fair.head()
        return None if ticket_id is None else self._tickets[ticket_id]

    def heads(self) -> list[Waiting]:
        """Who has waited longest in every class that waits."""
        oldest = map(self._fair.oldest, LatencyClass)
        return [self._tickets[ticket_id] for ticket_id in oldest if ticket_id is not None]

    def overdue_since(self) -> float:
        """When the first of those who wait becomes, or became, overdue."""
        return self._fair.next_overdue_s

    def first_since_s(self) -> float:
        """When the one who has waited longest came."""
        return min((head.since_s for head in self.heads()), default=inf)

    def first_deadline_s(self) -> float:
        """The earliest deadline of anybody here. O(n)."""
        deadlines = (waiting.ticket.deadline_s for waiting in self._tickets.values())
        return min((deadline for deadline in deadlines if deadline is not None), default=inf)

    def remove(self, ticket: Ticket) -> Waiting | None:
        """Take out a ticket wherever it stands, uncharged; None when it is not here."""
        waiting = self._tickets.get(ticket.id)
        if waiting is not None:
            self._fairness.catch_up(self._fair)
            self._fair.cancel(ticket.id)
            self._forget(waiting)
        return waiting

    def drain(self) -> list[Waiting]:
        """Everybody, by class and arrival; the queue is empty afterwards. O(n log n)."""
        everybody = sorted(self._tickets.values(), key=lambda each: (each.ticket.latency_class, each.order))
        for waiting in everybody:
            self.remove(waiting.ticket)
        return everybody

    def charge(self, tenant: str, latency_class: LatencyClass, tokens: int) -> None:
        """Add to what a tenant has been charged, here and wherever else it waits. Below 0 gives back."""
        self._fairness.charge(tenant, self._fair, latency_class, max(-MOST_TOKENS, min(MOST_TOKENS, tokens)))

    def charged(self, tenant: str, latency_class: LatencyClass) -> int:
        """The tenant's counter in a class."""
        self._fairness.catch_up(self._fair)
        return self._fair.counter(tenant, latency_class)

    def count(self, latency_class: LatencyClass) -> int:
        """How many of a class wait."""
        return self._fair.count(latency_class)

    def ahead(self, waiting: Waiting) -> int:
        """About how many go first: those of shorter classes, and those of its own that came before. Tenants that had
        less may go before it as well, those that had more after it."""
        own = waiting.ticket.latency_class
        before = sum(map(self._fair.count, range(own)))
        oldest = self._fair.oldest(own)
        first = waiting if oldest is None else self._tickets[oldest]
        return before + min(waiting.order - first.order, self._fair.count(own) - 1)

    def places(self) -> Iterator[tuple[str, Line, LatencyClass]]:
        """Tenant, line and class of everybody. O(n)."""
        for waiting in self._tickets.values():
            yield waiting.ticket.tenant, self._fair, waiting.ticket.latency_class

    def check(self) -> None:
        """What always holds. O(n)."""
        assert len(self._tickets) == len(self._fair) == len(self.backlog)
        assert all(ticket_id in self._fair for ticket_id in self._tickets)

    def _next_batch(self, capacity: Capacity, now: float) -> list[int]:
        self._fairness.catch_up(self._fair)
        return self._fair.take(capacity.free_tokens, capacity.free_sequences, now)

    def _grant(self, ticket_id: int, capacity: Capacity) -> Waiting:
        waiting = self._tickets[ticket_id]
        ticket = waiting.ticket
        self._forget(waiting)
        capacity.try_take(waiting.tokens)
        self._fairness.charge_elsewhere(ticket.tenant, self._fair, ticket.latency_class, waiting.tokens)
        return waiting

    def _forget(self, waiting: Waiting) -> None:
        ticket = waiting.ticket
        del self._tickets[ticket.id]
        self._fairness.left(ticket.tenant, self._fair, ticket.latency_class)
        self.backlog.remove(waiting.since_s, waiting.due_s)
        if not self._tickets:
            self._turned()

    def _clock(self, now: float) -> float:
        """The queue's clock never goes back; ours may, by what a machine's clocks differ."""
        self._now = max(self._now, now)
        return self._now
