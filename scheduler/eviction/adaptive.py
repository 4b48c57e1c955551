"""Follow the leader: every rule runs as a shadow cache on the same requests, the one that loads least is asked.

A shadow is bookkeeping only: what would be resident under its rule, and the load seconds that it would have paid, with
old ones forgotten. Cost: a use O(rules), a shadow's miss O(models log models).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp

from scheduler.eviction.base import Candidate, Eviction, Ranking
from scheduler.eviction.delay import ExpectedDelay
from scheduler.eviction.gdsf import Gdsf
from scheduler.eviction.landlord import Landlord
from scheduler.eviction.lfu import Lfu
from scheduler.eviction.lru import Lru
from scheduler.ledger import DeviceLedger
from scheduler.state import ModelState

MEMORY_S = 300.0  # a load this long ago counts 1/e


class Shadow:
    """One rule's cache."""

    def __init__(self, rule: Eviction) -> None:
        self.rule = rule
        self.paid_s = 0.0
        self._paid_at = 0.0
        self._resident: dict[str, Candidate] = {}

    def touch(self, seen: Candidate, capacity: int, now: float) -> None:
        """A request for this model: load it here if it is not here."""
        if seen.model not in self._resident:
            self._make_room(seen.held_bytes, capacity, now)
            self.paid_s = self.paid(now) + seen.load_s
            self._paid_at = now
        self._resident[seen.model] = seen

    def paid(self, now: float) -> float:
        """Load seconds, old ones forgotten."""
        return self.paid_s * exp(-(now - self._paid_at) / MEMORY_S)

    def _make_room(self, size: int, capacity: int, now: float) -> None:
        missing = size + sum(each.held_bytes for each in self._resident.values()) - capacity
        if missing <= 0:
            return
        residents = list(self._resident.values())
        for victim in self.rule.victims(residents, missing, now) or residents:
            del self._resident[victim.model]
            self.rule.evicted(victim)


class Adaptive:
    """The textbook rules, each asked and shadowed by an object of its own: they remember different evictions.

    One shadow memory stands for all devices: what matters is which rule suits the requests.
    """

    name = "adaptive"

    def __init__(self) -> None:
        rules: tuple[type[Ranking], ...] = (ExpectedDelay, Gdsf, Lfu, Landlord, Lru)
        self._pairs = [(rule(), Shadow(rule())) for rule in rules]
        self._uses: dict[str, int] = {}
        self._models: Mapping[str, ModelState] = {}
        self._capacity = 0
        self._now = 0.0

    def watch(self, models: Mapping[str, ModelState], devices: Mapping[str, DeviceLedger]) -> None:
        """Sizes and load times are read from the books when they are needed: both are learned."""
        self._models = models
        self._capacity = sum(device.limit for device in devices.values())

    def saw(self, arrivals: Sequence[tuple[float, str]]) -> None:
        """Every shadow sees the same requests."""
        for now, name in arrivals:
            model = self._models.get(name)
            if model is None:
                continue
            self._now = now
            uses = self._uses[name] = self._uses.get(name, 0) + 1
            seen = Candidate(name, model.spec.memory_bytes, 0, now, model.seconds_to_load, uses, 0.0)
            for _, shadow in self._pairs:
                shadow.touch(seen, self._capacity, now)

    def leader(self) -> Eviction:
        """The rule whose shadow has paid least; the first named when level."""
        return min(self._pairs, key=lambda pair: pair[1].paid(self._now))[0]

    def victims(self, candidates: Sequence[Candidate], need_bytes: int, now: float) -> list[Candidate] | None:
        """What the leader says."""
        return self.leader().victims(candidates, need_bytes, now)

    def evicted(self, victim: Candidate) -> None:
        """All rules learn of it: any may lead next."""
        for asked, _ in self._pairs:
            asked.evicted(victim)
