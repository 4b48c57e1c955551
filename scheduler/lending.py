"""Credit given, reported and revoked (`scheduler.credit` says what it is for).

What was let in from credit teaches what a ticket teaches: demand, pace, length of answers, whose use of a load it was.
It is not charged, for like a ticket that is admitted at once it passed nobody.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from scheduler.books import Books
from scheduler.commands import Command, Credit, Revoke
from scheduler.events import CreditAsked, CreditReported, Served
from scheduler.model import Residency
from scheduler.state import EngineState, ModelState
from scheduler.tickets import Tickets, share_load

FREE_KEPT = 2  # a holder's part is so small that all of them together leave half of what is free


class Lending:
    """Who may have credit, and what is done about it after each event."""

    def __init__(self, books: Books, tickets: Tickets) -> None:
        self._books = books
        self._tickets = tickets
        self._holders: dict[int, None] = {}  # in the order in which they came
        self._lent: set[str] = set()  # engines that holders believe in

    def __bool__(self) -> bool:
        """Whether there is anybody to lend to."""
        return bool(self._holders)

    def came(self, holder: int) -> None:
        """A holder is there."""
        self._holders[holder] = None
        for model in self._books.engaged():
            if model.engine is not None:
                model.engine.credits.wanted = True

    def asked(self, event: CreditAsked) -> list[Command]:
        """A holder wants more: it gets some while nobody waits."""
        model = self._books.models.get(event.model)
        if model is None or (engine := model.engine) is None or event.holder not in self._holders:
            return []
        return [] if _in_the_way(model, engine) or model.guessed else self._lend(model, engine, [event.holder])

    def reported(self, event: CreditReported, now: float) -> ModelState | None:
        """What a holder did with its credit; the model, unless this is late news. O(requests reported)."""
        model = self._books.by_engine(event.engine_id)
        if model is None or (engine := model.engine) is None or (more := engine.credits.take_back(event)) is None:
            return None
        if event.begun:
            model.demand.count += len(event.begun)
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
        """A holder has gone, and all that it had in use with it; the models where it had something. O(engines)."""
        self._holders.pop(holder, None)
        found = []
        for model in self._books.engaged():
            engine = model.engine
            if engine is not None and (more := engine.credits.forget(holder)) is not None:
                _in_flight(model, engine, more, now)
                found.append(model)
        return found

    def settle(self) -> list[Command]:
        """After an event: revoke what keeps somebody waiting, or an engine from going; lend where somebody lacks it.
        O(engines)."""
        gone = [engine_id for engine_id in self._lent if self._books.by_engine(engine_id) is None]
        self._lent.difference_update(gone)
        out: list[Command] = [Revoke(engine_id) for engine_id in gone]
        for model in self._books.engaged():
            engine = model.engine
            if engine is None:
                continue
            lent = engine.credits
            if _in_the_way(model, engine):
                if lent.sequences and not lent.revoked:
                    lent.revoked = lent.wanted = True
                    self._lent.discard(engine.id)
                    out.append(Revoke(engine.id))
            elif lent.wanted and not model.guessed:  # a guess that nobody has used yet must be able to go at once
                out += self._lend(model, engine, self._holders)
        return out

    def _lend(self, model: ModelState, engine: EngineState, holders: Collection[int]) -> list[Command]:
        """The same to each. An order of arrival over all models allows none."""
        lent = engine.credits
        sequences, tokens = lent.part(FREE_KEPT * len(self._holders))
        if not sequences or self._tickets.strict:
            return []
        if len(holders) == len(self._holders):
            lent.wanted = False
        self._lent.add(engine.id)
        for holder in holders:
            lent.give(holder, sequences, tokens)
        name, output = model.spec.name, model.output.tokens
        return [Credit(holder, name, engine.id, sequences, tokens, output) for holder in holders]

    def check(self) -> None:
        """What always holds after an event. O(models)."""
        for model in self._books.models.values():
            if (engine := model.engine) is not None:
                engine.credits.check()
                kept = engine.credits.sequences > 0 and not engine.credits.revoked
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
