"""The scheduler's core: one synchronous state machine, `step(event, now) -> list[Command]`.

It never waits, logs, reads a clock, opens anything or raises for load. How it decides:

- A request for a model that is ready and has room is admitted at once (`arrive`), and its end makes room (`finish`).
  This hot pair plans only while somebody waits.
- Anything else may change what should be resident, so it ends in `Placement.plan`.
- Which model is worth loading next is the `Ordering`'s to say, and who goes for it the `Eviction`'s.

This file says what each event sets off, and when a plan is made. What is known and done is elsewhere: who waits and who
holds a lease in `scheduler.tickets`, who lets in on credit in `scheduler.lending`, what engines and operators say in
`scheduler.lifecycle`, which engines there are and what they hold in `scheduler.books`, what should be resident in
`scheduler.placement`, what those who wait are told in `scheduler.quotes`, what may be loaded before anybody asks in
`scheduler.anticipation`.

Cost: arrive and finish O(1); everything else O(models) at most.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from math import inf

from scheduler.anticipation import LOOK_S, Anticipation
from scheduler.books import Books
from scheduler.commands import Admit, Command, Refuse, WakeAt
from scheduler.eta import Quote
from scheduler.events import (
    Arrived,
    Asleep,
    Cancelled,
    ConfigChanged,
    CreditAsked,
    CreditReported,
    EngineFailed,
    EngineReady,
    EngineStopped,
    Event,
    Finished,
    HandOverAsked,
    HandOverOff,
    HolderCame,
    HolderGone,
    LoadAsked,
    LoadProgress,
    MemoryMeasured,
    ProbeAnswered,
    Tick,
    UnloadAsked,
)
from scheduler.eviction.adaptive import Adaptive
from scheduler.eviction.base import Eviction
from scheduler.fairness import Fairness
from scheduler.footprints import Footprints
from scheduler.lending import Lending
from scheduler.lifecycle import Lifecycle
from scheduler.model import DeviceSpec, LatencyClass, ModelSpec, RefusalCode, Residency, SchedulerSettings, Ticket
from scheduler.ordering import Ordering
from scheduler.placement import Placement
from scheduler.policies.regret import Regret
from scheduler.quotes import Quotes
from scheduler.sequences import Arrival, Steps
from scheduler.state import ModelState
from scheduler.tickets import Tickets
from scheduler.timers import Timer, Timers

ARRIVALS_KEPT = 1024
CREDIT_PER_S = 50.0


class Core:
    """The state machine: its rooms, and what goes through them at each event."""

    def __init__(
        self,
        devices: Iterable[DeviceSpec],
        models: Iterable[ModelSpec],
        settings: SchedulerSettings | None = None,
        *,
        engines_before: int = 0,
        ordering: Ordering | None = None,
        eviction: Eviction | None = None,
        footprints: Footprints | None = None,
        steps: Steps | None = None,
    ) -> None:
        """`engines_before`: how many engine ids are taken already, by engines that outlived an earlier proxy.
        `footprints` and `steps` are what was learned in earlier runs."""
        self.ordering: Ordering = ordering or Regret()
        self.fairness = Fairness()
        self._timers = Timers()
        self.books = Books(devices, models, self.fairness, self._timers, footprints)
        self.placement = Placement(self.books, self.ordering, eviction or Adaptive(), engines_before)
        self.placement.sequences.restore(steps or {}, self.books.models)
        self.devices = self.books.devices
        self.models = self.books.models
        settings = settings or SchedulerSettings()
        strict = self.ordering.strict
        self._quotes = Quotes(self.placement)
        self.tickets = Tickets(self.books, self._quotes, self._timers, settings, strict=strict)
        self.anticipation = Anticipation(self.books, self.placement)
        self._lifecycle = Lifecycle(self.books, self.placement, self.tickets, self._timers, settings)
        self._lending = Lending(self.books, self.tickets)
        self._configure(settings)
        self._wake_at: float | None = None
        self._again_at = inf
        # what the policies have not seen yet; when more come between two plans, they see the latest
        self._arrivals: deque[Arrival] = deque(maxlen=ARRIVALS_KEPT)
        self._foreseen: deque[Arrival] = deque(maxlen=ARRIVALS_KEPT)  # those of them that a look has seen
        self._look_at = inf
        self._credit = 0.0
        self._credit_at = 0.0
        self._soon = False  # the next plan has a moment

    def __repr__(self) -> str:
        tickets = self.tickets
        return f"<Core models={len(self.models)} waiting={len(tickets.waiting)} admitted={len(tickets.admitted)}>"

    # ---------------------------------------------------------------- events

    def step(self, event: Event, now: float) -> list[Command]:
        """Take in what happened, answer with what must be done. Unknown ids are late news and change nothing."""
        match event:
            case Arrived(ticket):
                return self.arrive(ticket, now)
            case Finished(ticket_id, prompt_tokens, output_tokens):
                return self.finish(ticket_id, now, prompt_tokens, output_tokens)
            case Cancelled(ticket_id):
                return self.cancel(ticket_id, now)
            case CreditAsked():
                return self._lending.asked(event)
            case CreditReported():
                return self._with_wake(self._credit_reported(event, now))
            case HolderCame(holder):
                self._lending.came(holder)
                return self._with_wake([])
            case HolderGone(holder):
                out = self._holder_gone(holder, now)
            case LoadProgress():
                self._lifecycle.progress(event)
                return []
            case MemoryMeasured():
                out = self._lifecycle.measured(event, now)
            case EngineReady():
                guess = self.placement.is_guessed_load(event.engine_id)
                out = self._lifecycle.ready(event, now)
                if guess:
                    return self._with_wake(out)  # plans are made as if it were not there
            case EngineFailed():
                out = self._lifecycle.failed(event, now)
            case EngineStopped(engine_id):
                out = self._lifecycle.gone(engine_id, now)
            case Asleep(engine_id, error):
                out = self._lifecycle.asleep(engine_id, error, now)
            case ProbeAnswered():
                out = self._lifecycle.probed(event, now)
            case LoadAsked(name):
                out = self._lifecycle.load_asked(name)
            case UnloadAsked(name):
                out = self._lifecycle.unload_asked(name)
            case ConfigChanged(models, settings):
                out = self._config_changed(models, settings)
            case HandOverAsked():
                out = self._serve_on(self.placement.pause(), now)
            case HandOverOff():
                self.placement.paused = False
                out = []
            case Tick():
                return self._with_wake(self._tick(now))
        out += self._plan(now)
        return self._with_wake(out)

    def arrive(self, ticket: Ticket, now: float) -> list[Command]:
        """A ticket comes: admitted at once, queued, or refused. O(1) unless it must plan."""
        model = self.models.get(ticket.model)
        if model is None or model.removed:
            return [Refuse(ticket.id, RefusalCode.UNKNOWN_MODEL, f"no local model named {ticket.model!r}")]
        model.demand.count += 1
        self._arrivals.append((now, ticket.model, ticket))
        tickets = self.tickets
        if model.state is Residency.READY and not len(model.queue) and not (tickets.strict and tickets.waiting):
            admit = tickets.try_admit(ticket, model, now)
            if admit is not None:
                return [admit]
        refusal = tickets.refusal(ticket, model, now)
        if refusal is not None:
            return [refusal]
        tickets.enqueue(ticket, model, now)
        # on a ready model it may have gone straight to the head, past a large one of a lower class, and fit
        if model.state is Residency.READY:
            return self._with_wake(tickets.admit_waiting(model, now))
        return self._with_wake(self._plan_soon(now))

    def admit_now(self, ticket: Ticket, now: float) -> Admit | None:
        """Admit a ticket if `arrive` would do it at once; else nothing has happened. O(1)."""
        model = self.models.get(ticket.model)
        if model is None or model.removed or model.state is not Residency.READY or len(model.queue):
            return None
        tickets = self.tickets
        if tickets.strict and tickets.waiting:
            return None
        admit = tickets.try_admit(ticket, model, now)
        if admit is not None:
            model.demand.count += 1
            self._arrivals.append((now, ticket.model, ticket))
        return admit

    def finish(
        self, ticket_id: int, now: float, prompt_tokens: int | None = None, output_tokens: int | None = None
    ) -> list[Command]:
        """A lease comes back, with the tokens it really used where they are known; whoever fits now is admitted. O(1),
        and O(log n) for each ticket admitted."""
        tickets = self.tickets
        ended = tickets.end(ticket_id, now, prompt_tokens, output_tokens)
        if ended is None:
            return []
        engine, model = ended.engine, ended.model
        if model.engine is not engine:
            return []
        model.last_used_s = now
        model.failures = 0
        out = tickets.admit_waiting(model, now) if model.state is Residency.READY and len(model.queue) else []
        if engine.in_flight:
            if tickets.waiting or self._lending:
                return self._with_wake(out + self._plan_soon(now) if tickets.waiting else out)
            return out  # nothing has happened that anything could be due for
        model.pace.ended(now)
        out += self._lifecycle.became_idle(model)
        if model.state is not Residency.READY:
            return self._with_wake(out + self._plan(now))
        return self._with_wake(out + self._plan_soon(now) if tickets.waiting else out)

    def cancel(self, ticket_id: int, now: float) -> list[Command]:
        """A caller has gone, waiting or admitted. O(1) for an admitted ticket, else as `_plan`."""
        waiting = self.tickets.waiting.get(ticket_id)
        if waiting is None:
            return self.finish(ticket_id, now)
        model = self.tickets.withdraw(waiting)
        # it may have been the large head that held back small ones, or the only reason for an eviction
        out = self.tickets.admit_waiting(model, now) if model.state is Residency.READY else []
        return self._with_wake(out + self._plan_soon(now))

    def _credit_reported(self, event: CreditReported, now: float) -> list[Command]:
        model = self._lending.reported(event, now)
        if model is None:
            return []
        name = model.spec.name
        self._arrivals.extend((now, name, Ticket(0, name, tenant=who, session=of)) for who, of in event.begun)
        return self._credit_changed(model, now)

    def _holder_gone(self, holder: int, now: float) -> list[Command]:
        out: list[Command] = []
        for model in self._lending.gone(holder, now):
            out += self._credit_changed(model, now)
        return out

    def _credit_changed(self, model: ModelState, now: float) -> list[Command]:
        """Room may have come back, as when a ticket ends."""
        tickets = self.tickets
        out = tickets.admit_waiting(model, now) if model.state is Residency.READY and len(model.queue) else []
        if not model.in_flight:
            out += self._lifecycle.became_idle(model)
            if model.state is not Residency.READY:
                return out + self._plan(now)
        return out + self._plan_soon(now) if tickets.waiting else out

    def _config_changed(self, specs: Iterable[ModelSpec], settings: SchedulerSettings) -> list[Command]:
        self._configure(settings)
        wanted = {spec.name: spec for spec in specs}
        out: list[Command] = []
        for spec in wanted.values():
            model = self.books.specify(spec)
            if model.engine is not None and model.engine.revision == spec.revision:
                model.engine.capacity.resize(spec.kv_tokens, spec.max_sequences)
        for name in self.models.keys() - wanted.keys():
            out += self._lifecycle.removed(self.models[name])
        self.placement.sequences.keep(wanted if settings.anticipate else ())
        return out

    def _configure(self, settings: SchedulerSettings) -> None:
        self.settings = self.tickets.settings = self._lifecycle.settings = settings
        self.books.configure(settings)
        self.placement.configure(settings)

    # ----------------------------------------------------------------- timers

    def _tick(self, now: float) -> list[Command]:
        self._wake_at = None
        out: list[Command] = []
        due = looks = False
        while (timer := self._timers.pop_due(now)) is not None:
            if timer[2] == "look":
                looks = True
                continue
            out += self._due(timer, now)
            due = True
        if due or not looks:
            out += self._plan(now) if due else self._plan_soon(now)
        return out + self._look(now) if looks else out

    def _due(self, timer: Timer, now: float) -> list[Command]:
        _, _, kind, key = timer
        if kind == "wait":
            return self.tickets.wait_over(int(key), now)
        if kind == "plan":
            self._again_at = inf  # every tick that is due plans
            return []
        if kind == "fall":
            return self._lifecycle.fall_over(str(key), now)
        model = self.models.get(str(key))
        if model is None:
            return []
        if kind == "ttl":
            return self._lifecycle.ttl_over(model, now)
        if kind == "sleepless":
            model.sleepless = False
        elif kind == "retry":
            self._lifecycle.retry(model, now)
        return []

    def _with_wake(self, out: list[Command]) -> list[Command]:
        """Adds what is to be lent and revoked, and a WakeAt when the next moment of interest has moved nearer."""
        if self._lending:
            out += self._lending.settle()
        at = self._timers.next_at()
        if at is not None and (self._wake_at is None or at < self._wake_at):
            self._wake_at = at
            out.append(WakeAt(at))
        return out

    # ------------------------------------------------------------------ plans

    def _plan_soon(self, now: float) -> list[Command]:
        """Plan now if that is cheap for what has happened, else in a moment.

        A plan costs O(w) for w models to weigh, and one more arrival or end seldom changes it. Each such event earns a
        credit, and so does time; a plan is due at w^2 / 100 credits, w at most. So nearly every event plans while few
        are wanted, the cost per event is bounded however many are, and no plan is older than a second.
        """
        weighed = self.placement.weighed
        per_s = max(CREDIT_PER_S, weighed)
        self._credit += 1.0 + per_s * (now - self._credit_at)
        self._credit_at = now
        missing = min(0.01 * weighed * weighed, weighed) - self._credit
        if missing <= 0.0:
            return self._plan(now)
        if not self._soon:  # the events that follow bring it nearer by themselves: no timer, no WakeAt for each
            self._soon = True
            self._plan_at(now + missing / per_s)
        return []

    def _plan_at(self, at_s: float) -> None:
        if at_s < self._again_at:
            self._again_at = at_s
            self._timers.push(at_s, "plan", "")

    def _plan(self, now: float) -> list[Command]:
        """Anything but the hot pair may change what should be resident."""
        self._credit, self._credit_at, self._soon = 0.0, now, False
        self._take_in_arrivals()
        self._look_soon(now)
        out, revived = self.placement.plan(now)
        if self.tickets.strict:
            out += self.tickets.admit_in_order(now)
        out += self._serve_on(revived, now)
        self._plan_at(self.placement.again_at)
        return out + self.placement.relieve_pressure(self.settings.pressure_threshold)

    def _serve_on(self, revived: Iterable[ModelState], now: float) -> list[Command]:
        """Models that were to go are ready again."""
        out: list[Command] = []
        for model in revived:
            out += self.tickets.admit_waiting(model, now)
            if model.idle:
                self._lifecycle.arm_ttl(model)
        return out

    def _take_in_arrivals(self) -> None:
        """For the policies: when a plan is made, and not before, so that looks change no plan."""
        self._foresee()
        if self._foreseen:
            named = [(at_s, name) for at_s, name, _ in self._foreseen]
            self.ordering.saw(named)
            self.placement.eviction.saw(named)
            self._foreseen.clear()

    def _foresee(self) -> None:
        if self.settings.anticipate:
            self.placement.sequences.note(self._arrivals)
        self._foreseen += self._arrivals
        self._arrivals.clear()

    def _look_soon(self, now: float) -> None:
        if self.settings.anticipate and self._look_at == inf:
            self._look_at = now + LOOK_S
            self._timers.push(self._look_at, "look", "")

    def _look(self, now: float) -> list[Command]:
        """Is there memory for what will be asked for? Not a plan: what is decided for those who wait stays the same."""
        self._look_at = inf
        if not self.settings.anticipate:
            return []
        self._foresee()
        self._look_soon(now)
        return self.anticipation.look(self.settings, now)

    # ---------------------------------------------------------------- answers

    def describe(self, ticket_id: int, now: float) -> str:
        """One line for the client that waits: what happens, how far it is, who goes first. O(devices)."""
        waiting = self.tickets.waiting.get(ticket_id)
        return "" if waiting is None else self._quotes.describe(self.models[waiting.ticket.model], waiting, now)

    def quote(self, ticket: Ticket, now: float) -> Quote:
        """When this ticket would get, or will get, its lease, and what its load would cost the others. Changes
        nothing. O(devices). A model that may not wait at all is not known here: ask `arrive`."""
        return self._quotes.quote(self.models[ticket.model], self.tickets.waiting.get(ticket.id), now)

    def waiting_tickets(self) -> Iterator[Ticket]:
        """Everybody who waits, in the order of arrival."""
        return (waiting.ticket for waiting in self.tickets.waiting.values())

    def waiting_by_class(self) -> list[int]:
        """How many tickets wait in each latency class. O(models)."""
        return [sum(model.queue.count(c) for model in self.models.values()) for c in LatencyClass]

    # ------------------------------------------------------------------ small

    def check(self) -> None:
        """What always holds; tests call this after every event. O(everything)."""
        self.books.check()
        self.tickets.check()
        self._lending.check()
        self.fairness.check(place for model in self.models.values() for place in model.queue.places())
