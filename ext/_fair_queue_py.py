"""The fair batch queue: what waits for one engine or one model, and which of it goes next, a batch per call.

Three questions in order, each with its own answer:

1. Which class? The most urgent that has tickets; but at least every `ageing_share`-th grant goes to the ticket that
   has been overdue longest (waited longer than its class's patience), if there is one. Refused: letting every overdue
   ticket go first, because under overload all are overdue, and then the order of classes is lost just when it matters.
2. Which tenant? The one with the smallest virtual token counter of that class (VTC: Sheng et al., "Fairness in Serving
   Large Language Models", OSDI 2024). A grant charges the ticket's tokens, `charge` the rest once it is known. A tenant
   that comes back is lifted to the smallest counter of those that wait: what was not used is not saved up.
3. Which ticket? The oldest, or with `shortest_first` the one with the shortest expected output to the power of two
   (predictions are no better than that, and it needs lists where the exact order needs a tree), the oldest among
   equals.

A ticket that does not fit keeps its place, and the room that frees is kept for it; in its whole life it is passed by
at most `max_passes` smaller ones while it is the head. A batch is ordered so that tickets of one shared prompt prefix
stand together: all of it starts now, so that costs nobody anything.

**The worst wait** of a ticket of class c, with L = `limit`, W = `max_tokens`, P = its patience, k = `ageing_share`,
m = `max_passes` and R = the least tokens per second that the engine frees while something waits:

    worst_wait(c) = P(c) + L * (k + m) * W / R

At most L - 1 tickets were overdue before it, and later ones stand behind it. For each of them, and for itself, go at
most k - 1 grants in the order of classes, m passes and its own grant, each of at most W tokens. `worst_wait_s`
computes it. It holds where sequences are not scarcer than tokens, and it is a bound: the ordinary wait is far shorter.

What always holds: a ticket waits in exactly one tenant's line, one class's arrival line, and (with a deadline) the
deadline heap; a tenant stands in its class's order exactly while it has tickets; the number waiting never exceeds
`limit`. This twin is the specification of `_fair_queue.pyx`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from math import inf, isnan
from operator import index
from typing import NamedTuple

from ext.errors import ClockWentBack, NeverFits, NotWaiting, QueueFull

MAX_WEIGHT = 1 << 40  # of one ticket or charge; with MAX_LIMIT it keeps every sum inside 64 bits
MAX_LIMIT = 1 << 20
MAX_COUNTER = 1 << 62
MAX_CLASSES = 16
BUCKETS = 32
_FEWEST_TENANTS = 1024  # below this no idle tenant is forgotten


class FairQueueStats(NamedTuple):
    """Counts since the start; `waiting`, `waiting_tokens`, `by_class` and `tenants` (waiting, in all classes) are of
    now.
    """

    pushed: int
    taken: int
    cancelled: int
    expired: int
    refused: int
    aged: int  # grants that went to an overdue ticket out of turn
    passes: int  # grants that passed a head which did not fit
    waiting: int
    waiting_tokens: int
    peak_waiting: int
    tenants: int
    by_class: tuple[int, ...]


class _Ticket:
    __slots__ = ("bucket", "deadline_s", "id", "line", "overdue_s", "passed", "prefix", "sequences", "tokens")

    def __init__(self, id: int, line: _Line, tokens: int, sequences: int, prefix: int) -> None:  # noqa: A002
        self.id = id
        self.line = line
        self.tokens = tokens
        self.sequences = sequences
        self.prefix = prefix
        self.passed = 0
        self.bucket = 0
        self.overdue_s = self.deadline_s = inf


class _Line:
    """A tenant in a class: its counter and its tickets."""

    __slots__ = ("buckets", "counter", "klass", "serial", "size")

    def __init__(self, klass: _Class, serial: int) -> None:
        self.klass = klass
        self.serial = serial  # breaks ties between equal counters: who was seen first
        self.counter = 0
        self.size = 0
        self.buckets: dict[int, OrderedDict[int, _Ticket]] = {}

    def charge(self, tokens: int) -> None:
        self.counter = max(-MAX_COUNTER, min(MAX_COUNTER, self.counter + tokens))

    def head(self) -> _Ticket:
        return next(iter(self.buckets[min(self.buckets)].values()))

    def add(self, ticket: _Ticket, *, first: bool = False) -> None:
        bucket = self.buckets.setdefault(ticket.bucket, OrderedDict())
        bucket[ticket.id] = ticket
        if first:
            bucket.move_to_end(ticket.id, last=False)
        self.size += 1
        if self.size == 1:
            self.klass.stand(self)

    def remove(self, ticket: _Ticket) -> None:
        bucket = self.buckets[ticket.bucket]
        del bucket[ticket.id]
        if not bucket:
            del self.buckets[ticket.bucket]
        self.size -= 1


class _Class:
    """One latency class: tenants in the order of their counters, tickets in the order of arrival."""

    def __init__(self, patience_s: float) -> None:
        self.patience_s = patience_s
        self.lines: dict[str, _Line] = {}
        self.order: list[tuple[int, int, int, _Line]] = []  # heap; stale where the counter moved or the line is empty
        self.entries = 0  # makes heap entries differ, so that lines are never compared
        self.arrivals: OrderedDict[int, _Ticket] = OrderedDict()
        self.last_left = 0  # the counter of the tenant that waited last
        self.forget_above = _FEWEST_TENANTS
        self.serial = 0

    def line(self, tenant: str) -> _Line:
        line = self.lines.get(tenant)
        if line is None:
            self.forget_idle()
            self.serial += 1
            line = self.lines[tenant] = _Line(self, self.serial)
        if not line.size:
            line.counter = max(line.counter, self.least())
        return line

    def least(self) -> int:
        """The counter to which a tenant that comes back is lifted."""
        first = self.first()
        return self.last_left if first is None else first.counter

    def first(self) -> _Line | None:
        while self.order:
            counter, _, _, line = self.order[0]
            if line.size and line.counter == counter:
                return line
            heappop(self.order)
        return None

    def stand(self, line: _Line) -> None:
        if len(self.order) > 64 and len(self.order) > 4 * len(self.lines):
            self.order = [(it.counter, it.serial, 0, it) for it in self.lines.values() if it.size and it is not line]
            heapify(self.order)
        self.entries += 1
        heappush(self.order, (line.counter, line.serial, self.entries, line))

    def forget_idle(self) -> None:
        # A tenant at or below the least counter would be lifted to it anyway: forgetting it loses nothing. Amortised
        # O(1).
        if len(self.lines) < self.forget_above:
            return
        least = self.least()
        self.lines = {name: it for name, it in self.lines.items() if it.size or it.counter > least}
        self.forget_above = max(_FEWEST_TENANTS, 2 * len(self.lines))


class FairQueue:
    """Latency classes, fair tenants, ageing, batches. Times are seconds of one monotonic clock, passed in.

    `limit` tickets may wait, each of at most `max_tokens` and `max_sequences`; `patience_s` has a number per class,
    the most urgent first. Cost: `push` O(log tenants), `take` O(log tenants) per ticket answered, `cancel` and
    `expire` O(log n) per ticket. Every error leaves the queue as it was: `ValueError`, `OverflowError` or `TypeError`
    for bad values, `QueueFull`, `NeverFits`, `NotWaiting`, `ClockWentBack`.
    """

    def __init__(
        self,
        limit: int = 1000,
        max_tokens: int = MAX_WEIGHT,
        max_sequences: int = MAX_WEIGHT,
        patience_s: Sequence[float] = (0.1, 0.5, 2.0, 10.0, 60.0),
        ageing_share: int = 4,
        max_passes: int = 8,
        shortest_first: bool = False,
    ) -> None:
        _check_settings(limit, patience_s, ageing_share, max_passes)
        self.limit = limit
        self.max_tokens = _above_zero(max_tokens, "max_tokens")
        self.max_sequences = _above_zero(max_sequences, "max_sequences")
        self.ageing_share = ageing_share
        self.max_passes = max_passes
        self.shortest_first = shortest_first
        self._classes = [_Class(float(seconds)) for seconds in patience_s]
        self._tickets: dict[int, _Ticket] = {}
        self._deadlines: list[tuple[float, int]] = []  # heap; entries of tickets that left are stale
        self._now = -inf
        self._turns = 0  # grants since an overdue ticket had its turn, at most ageing_share - 1
        self._waiting_tokens = self._peak_waiting = 0
        self._pushed = self._taken = self._cancelled = self._expired = self._refused = self._aged = self._passes = 0

    # -- looking

    def __len__(self) -> int:
        return len(self._tickets)

    def __contains__(self, ticket: object) -> bool:
        return ticket in self._tickets

    @property
    def next_deadline_s(self) -> float:
        """When `expire` next has something to do; infinity when nobody has a deadline. O(log n) amortised."""
        while self._deadlines and self._is_stale(self._deadlines[0]):
            heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else inf

    def stats(self) -> FairQueueStats:
        """All counts in one value. O(tenants)."""
        return FairQueueStats(
            self._pushed, self._taken, self._cancelled, self._expired, self._refused, self._aged, self._passes,
            len(self._tickets), self._waiting_tokens, self._peak_waiting,
            sum(1 for klass in self._classes for line in klass.lines.values() if line.size),
            tuple(len(klass.arrivals) for klass in self._classes),
        )  # fmt: skip

    def head(self) -> int | None:
        """Whose turn it is at the time of the last call, whether it fits or not; None when nobody waits. Changes
        nothing. O(1) amortised.
        """
        ticket, _ = self._next(self._now, ageing=True)
        return None if ticket is None else ticket.id

    @property
    def next_overdue_s(self) -> float:
        """When the first of those who wait becomes, or became, overdue; infinity when nobody waits. Of each class only
        the oldest ticket is looked at. O(classes).
        """
        oldest = (next(iter(klass.arrivals.values())) for klass in self._classes if klass.arrivals)
        return min((ticket.overdue_s for ticket in oldest), default=inf)

    def oldest(self, latency_class: int) -> int | None:
        """The ticket of the class that came first; None when none waits. O(1)."""
        return next(iter(self._class(latency_class).arrivals), None)

    def count(self, latency_class: int) -> int:
        """How many of the class wait. O(1)."""
        return len(self._class(latency_class).arrivals)

    def counter(self, tenant: str, latency_class: int) -> int:
        """The tenant's virtual token counter in the class: what it was charged, or was lifted to. 0 if unknown."""
        line = self._class(latency_class).lines.get(tenant)
        return line.counter if line else 0

    def worst_wait_s(self, latency_class: int, tokens_per_s: float) -> float:
        """The longest that a ticket of the class can wait: the formula of this module. `tokens_per_s` is the least
        rate, above 0.
        """
        if not tokens_per_s > 0:
            raise ValueError(f"tokens_per_s is {tokens_per_s}; use a number above 0")
        grants = self.limit * (self.ageing_share + self.max_passes)
        return self._class(latency_class).patience_s + grants * self.max_tokens / tokens_per_s

    # -- coming and going

    def push(
        self,
        ticket: int,
        tenant: str,
        tokens: int,
        now: float,
        sequences: int = 1,
        latency_class: int = 2,
        deadline_s: float = inf,
        expected_output: int = 0,
        prefix: int = 0,
        overdue_s: float | None = None,
    ) -> None:
        """Let a ticket wait. `ticket` is any integer that does not wait yet, `prefix` names a shared prompt prefix (0:
        none).

        `tokens` and `sequences` are its weight, both above 0; `expected_output` (tokens) matters with `shortest_first`
        only. `overdue_s` is from when it is overdue, on the clock of `now`, instead of its class's patience from now;
        of each class only the oldest ticket is looked at, so it should not fall from one arrival to the next.
        """
        klass = self._class(latency_class)
        tokens, sequences = _above_zero(tokens, "tokens"), _above_zero(sequences, "sequences")
        if not 0 <= index(expected_output) <= MAX_WEIGHT:
            raise ValueError(f"expected_output is {expected_output}; use 0 to {MAX_WEIGHT} tokens")
        if isnan(deadline_s):
            raise ValueError("deadline_s is NaN; use seconds on the clock of now")
        if overdue_s is not None and isnan(overdue_s):
            raise ValueError("overdue_s is NaN; use seconds on the clock of now")
        if index(ticket) in self._tickets:
            raise ValueError(f"ticket {ticket} waits already")
        self._check_clock(now)
        self._check_door(tokens, sequences)
        self._now = now
        entry = _Ticket(ticket, klass.line(tenant), tokens, sequences, index(prefix))
        entry.overdue_s = now + klass.patience_s if overdue_s is None else float(overdue_s)
        entry.bucket = min(expected_output.bit_length(), BUCKETS - 1) if self.shortest_first else 0
        if deadline_s != inf:
            entry.deadline_s = deadline_s
            heappush(self._deadlines, (deadline_s, ticket))
        entry.line.add(entry)
        self._tickets[ticket] = klass.arrivals[ticket] = entry
        self._pushed += 1
        self._waiting_tokens += tokens
        self._peak_waiting = max(self._peak_waiting, len(self._tickets))

    def cancel(self, ticket: int) -> None:
        """Take a waiting ticket out. Raises `NotWaiting` if it does not wait."""
        entry = self._tickets.get(ticket)
        if entry is None:
            raise NotWaiting(f"ticket {ticket} does not wait")
        self._remove(entry)
        self._cancelled += 1
        self._forget_deadlines()

    def expire(self, now: float) -> list[int]:
        """Take out the tickets whose deadline is `now` or earlier, by deadline. Call it before `take`, which looks at
        no deadline.
        """
        self._check_clock(now)
        self._now = now
        expired = []
        while self.next_deadline_s <= now:
            expired.append(self._deadlines[0][1])
            self._remove(self._tickets[expired[-1]])
        self._expired += len(expired)
        return expired

    def charge(self, tenant: str, latency_class: int, tokens: int) -> None:
        """Add to a tenant's counter what only turned out later: output tokens, load seconds as tokens; below 0 gives
        back.

        A tenant unknown by now owes nothing: it was idle and behind everyone. O(log tenants).
        """
        klass = self._class(latency_class)
        if not -MAX_WEIGHT <= index(tokens) <= MAX_WEIGHT:
            raise ValueError(f"tokens is {tokens}; use {-MAX_WEIGHT} to {MAX_WEIGHT}")
        line = klass.lines.get(tenant)
        if line is not None:
            line.charge(tokens)
            if line.size:
                klass.stand(line)

    # -- the next batch

    def take(self, budget_tokens: int, budget_sequences: int, now: float) -> list[int]:
        """The tickets that go now, all together within the budget; the caller gives each its weight.

        A budget of 0 or less (capacity shrunk under its holders) takes nothing.
        """
        budget_tokens, budget_sequences = index(budget_tokens), index(budget_sequences)
        self._check_clock(now)
        self._now = now
        batch: list[_Ticket] = []
        aside: list[_Ticket] = []  # did not fit; aside[0] is the head, for which room is kept
        while budget_tokens > 0 and budget_sequences > 0 and self._may_pass(aside):
            ticket, aged = self._next(now, ageing=not aside)
            if ticket is None:
                break
            if ticket.tokens > budget_tokens or ticket.sequences > budget_sequences:
                ticket.line.remove(ticket)
                aside.append(ticket)
                continue
            self._go(ticket, aged=aged, passed=aside[0] if aside else None)
            budget_tokens -= ticket.tokens
            budget_sequences -= ticket.sequences
            batch.append(ticket)
        for ticket in reversed(aside):
            ticket.line.add(ticket, first=True)
        return _grouped(batch)

    def _may_pass(self, aside: list[_Ticket]) -> bool:
        return not aside or (aside[0].passed < self.max_passes and len(aside) <= self.max_passes)

    def _next(self, now: float, *, ageing: bool) -> tuple[_Ticket | None, bool]:
        """The ticket whose turn it is, and whether it is one out of turn because it is overdue."""
        if ageing and self._turns >= self.ageing_share - 1:
            oldest = self._longest_overdue(now)
            if oldest is not None:
                return oldest, True
        for klass in self._classes:
            line = klass.first()
            if line is not None:
                return line.head(), False
        return None, False

    def _longest_overdue(self, now: float) -> _Ticket | None:
        oldest = None
        for klass in self._classes:
            if klass.arrivals:
                first = next(iter(klass.arrivals.values()))
                if first.overdue_s <= now and (oldest is None or first.overdue_s < oldest.overdue_s):
                    oldest = first
        return oldest

    def _go(self, ticket: _Ticket, *, aged: bool, passed: _Ticket | None) -> None:
        line = ticket.line
        line.charge(ticket.tokens)
        self._remove(ticket)
        if line.size:
            line.klass.stand(line)
        self._turns = 0 if aged else min(self._turns + 1, self.ageing_share - 1)
        self._taken += 1
        self._aged += aged
        if passed is not None:
            passed.passed += 1
            self._passes += 1

    # -- inside

    def _class(self, latency_class: int) -> _Class:
        if not 0 <= index(latency_class) < len(self._classes):
            raise ValueError(f"latency_class is {latency_class}; use 0 to {len(self._classes) - 1}")
        return self._classes[latency_class]

    def _check_door(self, tokens: int, sequences: int) -> None:
        if tokens > self.max_tokens or sequences > self.max_sequences:
            self._refused += 1
            raise NeverFits(
                f"weight {tokens} tokens, {sequences} sequences is above {self.max_tokens} and {self.max_sequences}"
            )
        if len(self._tickets) >= self.limit:
            self._refused += 1
            raise QueueFull(f"{self.limit} tickets wait already")

    def _check_clock(self, now: float) -> None:
        if isnan(now):
            raise ValueError("now is NaN; use seconds of a monotonic clock")
        if now < self._now:
            raise ClockWentBack(f"now is {now}, it was {self._now} before")

    def _remove(self, ticket: _Ticket) -> None:
        line, klass = ticket.line, ticket.line.klass
        line.remove(ticket)
        del klass.arrivals[ticket.id]
        del self._tickets[ticket.id]
        self._waiting_tokens -= ticket.tokens
        if not klass.arrivals:
            klass.last_left = line.counter

    def _is_stale(self, entry: tuple[float, int]) -> bool:
        # Compared by value: a number that left and came back has another deadline, or the same, which is as good.
        ticket = self._tickets.get(entry[1])
        return ticket is None or ticket.deadline_s != entry[0]

    def _forget_deadlines(self) -> None:
        if len(self._deadlines) > 64 and len(self._deadlines) > 2 * len(self._tickets):
            self._deadlines = sorted({entry for entry in self._deadlines if not self._is_stale(entry)})

    def __repr__(self) -> str:
        waiting = ", ".join(str(len(klass.arrivals)) for klass in self._classes)
        return (
            f"<FairQueue {len(self._tickets)}/{self.limit} waiting ({waiting} by class), {self._waiting_tokens} tokens>"
        )


