"""Tickets: who waits, who holds a lease, who is let in, who is turned away.

A ticket whose model is ready and has room is admitted at once; another waits in its model's queue, or is refused with
a reason. Which model is loaded for those who wait is decided elsewhere (`scheduler.placement`).

Cost: a ticket admitted at once and its end are O(1), one that waits is O(log n).
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from scheduler.admission import Waiting
from scheduler.books import Books
from scheduler.commands import Admit, Command, Refuse
from scheduler.model import LatencyClass, RefusalCode, Residency, SchedulerSettings, Ticket
from scheduler.quotes import Quotes, why_waiting
from scheduler.state import EngineState, ModelState
from scheduler.timers import Timer, Timers


class Admitted:
    """A ticket that holds a lease: what to give back, and to whom."""

    __slots__ = ("charged", "engine", "model", "since_s", "ticket", "weight")

    def __init__(
        self, ticket: Ticket, model: ModelState, engine: EngineState, weight: int, charged: bool, since_s: float
    ) -> None:
        self.ticket = ticket
        self.model = model
        self.engine = engine
        self.weight = weight
        self.charged = charged  # it had waited, so others may have too
        self.since_s = since_s


class Tickets:
    """Every ticket is in exactly one of `waiting` (by arrival) and `admitted` from its arrival until it is admitted and
    finished, refused, or cancelled. `strict`: nobody is let in before those who came earlier, whatever is ready."""

    def __init__(
        self,
        books: Books,
        quotes: Quotes,
        timers: Timers,
        settings: SchedulerSettings,
        *,
        strict: bool,
    ) -> None:
        self.waiting: dict[int, Waiting] = {}
        self.admitted: dict[int, Admitted] = {}
        self.settings = settings
        self.strict = strict
        self._models = books.models
        self._books = books
        self._quotes = quotes
        self._timers = timers
        self._order = 0

    # -------------------------------------------------------------- leases

    def try_admit(self, ticket: Ticket, model: ModelState, now: float) -> Admit | None:
        """Let a ticket in that has not waited, if its ready model has room. O(1)."""
        engine = model.engine
        assert engine is not None
        # an estimate must not refuse: what looks larger than the engine takes it whole, and the engine decides
        weight = min(_tokens_of(ticket, model), engine.capacity.tokens)
        return self._admit(ticket, model, weight, False, now) if engine.capacity.try_take(weight) else None

    def inherit(self, ticket: Ticket, model: ModelState, now: float) -> None:
        """A request that another proxy has in flight on the model's engine holds its lease here too, room or not: what
        is too much is free only when as much has ended."""
        engine = model.engine
        assert engine is not None
        capacity = engine.capacity
        tokens, sequences = capacity.tokens, capacity.sequences
        capacity.resize(capacity.held_tokens + ticket.weight_tokens, capacity.held_sequences + 1)
        capacity.try_take(ticket.weight_tokens)
        capacity.resize(tokens, sequences)
        self._admit(ticket, model, ticket.weight_tokens, False, now)

    def admit_waiting(self, model: ModelState, now: float) -> list[Command]:
        """Let in whoever waits for a ready model and fits now."""
        if self.strict:
            return self.admit_in_order(now)
        engine = model.engine
        assert engine is not None
        out: list[Command] = []
        for waiting in model.queue.take(engine.capacity, now):
            del self.waiting[waiting.ticket.id]
            self._quotes.admitted(waiting, now)
            out.append(self._admit(waiting.ticket, model, waiting.tokens, True, now))
        return out

    def admit_in_order(self, now: float) -> list[Command]:
        """Let in, in order of arrival, until one does not fit."""
        out: list[Command] = []
        while self.waiting:
            first = next(iter(self.waiting.values()))
            model = self._models[first.ticket.model]
            admit = self.try_admit(first.ticket, model, now) if model.state is Residency.READY else None
            if admit is None:
                break
            self.withdraw(first)
            out.append(admit)
        return out

    def _admit(self, ticket: Ticket, model: ModelState, weight: int, charged: bool, now: float) -> Admit:
        engine = model.engine
        assert engine is not None
        if not engine.in_flight:
            model.pace.began(now)
            model.rested_s = model.last_used_s
        engine.in_flight += 1
        model.last_asked_s = now
        share_load(model, ticket.tenant, ticket.latency_class)
        self.admitted[ticket.id] = Admitted(ticket, model, engine, weight, charged, now)
        return Admit(ticket.id, engine.id)

    def end(self, ticket_id: int, now: float, prompt_tokens: int | None, output_tokens: int | None) -> Admitted | None:
        """A lease comes back, with the tokens it really used where they are known. None when it was not out. O(1)."""
        admitted = self.admitted.pop(ticket_id, None)
        if admitted is None:
            return None
        engine = admitted.engine
        engine.capacity.give(admitted.weight)
        engine.in_flight -= 1
        engine.served += 1
        demand = admitted.model.demand
        demand.served += 1
        demand.busy_s += now - admitted.since_s
        if output_tokens is not None:
            _settle(admitted, prompt_tokens or 0, output_tokens)
        return admitted

    # --------------------------------------------------------------- queues

    def enqueue(self, ticket: Ticket, model: ModelState, now: float) -> None:
        """The ticket waits, until it is let in or has waited too long."""
        patience = self.settings.patience_s[ticket.latency_class]
        overdue_s = now + self.settings.overdue_after * patience
        # never above what the engine will have, or it would wait for ever
        tokens = min(_tokens_of(ticket, model), model.spec.kv_tokens)
        waiting = Waiting(ticket, self.next_order(), now, now + patience, overdue_s, tokens)
        self.waiting[ticket.id] = waiting
        waiting.stage, waiting.estimate_s = self._quotes.estimate(model, len(model.queue), now)
        model.queue.push(waiting)
        until = now + self.settings.max_wait_s
        if ticket.deadline_s is not None:
            until = min(until, ticket.deadline_s)
        if until < inf:
            self._timers.push(until, "wait", ticket.id)
        self._timers.compact(self._timer_alive, len(self.waiting) + len(self._models))

    def withdraw(self, waiting: Waiting) -> ModelState:
        """The ticket waits no more; returns its model."""
        model = self._models[waiting.ticket.model]
        model.queue.remove(waiting.ticket)
        del self.waiting[waiting.ticket.id]
        return model

    def wait_over(self, ticket_id: int, now: float) -> list[Command]:
        """A ticket has waited as long as it may."""
        waiting = self.waiting.get(ticket_id)
        if waiting is None:
            return []
        model = self.withdraw(waiting)
        ticket = waiting.ticket
        waited = f"waited {now - waiting.since_s:.0f} s for {ticket.model}"
        code = RefusalCode.WAITED_TOO_LONG
        if ticket.deadline_s is not None and now >= ticket.deadline_s:
            code, waited = RefusalCode.DEADLINE, f"its deadline has passed: it {waited}"
        reason = f"{waited}, {why_waiting(model)}"
        out: list[Command] = [Refuse(ticket.id, code, reason, model.expected_load_s(now))]
        if model.state is Residency.READY:
            out += self.admit_waiting(model, now)
        return out

    def next_order(self) -> int:
        """A place in the order of arrival, shared with what operators ask for."""
        self._order += 1
        return self._order

    def _timer_alive(self, timer: Timer) -> bool:
        return timer[2] != "wait" or timer[3] in self.waiting

    # -------------------------------------------------------------- refusals

    def refusal(self, ticket: Ticket, model: ModelState, now: float) -> Refuse | None:
        """Why a ticket that cannot be admitted now may not wait either."""
        if model.state is Residency.FAILED:
            return load_failed(ticket, model, now)
        if model.engine is None and (reason := self._books.never_fits(model.spec)) is not None:
            return never_fits(ticket, reason)
        if ticket.deadline_s is not None and ticket.deadline_s <= now:
            return Refuse(ticket.id, RefusalCode.DEADLINE, "its deadline has passed already")
        if ticket.deadline_s is not None and model.loads:  # what was never loaded may be faster than was guessed
            eta = self._quotes.eta(model, len(model.queue), now)
            if now + eta.low_s > ticket.deadline_s:
                left_s = ticket.deadline_s - now
                reason = f"its deadline is in {left_s:.1f} s and {ticket.model} is at best {eta.low_s:.1f} s away"
                return Refuse(ticket.id, RefusalCode.DEADLINE, reason, eta.expected_s)
        if len(model.queue) >= model.spec.max_queue:
            reason = f"{len(model.queue)} requests wait for {ticket.model} already (max_queue = {model.spec.max_queue})"
            return Refuse(ticket.id, RefusalCode.QUEUE_FULL, reason, self._quotes.retry_after_s(model, now))
        if len(self.waiting) >= self.settings.max_waiting:
            reason = f"{len(self.waiting)} requests wait already (limits.max_waiting = {self.settings.max_waiting})"
            return Refuse(ticket.id, RefusalCode.QUEUE_FULL, reason, self._quotes.retry_after_s(model, now))
        return None

    def turn_away(self, model: ModelState, refuse: Callable[[Ticket], Refuse]) -> list[Command]:
        """Refuse everybody who waits for the model."""
        everybody = model.queue.drain()
        for waiting in everybody:
            del self.waiting[waiting.ticket.id]
        return [refuse(waiting.ticket) for waiting in everybody]

    # ---------------------------------------------------------------- checks

    def check(self) -> None:
        """What always holds. O(tickets)."""
        assert not self.waiting.keys() & self.admitted.keys()
        assert len(self.waiting) == sum(len(model.queue) for model in self._models.values())
        for model in self._models.values():
            model.queue.check()
            if model.engine is not None:
                mine = [each for each in self.admitted.values() if each.engine is model.engine]
                lent, capacity = model.engine.credits, model.engine.capacity
                assert len(mine) + lent.in_use == model.engine.in_flight, model
                assert len(mine) + lent.sequences == capacity.held_sequences, model
                assert sum(each.weight for each in mine) + lent.tokens == capacity.held_tokens, model
            if not self.strict:
                _check_head(model)


def share_load(model: ModelState, tenant: str, latency_class: LatencyClass) -> None:
    """A tenant uses the engine: it takes over its share of what the load cost."""
    shares = model.shares
    if shares is not None and tenant not in shares.shares:
        for each, of, tokens in shares.join(tenant, latency_class):
            model.queue.charge(each, of, tokens)


def load_failed(ticket: Ticket, model: ModelState, now: float) -> Refuse:
    """The model is backed off."""
    pause = max(0.0, model.retry_at_s - now)
    reason = f"{ticket.model} could not be loaded: {model.last_error}; next try in {pause:.0f} s"
    return Refuse(ticket.id, RefusalCode.LOAD_FAILED, reason, pause)


def never_fits(ticket: Ticket, reason: str) -> Refuse:
    """There is no place for the model, and none will come."""
    return Refuse(ticket.id, RefusalCode.NEVER_FITS, reason)


def _check_head(model: ModelState) -> None:
    """Nobody who would fit is kept waiting."""
    head, engine = model.queue.head(), model.engine
    if head is None or engine is None or model.state is not Residency.READY:
        return
    # what a tenant is charged for another model may change whose turn it is here: the next end looks again
    charged = engine.in_flight and len({tenant for tenant, _, _ in model.queue.places()}) > 1
    assert charged or not engine.capacity.fits(min(head.tokens, engine.capacity.tokens)), (
        f"{model}: whoever is the head would fit"
    )


def _tokens_of(ticket: Ticket, model: ModelState) -> int:
    """What a ticket holds and is charged: an answer without a limit is expected to be as long as such answers are."""
    return ticket.weight_tokens + model.output.tokens if ticket.open_ended else ticket.weight_tokens


def _settle(admitted: Admitted, prompt_tokens: int, output_tokens: int) -> None:
    """Learn from what a ticket really used, and correct what its tenant was charged for it."""
    model, ticket = admitted.model, admitted.ticket
    used = prompt_tokens + output_tokens
    model.pace.add(used)
    if ticket.open_ended:
        model.output.add(output_tokens)
    if admitted.charged and used != admitted.weight:
        model.queue.charge(ticket.tenant, ticket.latency_class, used - admitted.weight)
