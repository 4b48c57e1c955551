"""Credit given, reported and revoked (`scheduler.credit` says what it is for).

What was let in from credit teaches what a ticket teaches: demand, pace, length of answers, whose use of a load it was.
It is not charged, for like a ticket that is admitted at once it passed nobody.
"""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.commands import Command, Credit, Revoke
from scheduler.events import CreditAsked, CreditReported, Served
from scheduler.model import Residency
from scheduler.placement import Placement
from scheduler.state import EngineState, ModelState
from scheduler.tickets import Tickets, share_load


class Lending:
    """The engines on which credit is out."""

    def __init__(self, placement: Placement, tickets: Tickets) -> None:
        self._placement = placement
        self._tickets = tickets
        self._lent: dict[str, ModelState] = {}  # by engine id

    def asked(self, event: CreditAsked) -> list[Command]:
        """A holder wants credit: it gets some while nobody waits. An order of arrival over all models allows none."""
        model = self._placement.models.get(event.model)
        if model is None or model.state is not Residency.READY or len(model.queue) or self._tickets.strict:
            return []
        engine = model.engine
        assert engine is not None
        sequences, tokens = engine.credits.give(event.holder, event.parts)
        if not sequences:
            return []
        self._lent[engine.id] = model
        return [Credit(event.holder, event.model, engine.id, sequences, tokens, model.output.tokens)]

    def reported(self, event: CreditReported, now: float) -> ModelState | None:
        """What a holder did with its credit; the model, unless this is late news. O(requests reported)."""
        model = self._placement.by_engine(event.engine_id)
        if model is None or (engine := model.engine) is None or (more := engine.credits.take_back(event)) is None:
            return None
        if event.begun:
            model.demand.count += event.begun
            model.last_asked_s = now
        for served in event.served:
            _count(served, model, engine)
        if event.served:
            model.last_used_s, model.failures = now, 0
            if not engine.in_flight and not event.in_use:
                model.pace.ran(_busy_s(event.served))
        _in_flight(model, engine, more, now)
        return model

    def gone(self, holder: int, now: float) -> list[ModelState]:
        """A holder has gone, and all that it had in use with it; the models where it had something. O(models)."""
        found = []
        for model in self._placement.models.values():
            engine = model.engine
            if engine is not None and (more := engine.credits.forget(holder)) is not None:
                _in_flight(model, engine, more, now)
                found.append(model)
        return found

    def revocations(self) -> list[Command]:
        """Credit that keeps somebody waiting, or an engine from going. O(engines with credit)."""
        out: list[Command] = []
        for engine_id, model in list(self._lent.items()):
            engine = model.engine
            if engine is None or engine.id != engine_id:
                del self._lent[engine_id]
                out.append(Revoke(engine_id))
            elif not engine.credits.sequences:
                del self._lent[engine_id]
            elif not engine.credits.revoked and _in_the_way(model, engine):
                engine.credits.revoked = True
                out.append(Revoke(engine_id))
        return out

    def __bool__(self) -> bool:
        """Whether any is out."""
        return bool(self._lent)

    def check(self) -> None:
        """What always holds after an event. O(models)."""
        for model in self._placement.models.values():
            if (engine := model.engine) is not None:
                engine.credits.check()
                kept = engine.credits.sequences > 0 and not engine.credits.revoked
                assert not kept or engine.id in self._lent
                assert not (kept and _in_the_way(model, engine)), f"{model}: credit that is not revoked"


def _in_the_way(model: ModelState, engine: EngineState) -> bool:
    """Whether somebody waits, the engine is to go, or more is out than there is since the configuration changed."""
    capacity = engine.capacity
    crowded = len(model.queue) > 0 or capacity.free_sequences < 0 or capacity.free_tokens < 0
    return crowded or model.state is not Residency.READY


def _in_flight(model: ModelState, engine: EngineState, more: int, now: float) -> None:
    """So many more requests are in flight, or fewer."""
    was = engine.in_flight
    engine.in_flight += more
    if engine.in_flight and not was:
        model.pace.began(now)
    elif was and not engine.in_flight:
        model.pace.ended(now)


def _count(served: Served, model: ModelState, engine: EngineState) -> None:
    engine.served += 1
    model.demand.served += 1
    model.demand.busy_s += served.until_s - served.since_s
    share_load(model, served.tenant, served.latency_class)
    if served.output_tokens is not None:
        model.pace.add((served.prompt_tokens or 0) + served.output_tokens)
        if served.open_ended:
            model.output.add(served.output_tokens)


def _busy_s(served: Sequence[Served]) -> float:
    """For how long the engine had work with these, at most."""
    span = max(each.until_s for each in served) - min(each.since_s for each in served)
    return min(span, sum(each.until_s - each.since_s for each in served))
