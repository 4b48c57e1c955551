"""Which model is loaded next on a device, at whose expense: what an ordering policy is given and must answer.

An answer is a plan, not a deed: it is asked for again at every event that may change it, also while a load is under
way, and becomes a deed when the device is free and its victims are idle (`scheduler.placement`). Policies are in
`scheduler.policies`, one a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import inf
from typing import Protocol

from msgspec.structs import replace

from scheduler.admission import AGEING_SHARE
from scheduler.eviction.base import Candidate, Eviction
from scheduler.eviction.delay import delay
from scheduler.forecast import drain_s
from scheduler.ledger import DeviceLedger
from scheduler.model import Residency
from scheduler.state import ModelState


class Scene:
    """One device at one moment, as a policy sees it. Bytes and seconds.

    `wanted` are cold models that somebody waits for and that may run here; `residents` are ready or draining engines
    that may be given up; `free` counts what is on its way out; the next load can begin at `link_free_s`, not before.
    `planned` is the model of the last plan; arrivals have been counted for `watched_s`; `patience_s` is that of the
    standard class. Residents and candidates include those of the partner devices that a wanted model needs as well.
    """

    __slots__ = ("_eviction", "_here", "_kept", "_partners", "candidates", "device", "free", "link_free_s", "now",
                 "patience_s", "planned", "residents", "wanted", "watched_s")  # fmt: skip

    def __init__(
        self,
        now: float,
        device: DeviceLedger,
        wanted: Sequence[ModelState],
        residents: Sequence[tuple[ModelState, int]],
        *,
        free: int,
        link_free_s: float,
        planned: str | None,
        watched_s: float,
        patience_s: float,
        eviction: Eviction,
    ) -> None:
        self.now = now
        self.device = device
        self.wanted = wanted
        self.free = free
        self.link_free_s = link_free_s
        self.planned = planned
        self.watched_s = watched_s
        self.patience_s = patience_s
        self._eviction = eviction
        self.residents = {model.spec.name: model for model, _ in residents}
        self._kept = {model.spec.name: kept for model, _ in residents if (kept := model.kept_bytes)}
        self._here = self.candidates = [self._candidate(model, held) for model, held in residents]
        self._partners: dict[str, Sequence[Scene]] = {}

    def room_for(self, model: ModelState, but: frozenset[str] = frozenset()) -> list[Candidate] | None:
        """The victims whose end makes room; [] when none is needed, None when all of them, less `but`, are too few."""
        partners = self._partners.get(model.spec.name)
        if partners is None:
            return self._room_here(model, but)
        victims: list[Candidate] = []
        for scene in (self, *partners):
            more = scene._room_here(model, but, victims)
            if more is None:
                return None
            victims += more
        return victims

    def spans(self, model: ModelState, partners: Sequence[Scene]) -> None:
        """The model needs these devices besides this one: its room is made on all of them or on none."""
        self._partners[model.spec.name] = partners
        for scene in partners:
            self.candidates = self.candidates + [each for each in scene._here if each.model not in self.residents]
            self.residents |= scene.residents

    def _room_here(
        self, model: ModelState, but: frozenset[str], chosen: Sequence[Candidate] = ()
    ) -> list[Candidate] | None:
        """Victims on this device besides those chosen on another, which may be here too."""
        missing = model.need_bytes - self.free
        if chosen:
            gone = {each.model for each in chosen}
            # whole: `Placement` has none of them sleep where what it keeps is missing here
            missing -= sum(each.held_bytes + self._kept.get(each.model, 0) for each in self._here if each.model in gone)
            but |= gone
        if missing <= 0:
            return []
        if model.state is Residency.ASLEEP:
            but |= {model.spec.name}
        allowed = [each for each in self._here if each.model not in but] if but else self._here
        victims = self._eviction.victims(allowed, missing, self.now)
        if not self._kept:
            return victims
        # what they would keep asleep may be just what is missing: then it can be cheaper to stop them
        stopped = self._eviction.victims([self._stopped(each) for each in allowed], missing, self.now)
        if victims is None or (stopped is not None and self._price(stopped) < self._price(victims)):
            return stopped
        return victims

    def _price(self, victims: Sequence[Candidate]) -> tuple[bool, float]:
        return any(each.in_flight for each in victims), sum(delay(each, self.now) for each in victims)

    def _stopped(self, candidate: Candidate) -> Candidate:
        """The same, were it not to sleep."""
        kept = self._kept.get(candidate.model)
        if kept is None:
            return candidate
        load_s = self.residents[candidate.model].load_s
        return replace(candidate, held_bytes=candidate.held_bytes + kept, load_s=load_s)

    def _candidate(self, model: ModelState, held: int) -> Candidate:
        demand = model.demand
        rate = demand.slow_rate(self.now, self.watched_s)
        in_flight = model.engine.in_flight if model.engine is not None else 0
        name, uses = model.spec.name, demand.total
        frees = max(1, held - self._kept.get(name, 0))
        return Candidate(name, frees, in_flight, model.last_asked_s, model.loss_s, uses, rate)

    def drained_at(self, victims: Iterable[Candidate]) -> float:
        """When the last of the victims is expected to be idle."""
        longest = 0.0
        for victim in victims:
            if victim.in_flight:
                service = self.residents[victim.model].demand.mean_service_s()
                longest = max(longest, drain_s(victim.in_flight, service))
        return self.now + longest


class Choice:
    """Load `model` when `victims` are gone. `why` is for people."""

    __slots__ = ("model", "victims", "why")

    def __init__(self, model: ModelState, victims: Sequence[Candidate], why: str) -> None:
        self.model = model
        self.victims = victims
        self.why = why


class Ordering(Protocol):
    """A policy. `strict`: nobody is let in before those who came earlier, whatever is ready.

    `just_in_time`: a busy victim stops admitting only when its drain would otherwise outlast the load under way.
    """

    name: str
    strict: bool
    just_in_time: bool

    def choose(self, scene: Scene) -> Choice | None:
        """The next load on this device; None to leave things as they are."""
        ...

    def watch(self, models: Mapping[str, ModelState], devices: Mapping[str, DeviceLedger]) -> None:
        """The books that this policy's core keeps; called once, before anything else."""
        ...

    def saw(self, arrivals: Sequence[tuple[float, str]]) -> None:
        """Requests have come, (when, for which model), since the last call. Not called on the hot path."""
        ...


