"""What tenants are charged, so that nobody pays with waiting for what others use.

Whoever waits for a model, waits in its `ext.fair_queue.FairQueue`: inside a latency class the tenant with the smallest
virtual token counter goes first (VTC: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024). VTC knows
one engine and tokens only. Here a counter also grows by

- what its tenant gets from *other* models and classes while it waits for this one, and
- the loads that its tenant causes: the seconds that a load takes are seconds in which nobody is served, so they are
  charged as the tokens that the model's engine would have made meanwhile. The tenant whose ticket had waited longest
  when the load began pays all of it first; every tenant who then uses the engine takes over an equal share.

Charged is the estimate (prompt, and limit or expected output) at the grant, corrected to the real usage at the end.
What is let in while nobody waits is not charged: it is taken from nobody.

**The bound.** Two tenants that both wait in one class of one model, all the time from s to t, whatever they or others
flood it with. Let W be the largest charge for one ticket, M the most tokens in the engine at once, C the largest charge
for one load. The one is then served from this line at most

    2 * (W + M + C)

tokens more than the other is charged in that time (`largest_gap`): the first is let in only while its counter is not
above the other's, so at its last grant it was ahead by no more than that grant, W; a counter is off the truth by what
is in flight and not settled, M at most, and by the one load whose price is being divided, C; and that holds at s as
well as at t. Without loads C is 0 and it is VTC's own bound, 2 * max(input, M), in its safe form of a sum. It holds as
long as answers stay within what was charged for them, and while no ticket is overdue: of the grants that follow
(`scheduler.admission.AGEING_SHARE`) one in four goes to the longest overdue, whosever it is.

What tenants are fair about is the order inside a model. Which model is loaded is the ordering policy's choice.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from itertools import islice
from typing import Protocol

from scheduler.model import LatencyClass

FIRST_RATE = 500.0  # tokens a second of an engine that has not been measured yet
LEAST_BUSY_S = 1.0
PACE_MEMORY_S = 600.0  # busy seconds after which what is known of an engine's pace counts half
MOST_TOKENS = 1 << 40  # of one charge
RECENT = 1024  # charges remembered one by one
MOST_SHARERS = 16  # of one load: the share of the next would be too small to matter


def largest_gap(ticket_tokens: int, engine_tokens: int, load_tokens: int = 0) -> int:
    """The bound of this module, in tokens; `scheduler.simulate.gap` measures the gap of a simulation."""
    return 2 * (ticket_tokens + engine_tokens + load_tokens)


class Line(Protocol):
    """Where a tenant has a counter: one `FairQueue`."""

    def charge(self, tenant: str, latency_class: int, tokens: int) -> None:
        """Add to the tenant's counter in a class, if it has one."""
        ...


class _Tenant:
    """`charged` while it waits somewhere, and at how many `places` it does."""

    __slots__ = ("charged", "places")

    def __init__(self) -> None:
        self.charged = self.places = 0


class _Place:
    """A tenant in a line and class: its tickets there, and how much of its tenant's `charged` is in the counter."""

    __slots__ = ("charged", "tenant", "tickets")

    def __init__(self, tenant: _Tenant) -> None:
        self.tenant = tenant
        self.charged = tenant.charged
        self.tickets = 0


class _Book:
    """The places of a line, and how many charges it has seen."""

    __slots__ = ("charges", "places")

    def __init__(self, charges: int) -> None:
        self.charges = charges
        self.places: dict[tuple[str, LatencyClass], _Place] = {}


