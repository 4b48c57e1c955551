"""The weighted semaphore: who may hold how much of something that is counted in two units at once.

What the units are is the caller's business (KV tokens and sequences, bytes and engines). `Capacity` only counts;
`WeightedSemaphore` also keeps waiters. Both are synchronous: they decide, the caller waits and wakes. What always
holds, for each of the two units:

- free plus held equals capacity, and what is held is the sum of the weights granted and not yet given back;
- the head of the line does not fit: the head is the oldest waiter of the most urgent class that has one;
- nobody overtakes inside a class, and nobody is passed by a less urgent class: a small weight never slips past a
  large one that waits for room (overtaking within a stated bound is the fair queue's business, not this one's);
- a removed head wakes again, because it may have been the large one that blocked small ones;
- a weight above capacity is refused at the door and, when capacity shrinks, at once: it would wait for ever and block
  its line; smaller holders finish, and free is negative until they do.

The algorithm is the textbook counting semaphore with a FIFO per class (Dijkstra 1965; a wait queue that knows how to
cancel: trio's ParkingLot). This twin is the specification of `_weighted_semaphore.pyx`.
"""

from __future__ import annotations

from collections import OrderedDict
from heapq import heapify, heappop, heappush
from math import inf, isnan
from operator import index
from typing import NamedTuple

from ext.errors import ClockWentBack, NeverFits, NotHeld, NotWaiting

MAX_UNITS = 1 << 62  # so that the native twin's sums stay inside 64 bits
MAX_CLASSES = 64


def _units(amount: int, what: str) -> int:
    amount = index(amount)
    if amount < 0:
        raise ValueError(f"{what} is {amount}; use 0 or more")
    if amount > MAX_UNITS:
        raise OverflowError(f"{what} is {amount}; use at most {MAX_UNITS}")
    return amount


class Capacity:
    """Counts what is held of two units; nobody waits here.

    Every call is O(1). Errors leave the state unchanged: `ValueError` and `OverflowError` for a bad amount,
    `TypeError` for one that is no integer (so NaN too), `NotHeld` for giving back more than is held.
    """

    __slots__ = ("held_sequences", "held_tokens", "sequences", "tokens")

    def __init__(self, tokens: int, sequences: int = MAX_UNITS) -> None:
        self.tokens = _units(tokens, "tokens")
        self.sequences = _units(sequences, "sequences")
        self.held_tokens = 0
        self.held_sequences = 0

    @property
    def free_tokens(self) -> int:
        """What may still be taken; negative while holders of a shrunken capacity finish."""
        return self.tokens - self.held_tokens

    @property
    def free_sequences(self) -> int:
        """What may still be taken; negative while holders of a shrunken capacity finish."""
        return self.sequences - self.held_sequences

    def fits(self, tokens: int, sequences: int = 1) -> bool:
        """Whether `try_take` would succeed. Both units must fit."""
        return self._has_room(_units(tokens, "tokens"), _units(sequences, "sequences"))

    def try_take(self, tokens: int, sequences: int = 1) -> bool:
        """Take both units or neither; False when one does not fit."""
        if not self.fits(tokens, sequences):
            return False
        self._take(tokens, sequences)
        return True

    def _has_room(self, tokens: int, sequences: int) -> bool:
        # Nothing of a unit fits even where its capacity was shrunk under its holders: it takes none of what is missing.
        return (tokens <= self.tokens - self.held_tokens or not tokens) and (
            sequences <= self.sequences - self.held_sequences or not sequences
        )

    def _take(self, tokens: int, sequences: int) -> None:
        self.held_tokens += tokens
        self.held_sequences += sequences

    def give(self, tokens: int, sequences: int = 1) -> None:
        """Give back what `try_take` took."""
        tokens, sequences = _units(tokens, "tokens"), _units(sequences, "sequences")
        if tokens > self.held_tokens or sequences > self.held_sequences:
            raise NotHeld(f"gave back {tokens} tokens and {sequences} sequences to {self!r}")
        self.held_tokens -= tokens
        self.held_sequences -= sequences

    def resize(self, tokens: int, sequences: int = MAX_UNITS) -> None:
        """Set the capacity; what is held stays held, so free may become negative."""
        tokens, sequences = _units(tokens, "tokens"), _units(sequences, "sequences")
        self.tokens, self.sequences = tokens, sequences

    def __repr__(self) -> str:
        return (
            f"<Capacity tokens {self.held_tokens}/{self.tokens} held,"
            f" sequences {self.held_sequences}/{self.sequences} held>"
        )