class Blind:
    """A policy that looks at nothing but the scene."""

    name = ""
    strict = False
    just_in_time = False

    def watch(self, models: Mapping[str, ModelState], devices: Mapping[str, DeviceLedger]) -> None:
        """Nothing to watch."""

    def saw(self, arrivals: Sequence[tuple[float, str]]) -> None:
        """Nothing to note."""


def oldest(models: Iterable[ModelState]) -> ModelState | None:
    """The model of the ticket that has waited longest."""
    return min(models, key=arrival_order, default=None)


def arrival_order(model: ModelState) -> float:
    """The place of its longest waiting ticket among all arrivals."""
    return min((head.order for head in model.queue.heads()), default=inf)


def overdue(scene: Scene) -> Choice | None:
    """The model whose ticket is overdue the longest, before anything that a policy would rather do.

    Residents with tickets that are overdue for longer serve those first. So the overdue of a device are served in the
    order of becoming overdue, which is what bounds every wait: see `worst_wait_s`.
    """
    first, since = None, scene.now
    for model in scene.wanted:
        overdue_since = model.queue.overdue_since()
        if overdue_since < since:
            first, since = model, overdue_since
    if first is None:
        return None
    before = frozenset(
        name
        for name, model in scene.residents.items()
        if model.state is Residency.READY and model.queue.overdue_since() < since
    )
    victims = scene.room_for(first, but=before)
    if victims is None:
        return None
    return Choice(first, victims, "one of its requests has waited for longer than its class may")


def worst_wait_s(
    overdue_s: float, *, models: int, load_s: float, service_s: float, ahead: int, sequences: int
) -> float:
    """How long a ticket of a class can wait at most, in seconds, under every policy that asks `overdue` first:

        overdue_s + (models + 1) x (load_s + service_s) + ceil(4 x (ahead + 1) / sequences) x service_s

    `overdue_s` is the class's patience times `overdue_after`; `models` compete for the device, loads take `load_s` and
    answers `service_s` at most, `ahead` tickets became overdue before it, and an engine takes `sequences` at a time.

    Why: from `overdue_s` on, only what became overdue before goes before it. So each other model is loaded at most
    once for that, after the load under way; before each load its victims drain, for one answer's length. What is
    overdue leaves each engine in rounds of `sequences`, one grant in four at worst (`scheduler.admission`).
    It holds as long as loads succeed and the memory is there; a model that takes all the memory counts like any other.
    """
    rounds = -(-AGEING_SHARE * (ahead + 1) // sequences)
    return overdue_s + (models + 1) * (load_s + service_s) + rounds * service_s
