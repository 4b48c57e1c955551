"""The default: follow the leader. Every rule runs as a shadow cache on the same requests, who loads least is asked.

A shadow is bookkeeping only: what would be resident under its rule, and the load seconds that it would have paid, with
old ones forgotten. Cost: a use O(rules), a shadow's miss O(models log models).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp
from typing import Protocol

from scheduler.eviction.base import Candidate, Eviction, Ranking
from scheduler.eviction.delay import ExpectedDelay
from scheduler.eviction.gdsf import Gdsf
from scheduler.eviction.landlord import Landlord
from scheduler.eviction.lfu import Lfu
from scheduler.eviction.lru import Lru
from scheduler.forecast import LEAST_WATCHED_S
from scheduler.ledger import DeviceLedger
from scheduler.state import ModelState

MEMORY_S = 300.0  # a load this long ago counts 1/e
# Requests beyond so many a second, after a burst, are not shadowed: a part of them tells the rules apart as well, and a
# miss of every shadow costs some hundred microseconds.
RATE_PER_S, BURST = 20.0, 200.0


class Shadow:
    """One rule's cache: the models that would be resident under it, with their uses and their last."""

    def __init__(self, rule: Eviction) -> None:
        self.rule = rule
        self._paid_s = 0.0
        self._paid_at = 0.0
        self._resident: dict[str, tuple[ModelState, int, int, float]] = {}  # and the bytes that it was loaded with
        self._held = 0

    def touch(self, model: ModelState, uses: int, capacity: int, now: float, books: Books) -> None:
        """A request for this model: load it here if it is not here."""
        name = model.spec.name
        if name not in self._resident:
            self._make_room(self._held + model.spec.memory_bytes - capacity, now, books)
            self._held += model.spec.memory_bytes
            self._resident[name] = (model, model.spec.memory_bytes, uses, now)
            self._paid_s = self.paid_s(now) + model.return_s
            self._paid_at = now
        self._resident[name] = (model, self._resident[name][1], uses, now)

    def paid_s(self, now: float) -> float:
        """Load seconds, old ones forgotten."""
        return self._paid_s * exp(-(now - self._paid_at) / MEMORY_S)

    def _make_room(self, missing: int, now: float, books: Books) -> None:
        if missing <= 0:
            return
        residents = [books.candidate(*seen, now) for seen in self._resident.values()]
        for victim in self.rule.victims(residents, missing, now) or residents:
            del self._resident[victim.model]
            self._held -= victim.held_bytes
            self.rule.evicted(victim)


class Books(Protocol):
    """What a shadow must know of models that are not loaded."""

    def candidate(self, model: ModelState, held: int, uses: int, last_used_s: float, now: float) -> Candidate:
        """The model as a resident."""
        ...


class Adaptive:
    """Expected delay and the textbook rules, each asked and shadowed by an object of its own: they remember different
    evictions. No margin for a new leader: one of a fifth loads 1 % less on average over redraws of two public
    traces, and leaves the first rule too late where that is the wrong one.

    One shadow memory stands for all devices: what matters is which rule suits the requests.
    """

    name = "adaptive"

    def __init__(self) -> None:
        rules: tuple[type[Ranking], ...] = (ExpectedDelay, Gdsf, Lfu, Landlord, Lru)
        self._pairs = [(rule(), Shadow(rule())) for rule in rules]
        self.leader: Eviction = self._pairs[0][0]  # the rule whose shadow has paid least; the first named when level
        self._uses: dict[str, int] = {}
        self._models: Mapping[str, ModelState] = {}
        self._capacity = 0
        self._since_s: float | None = None  # when the first of all requests came
        self._credit, self._credit_s = BURST, 0.0

    def watch(self, models: Mapping[str, ModelState], devices: Mapping[str, DeviceLedger]) -> None:
        """Sizes and load times are read from the books when they are needed: both are learned."""
        self._models = models
        self._capacity = sum(device.limit for device in devices.values())

    def saw(self, arrivals: Sequence[tuple[float, str]]) -> None:
        """Every shadow sees the same requests. O(rules) each, O(residents log residents) for those that it misses."""
        for now, name in arrivals:
            model = self._models.get(name)
            if model is None or not self._affords(now):
                continue
            uses = self._uses[name] = self._uses.get(name, 0) + 1
            for _, shadow in self._pairs:
                shadow.touch(model, uses, self._capacity, now, self)
        if arrivals:
            last_s = arrivals[-1][0]
            self.leader = min(self._pairs, key=lambda pair: pair[1].paid_s(last_s))[0]

    def _affords(self, now: float) -> bool:
        """Whether this request is shadowed: a token bucket."""
        if self._since_s is None:
            self._since_s = self._credit_s = now
        self._credit = min(BURST, self._credit + RATE_PER_S * max(0.0, now - self._credit_s))
        self._credit_s = max(self._credit_s, now)
        if self._credit < 1.0:
            return False
        self._credit -= 1.0
        return True

    def candidate(self, model: ModelState, held: int, uses: int, last_used_s: float, now: float) -> Candidate:
        """A shadow's resident, as idle as it can be. It may have been removed from the configuration meanwhile."""
        watched_s = 0.0 if self._since_s is None else now - self._since_s
        rate = model.demand.slow_rate(now, max(LEAST_WATCHED_S, watched_s))
        return Candidate(model.spec.name, held, 0, last_used_s, model.return_s, uses, rate)

    def victims(self, candidates: Sequence[Candidate], need_bytes: int, now: float) -> list[Candidate] | None:
        """What the leader says."""
        return self.leader.victims(candidates, need_bytes, now)

    def evicted(self, victim: Candidate) -> None:
        """All rules learn of it: any may lead next."""
        for asked, _ in self._pairs:
            asked.evicted(victim)