class SemaphoreStats(NamedTuple):
    """Counts since the start; `waiting` and `held` (tickets) are of now. Every ticket is in exactly one end state."""

    acquired: int  # granted at the door
    parked: int
    woken: int  # granted after waiting
    released: int
    cancelled: int
    expired: int
    refused: int  # above capacity, at the door or after a shrink
    waiting: int
    peak_waiting: int
    held: int


class _Waiter:
    __slots__ = ("deadline_s", "priority", "sequences", "tokens")

    def __init__(self, tokens: int, sequences: int, priority: int, deadline_s: float) -> None:
        self.tokens = tokens
        self.sequences = sequences
        self.priority = priority
        self.deadline_s = deadline_s


class WeightedSemaphore:
    """Two units, priority classes, FIFO inside a class, deadlines. Tickets are positive integers, never used twice.

    A caller writes `ticket = semaphore.try_acquire(w) or semaphore.park(w)`; whoever calls `release`, `cancel`,
    `expire` or `resize` gets back the tickets that this granted, and wakes them. Classes are 0 (most urgent) to
    `classes` - 1, at most
    64. Costs: O(1) for `try_acquire`, `park` without deadline, `cancel`; O(log n) for a deadline; a release is O(1 +
    granted).
    """

    def __init__(self, tokens: int, sequences: int = MAX_UNITS, classes: int = 1) -> None:
        if not 1 <= classes <= MAX_CLASSES:
            raise ValueError(f"classes is {classes}; use 1 to {MAX_CLASSES}")
        self._capacity = Capacity(tokens, sequences)
        self._lines: list[OrderedDict[int, _Waiter]] = [OrderedDict() for _ in range(classes)]
        self._waiting: dict[int, _Waiter] = {}  # the union of the lines
        self._held: dict[int, tuple[int, int]] = {}
        self._deadlines: list[tuple[float, int]] = []  # heap; entries of tickets that left are stale
        self._now = -inf
        self._last_ticket = 0
        self._acquired = self._parked = self._woken = self._released = 0
        self._cancelled = self._expired = self._refused = self._peak_waiting = 0

    # -- counts

    @property
    def tokens(self) -> int:
        """Capacity."""
        return self._capacity.tokens

    @property
    def sequences(self) -> int:
        """Capacity."""
        return self._capacity.sequences

    @property
    def held_tokens(self) -> int:
        """The sum of what is granted and not yet released."""
        return self._capacity.held_tokens

    @property
    def held_sequences(self) -> int:
        """The sum of what is granted and not yet released."""
        return self._capacity.held_sequences

    @property
    def free_tokens(self) -> int:
        """Capacity less held; negative after a shrink until holders finish."""
        return self._capacity.free_tokens

    @property
    def free_sequences(self) -> int:
        """Capacity less held; negative after a shrink until holders finish."""
        return self._capacity.free_sequences

    @property
    def waiting(self) -> int:
        """How many tickets wait."""
        return len(self._waiting)

    @property
    def next_deadline_s(self) -> float:
        """When `expire` next has something to do; infinity when nobody has a deadline. O(log n) amortised."""
        self._drop_stale_deadlines()
        return self._deadlines[0][0] if self._deadlines else inf

    def stats(self) -> SemaphoreStats:
        """All counts in one value."""
        return SemaphoreStats(
            self._acquired, self._parked, self._woken, self._released, self._cancelled, self._expired,
            self._refused, len(self._waiting), self._peak_waiting, len(self._held),
        )  # fmt: skip

    # -- asking

    def try_acquire(self, tokens: int, sequences: int = 1, priority: int = 0) -> int:
        """A ticket that holds the weight, or 0 when it does not fit or would overtake. Never waits.

        Raises `NeverFits` above capacity, `ValueError` for a negative weight or a class that does not exist.
        """
        self._check_door(tokens, sequences, priority)
        if not self._may_enter(tokens, sequences, priority):
            return 0
        self._capacity._take(tokens, sequences)
        self._last_ticket += 1
        self._held[self._last_ticket] = (tokens, sequences)
        self._acquired += 1
        return self._last_ticket

    def park(self, tokens: int, sequences: int = 1, priority: int = 0, deadline_s: float = inf) -> int:
        """A ticket that waits its turn, until `deadline_s` on the clock of `expire`.

        Only after `try_acquire` said 0: a weight that would be granted now is a `ValueError`, as nobody may wait at
        the head who fits. Otherwise raises as `try_acquire` does, and `ValueError` for a deadline that is NaN.
        """
        self._check_door(tokens, sequences, priority)
        if isnan(deadline_s):
            raise ValueError("deadline_s is NaN; use seconds on the caller's monotonic clock")
        if self._may_enter(tokens, sequences, priority):
            raise ValueError("the weight fits now; use try_acquire first")
        self._last_ticket += 1
        waiter = _Waiter(tokens, sequences, priority, deadline_s)
        self._waiting[self._last_ticket] = self._lines[priority][self._last_ticket] = waiter
        if deadline_s != inf:
            heappush(self._deadlines, (deadline_s, self._last_ticket))
        self._parked += 1
        self._peak_waiting = max(self._peak_waiting, len(self._waiting))
        return self._last_ticket

    # -- giving back, each answering the tickets that now hold their weight, in the order of the grants

    def release(self, ticket: int) -> list[int]:
        """Give back a granted ticket's weight. Raises `NotHeld` if the ticket holds nothing."""
        weight = self._held.pop(ticket, None)
        if weight is None:
            raise NotHeld(f"ticket {ticket} holds nothing")
        self._capacity._take(-weight[0], -weight[1])
        self._released += 1
        return self._grant()

    def cancel(self, ticket: int) -> list[int]:
        """Take a waiting ticket out of its line. Raises `NotWaiting` if it does not wait (granted: release it)."""
        if ticket not in self._waiting:
            raise NotWaiting(f"ticket {ticket} does not wait")
        self._leave(ticket)
        self._cancelled += 1
        self._forget_deadlines()
        return self._grant()

    def expire(self, now: float) -> tuple[list[int], list[int]]:
        """The tickets whose deadline is `now` or earlier, by deadline, and those granted because they left.

        Raises `ClockWentBack`, and `ValueError` for NaN. O(log n) per expired ticket.
        """
        if isnan(now):
            raise ValueError("now is NaN; use seconds of a monotonic clock")
        if now < self._now:
            raise ClockWentBack(f"now is {now}, it was {self._now} before")
        self._now = now
        expired = []
        while self.next_deadline_s <= now:
            expired.append(heappop(self._deadlines)[1])
            self._leave(expired[-1])
        self._expired += len(expired)
        return expired, self._grant() if expired else []

    def resize(self, tokens: int, sequences: int = MAX_UNITS) -> tuple[list[int], list[int]]:
        """Set the capacity: the tickets granted by growth, and the waiting ones refused because they cannot fit any
        more.

        O(waiting) when it shrinks, O(1 + granted) when it grows.
        """
        shrinks = tokens < self.tokens or sequences < self.sequences
        self._capacity.resize(tokens, sequences)
        refused = []
        if shrinks:
            refused = [t for t, w in self._waiting.items() if w.tokens > tokens or w.sequences > sequences]
            for ticket in refused:
                self._leave(ticket)
            self._refused += len(refused)
            self._forget_deadlines()
        return self._grant(), refused

    # -- inside

    def _check_door(self, tokens: int, sequences: int, priority: int) -> None:
        tokens, sequences = _units(tokens, "tokens"), _units(sequences, "sequences")
        if not 0 <= index(priority) < len(self._lines):
            raise ValueError(f"priority is {priority}; use 0 to {len(self._lines) - 1}")
        if tokens > self.tokens or sequences > self.sequences:
            self._refused += 1
            raise NeverFits(f"weight {tokens} tokens, {sequences} sequences is above the capacity of {self!r}")

    def _may_enter(self, tokens: int, sequences: int, priority: int) -> bool:
        if self._waiting and any(self._lines[: priority + 1]):
            return False
        return self._capacity._has_room(tokens, sequences)

    def _leave(self, ticket: int) -> _Waiter:
        waiter = self._waiting.pop(ticket)
        del self._lines[waiter.priority][ticket]
        return waiter

    def _grant(self) -> list[int]:
        granted: list[int] = []
        for line in self._lines if self._waiting else ():
            while line:
                ticket, waiter = next(iter(line.items()))
                if not self._capacity._has_room(waiter.tokens, waiter.sequences):
                    self._woken += len(granted)
                    return granted
                self._capacity._take(waiter.tokens, waiter.sequences)
                self._leave(ticket)
                self._held[ticket] = (waiter.tokens, waiter.sequences)
                granted.append(ticket)
        self._woken += len(granted)
        return granted

    def _drop_stale_deadlines(self) -> None:
        while self._deadlines and self._deadlines[0][1] not in self._waiting:
            heappop(self._deadlines)

    def _forget_deadlines(self) -> None:
        # Stale entries are dropped when they outnumber the waiters, so a cancel costs O(1) amortised and memory stays
        # bounded.
        if len(self._deadlines) > 64 and len(self._deadlines) > 2 * len(self._waiting):
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._waiting]
            heapify(self._deadlines)

    def __repr__(self) -> str:
        return (
            f"<WeightedSemaphore tokens {self.held_tokens}/{self.tokens} held,"
            f" sequences {self.held_sequences}/{self.sequences} held, {self.waiting} waiting>"
        )
