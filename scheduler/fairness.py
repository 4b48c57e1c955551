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

from collections.abc import Iterable
from typing import Protocol

from scheduler.model import LatencyClass

FIRST_RATE = 500.0  # tokens a second of an engine that has not been measured yet
LEAST_BUSY_S = 1.0
PACE_MEMORY_S = 600.0  # busy seconds after which what is known of an engine's pace counts half
MOST_SHARERS = 16  # of one load: the share of the next would be too small to matter


def largest_gap(ticket_tokens: int, engine_tokens: int, load_tokens: int = 0) -> int:
    """The bound of this module, in tokens; `scheduler.simulate.gap` measures the gap of a simulation."""
    return 2 * (ticket_tokens + engine_tokens + load_tokens)


class Line(Protocol):
    """Where a tenant has a counter: one `FairQueue`."""

    def charge(self, tenant: str, latency_class: int, tokens: int) -> None:
        """Add to the tenant's counter in a class, if it has one."""
        ...


class Fairness:
    """Where each tenant waits, so that what it gets at one place counts at the others. Every call is O(places)."""

    __slots__ = ("_places",)

    def __init__(self) -> None:
        self._places: dict[str, dict[tuple[Line, LatencyClass], int]] = {}  # how many of its tickets wait where

    def waits(self, tenant: str, line: Line, latency_class: LatencyClass) -> None:
        """One more of the tenant's tickets waits there."""
        places = self._places.setdefault(tenant, {})
        place = (line, latency_class)
        places[place] = places.get(place, 0) + 1

    def left(self, tenant: str, line: Line, latency_class: LatencyClass) -> None:
        """One waits there no more."""
        places = self._places[tenant]
        place = (line, latency_class)
        if places[place] > 1:
            places[place] -= 1
            return
        del places[place]
        if not places:
            del self._places[tenant]

    def charge(self, tenant: str, line: Line, latency_class: LatencyClass, tokens: int) -> None:
        """Charge what the tenant got in this line, there and wherever else it waits. Below 0 gives back."""
        line.charge(tenant, latency_class, tokens)
        self.charge_elsewhere(tenant, line, latency_class, tokens)

    def charge_elsewhere(self, tenant: str, line: Line, latency_class: LatencyClass, tokens: int) -> None:
        """The same for a grant: its own line has charged it already."""
        for place in self._places.get(tenant, ()):
            if place != (line, latency_class):
                place[0].charge(tenant, place[1], tokens)

    def check(self, waiting: Iterable[tuple[str, Line, LatencyClass]]) -> None:
        """The places are exactly those of the tickets that wait. O(waiting)."""
        seen: dict[str, dict[tuple[Line, LatencyClass], int]] = {}
        for tenant, line, latency_class in waiting:
            places = seen.setdefault(tenant, {})
            places[line, latency_class] = places.get((line, latency_class), 0) + 1
        assert seen == self._places


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
