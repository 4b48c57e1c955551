"""Models that are loaded, or woken, before anybody asks for them.

Twice a second a look at each device. Where memory is free, nothing starts or leaves and no request waits for a load,
the model is guessed whose next use is worth most: the chance that it is asked for, by its rate within the next minute
or by what sessions do next, times the seconds that whoever asks is spared. One at a time, from an even chance on, and
into free memory only: nothing is ever given up for a guess. Engines in host memory compute on the cores that a load
keeps busy: there nothing is guessed while one has requests, and a guessed load beside which one gets some is broken
off.

**What a wrong guess can cost.** Plans are made as if guesses were not there (`scheduler.guesses`), so they are the
same with and without, and a tenant is never charged for one. A request that wants a guess's place waits
- for a guessed load under way: not at all, when the memory beside it suffices; else until its killed processes have
  given their memory back, as after any stop (0.5 to 1.5 s on a GPU, 0 in host memory);
- for an unused engine's memory: the same, and no drain, for it is idle;
- for a wake: what is left of it, and that it sleeps again, since to break it off would lose what slept.
A guess that fails does not back its model off.
"""

from __future__ import annotations

from math import exp

from scheduler.books import Books
from scheduler.commands import Command
from scheduler.ledger import DeviceLedger
from scheduler.model import Residency, SchedulerSettings, StopCause
from scheduler.placement import Placement
from scheduler.sequences import Expected
from scheduler.state import ModelState

LOOK_S = 0.5  # between two looks
HOST = "host"  # the kind of device whose engines compute on our own cores
QUIET_S = 2.0  # since their last request
AHEAD_S = 60.0  # a use by rate counts if it is expected so soon
LEAST_CHANCE = 0.5
LEAST_USES = 3  # a rate is known from so many
ABSENT = (Residency.COLD, Residency.ASLEEP)
NEVER_SEEN = Expected(0.0, 0.0, 0.0, "")
# an operator's word is not taken back by a guess, and neither is a verdict on an engine
BY_DECISION = (StopCause.OPERATOR, StopCause.CONFIGURATION, StopCause.LEAKED, StopCause.CORRUPT)


class Anticipation:
    """What is guessed, and from what."""

    def __init__(self, books: Books, placement: Placement) -> None:
        self._books = books
        self._placement = placement

    def look(self, settings: SchedulerSettings, now: float) -> list[Command]:
        """Guess, where a device is idle. O(models + sessions looked at), O(engines) if none is."""
        books, placement = self._books, self._placement
        if placement.paused:
            return []
        placement.guesses.settle()
        shared = [ledger for ledger in books.devices.values() if ledger.spec.kind == HOST]
        out = placement.break_off([each for each in shared if books.works(each, now)], "requests need its cores")
        working = [ledger for ledger in shared if books.works(ledger, now - QUIET_S)]
        idle = [each for each in books.devices.values() if each not in working and placement.is_at_rest(each)]
        return out + self._guess(idle, settings, now) if idle else out

    def _guess(self, idle: list[DeviceLedger], settings: SchedulerSettings, now: float) -> list[Command]:
        placement = self._placement
        expected = placement.sequences.expected(now)
        best: tuple[float, str, ModelState, list[DeviceLedger]] | None = None
        for model in self._books.models.values():
            if model.state not in ABSENT or not may_be_guessed(model):
                continue
            foretold = expected.get(model.spec.name, NEVER_SEEN).probability
            chance = 1.0 - (1.0 - foretold) * (1.0 - self._chance_by_rate(model, now))
            worth = chance * model.seconds_to_load
            if chance < LEAST_CHANCE or (best is not None and worth <= best[0]):
                continue
            group = self._group_for(model, idle, settings.pressure_threshold)
            if group is not None:
                best = worth, self._why(model, expected, now), model, group
        if best is None:
            return []
        _, why, model, group = best
        return [placement.guess(model, group, why, now)]

    def _group_for(self, model: ModelState, idle: list[DeviceLedger], threshold: float) -> list[DeviceLedger] | None:
        """The idle devices with most room for it: enough, and not so little that something would be evicted for it."""

        def left(ledger: DeviceLedger) -> float:
            full = ledger.held + ledger.overhead + ledger.foreign
            return min(float(ledger.free), threshold * ledger.spec.capacity_bytes - full) - model.need_bytes

        fit = [
            group
            for group in self._books.groups_for(model)
            if all(ledger in idle and left(ledger) >= 0.0 for ledger in group)
        ]
        return max(fit, key=lambda group: min(map(left, group)), default=None)

    def _chance_by_rate(self, model: ModelState, now: float) -> float:
        """That it is asked for within AHEAD_S. An engine that was idle for its whole `ttl_s` is not brought back by
        rate."""
        demand = model.demand
        if model.stopped_for is StopCause.IDLE or demand.total + demand.count < LEAST_USES:
            return 0.0
        return 1.0 - exp(-AHEAD_S * demand.glance(now, self._placement.watched_s(now)))

    def _why(self, model: ModelState, expected: dict[str, Expected], now: float) -> str:
        foretold = expected.get(model.spec.name, NEVER_SEEN)
        if foretold.probability < self._chance_by_rate(model, now):
            per_minute = 60.0 * model.demand.glance(now, self._placement.watched_s(now))
            return f"asked about {per_minute:.1f} times a minute, memory idle"
        return f"sessions ask for it after {foretold.after} ({foretold.probability:.0%}), memory idle"


def may_be_guessed(model: ModelState) -> bool:
    """What could not start last time is left to somebody who wants it."""
    return not model.wanted and not model.removed and not model.last_error and model.stopped_for not in BY_DECISION