class Fairness:
    """Where each tenant waits, so that what it gets at one place counts at the others.

    A charge is noted once; the counters elsewhere catch up when somebody looks at their line (`catch_up`), which must
    come before every look. The refused alternative, to charge all places at once, costs every grant as much as there
    are models that its tenant waits for. Every call is O(1), but for `catch_up`: O(charges since the line's last), and
    never more than O(places in the line).
    """

    __slots__ = ("_books", "_charges", "_recent", "_tenants")

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant] = {}  # those that wait
        self._books: dict[Line, _Book] = {}  # of lines in which somebody waits
        self._charges = 0
        self._recent: deque[str] = deque(maxlen=RECENT)  # who was charged, the latest last

    def waits(self, tenant: str, line: Line, latency_class: LatencyClass) -> None:
        """One more of the tenant's tickets waits there."""
        book = self._books.get(line)
        if book is None:
            book = self._books[line] = _Book(self._charges)
        place = book.places.get((tenant, latency_class))
        if place is None:
            owner = self._tenants.setdefault(tenant, _Tenant())
            owner.places += 1
            place = book.places[tenant, latency_class] = _Place(owner)
        place.tickets += 1

    def left(self, tenant: str, line: Line, latency_class: LatencyClass) -> None:
        """One waits there no more."""
        book = self._books[line]
        place = book.places[tenant, latency_class]
        place.tickets -= 1
        if place.tickets:
            return
        _settle(line, tenant, latency_class, place)
        del book.places[tenant, latency_class]
        if not book.places:
            del self._books[line]
        place.tenant.places -= 1
        if not place.tenant.places:
            del self._tenants[tenant]

    def charge(self, tenant: str, line: Line, latency_class: LatencyClass, tokens: int) -> None:
        """Charge what the tenant got in this line, there and wherever else it waits. Below 0 gives back."""
        line.charge(tenant, latency_class, tokens)
        self.charge_elsewhere(tenant, line, latency_class, tokens)

    def charge_elsewhere(self, tenant: str, line: Line, latency_class: LatencyClass, tokens: int) -> None:
        """The same for a grant: its own line has charged it already."""
        owner = self._tenants.get(tenant)
        if owner is None:
            return
        owner.charged += tokens
        self._charges += 1
        self._recent.append(tenant)
        book = self._books.get(line)
        own = None if book is None else book.places.get((tenant, latency_class))
        if own is not None:
            own.charged += tokens

    def catch_up(self, line: Line) -> None:
        """Bring the line's counters up to what its tenants have been charged elsewhere."""
        book = self._books.get(line)
        if book is None or book.charges == self._charges:
            return
        missed, book.charges = self._charges - book.charges, self._charges
        if missed > RECENT or missed * len(LatencyClass) >= len(book.places):
            for (tenant, latency_class), place in book.places.items():
                _settle(line, tenant, latency_class, place)
            return
        for tenant in islice(reversed(self._recent), missed):
            for latency_class in LatencyClass:
                some = book.places.get((tenant, latency_class))
                if some is not None:
                    _settle(line, tenant, latency_class, some)

    def check(self, waiting: Iterable[tuple[str, Line, LatencyClass]]) -> None:
        """The places are exactly those of the tickets that wait. O(waiting)."""
        seen = Counter((line, (tenant, latency_class)) for tenant, line, latency_class in waiting)
        known = {(line, at): place.tickets for line, book in self._books.items() for at, place in book.places.items()}
        assert seen == known
        assert {name: tenant.places for name, tenant in self._tenants.items()} == Counter(at[0] for _, at in known)


def _settle(line: Line, tenant: str, latency_class: LatencyClass, place: _Place) -> None:
    while missing := place.tenant.charged - place.charged:
        part = max(-MOST_TOKENS, min(MOST_TOKENS, missing))
        line.charge(tenant, latency_class, part)
        place.charged += part


class LoadShares:
    """The price of one load, in tokens, divided among those who use what was loaded. sum(shares) == tokens, always."""

    __slots__ = ("_classes", "shares", "tokens")

    def __init__(self, tokens: int, tenant: str, latency_class: LatencyClass) -> None:
        self.tokens = tokens
        self.shares: dict[str, int] = {tenant: tokens}  # whoever caused it is the first, and pays the remainder
        self._classes = {tenant: latency_class}

    def join(self, tenant: str, latency_class: LatencyClass) -> list[tuple[str, LatencyClass, int]]:
        """A tenant uses it for the first time: who is charged how much (below 0: gets back). O(MOST_SHARERS)."""
        if tenant in self.shares or len(self.shares) >= MOST_SHARERS:
            return []
        before = self.shares
        self._classes[tenant] = latency_class
        each = self.tokens // len(self._classes)
        first = next(iter(before))
        self.shares = dict.fromkeys(self._classes, each)
        self.shares[first] = self.tokens - each * (len(self._classes) - 1)
        return [(name, self._classes[name], share - before.get(name, 0)) for name, share in self.shares.items()]


class Pace:
    """Tokens a second of a model's engine while it has work. Every call is O(1)."""

    __slots__ = ("_busy_s", "_since_s", "_tokens")

    def __init__(self) -> None:
        self._tokens = self._busy_s = self._since_s = 0.0

    def began(self, now: float) -> None:
        """The engine was idle and has work."""
        self._since_s = now

    def ended(self, now: float) -> None:
        """It is idle again."""
        self._busy_s += now - self._since_s
        if self._busy_s > PACE_MEMORY_S:
            self._tokens, self._busy_s = self._tokens / 2, self._busy_s / 2

    def ran(self, seconds: float) -> None:
        """It had work for about so long, and is idle again."""
        self.began(0.0)
        self.ended(seconds)

    def add(self, tokens: int) -> None:
        """So many were read and made."""
        self._tokens += tokens

    @property
    def tokens_per_s(self) -> float:
        """Measured, or a guess while there is nothing to measure."""
        return self._tokens / self._busy_s if self._busy_s >= LEAST_BUSY_S and self._tokens else FIRST_RATE