def _check_settings(limit: int, patience_s: Sequence[float], ageing_share: int, max_passes: int) -> None:
    if not 1 <= limit <= MAX_LIMIT:
        raise ValueError(f"limit is {limit}; use 1 to {MAX_LIMIT}")
    if not 1 <= len(patience_s) <= MAX_CLASSES:
        raise ValueError(f"patience_s has {len(patience_s)} classes; use 1 to {MAX_CLASSES}")
    if not all(0 <= seconds < inf for seconds in patience_s):
        raise ValueError(f"patience_s is {list(patience_s)}; use finite seconds, 0 or more")
    if not 1 <= ageing_share <= 1 << 30:
        raise ValueError(f"ageing_share is {ageing_share}; use 1 (oldest first) or more")
    if not 0 <= max_passes <= 1000:
        raise ValueError(f"max_passes is {max_passes}; use 0 (strict) to 1000")


def _above_zero(amount: int, what: str) -> int:
    amount = index(amount)
    if amount < 1:
        raise ValueError(f"{what} is {amount}; use 1 or more")
    if amount > MAX_WEIGHT:
        raise OverflowError(f"{what} is {amount}; use at most {MAX_WEIGHT}")
    return amount


def _grouped(batch: list[_Ticket]) -> list[int]:
    """The batch with tickets of one prefix next to each other, groups and members in the order of their grants."""
    groups: dict[tuple[int, int], list[int]] = {}
    for place, ticket in enumerate(batch):
        groups.setdefault((ticket.prefix, 0) if ticket.prefix else (0, place), []).append(ticket.id)
    return [ticket for group in groups.values() for ticket in group]
