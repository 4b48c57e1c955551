"""The scheduler's core: one synchronous state machine, `step(event, now) -> list[Command]`.

It never waits, logs, reads a clock, opens anything or raises for load. How it decides:

- A request for a model that is ready and has room is admitted at once (`arrive`), and its end makes room (`finish`).
  This hot pair plans only while somebody waits.
- Anything else may change what should be resident, so it ends in `Placement.plan`.
- Which model is worth loading next is the `Ordering`'s to say, and who goes for it the `Eviction`'s.
- A model that becomes ready serves everything that waits for it, as far as it has room, before it can become a victim:
  two models that trade places always make progress.

This file is about tickets: who waits, who holds a lease, who is told what. `scheduler.placement` is about engines.

Cost: arrive and finish O(1); everything else O(models) at most.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from math import inf

from scheduler.admission import Waiting
from scheduler.attest import difference
from scheduler.commands import Admit, Command, Probe, Refuse, Sleep, Stop, WakeAt
from scheduler.eta import Calibration, Eta, Quote, Stage
from scheduler.events import (
    Arrived,
    Asleep,
    Cancelled,
    ConfigChanged,
    EngineFailed,
    EngineReady,
    EngineStopped,
    Event,
    Finished,
    LoadAsked,
    LoadProgress,
    MemoryMeasured,
    ProbeAnswered,
    Tick,
    UnloadAsked,
)
from scheduler.eviction.base import Eviction
from scheduler.eviction.delay import ExpectedDelay
from scheduler.fairness import Fairness, LoadShares
from scheduler.footprints import Footprints
from scheduler.model import (
    DeviceSpec,
    LatencyClass,
    ModelSpec,
    RefusalCode,
    Residency,
    SchedulerSettings,
    StopCause,
    Ticket,
)
from scheduler.ordering import Ordering
from scheduler.placement import Placement
from scheduler.policies.regret import Regret
from scheduler.state import EngineState, ModelState
from scheduler.timers import Timer, Timers

ARRIVALS_KEPT = 1024
CREDIT_PER_S = 50.0
TTL_AGAIN_S = 1.0  # while a neighbour starts, nothing leaves the device
MAX_CRASHES = 3  # a ready engine that dies this often without serving anybody in between is backed off


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


class Core:
    """The state machine. Every ticket is in exactly one of `_waiting` and `_admitted` from Arrived until it is admitted
    and finished, refused, or cancelled."""

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
    ) -> None:
        """`engines_before`: how many engine ids are taken already, by engines that outlived an earlier proxy."""
        self.settings = settings or SchedulerSettings()
        self.ordering: Ordering = ordering or Regret()
        self.fairness = Fairness()
        self._timers = Timers()
        self.placement = Placement(
            devices,
            models,
            self.ordering,
            eviction or ExpectedDelay(),
            engines_before,
            self.fairness,
            timers=self._timers,
            footprints=footprints,
        )
        self.placement.configure(self.settings)
        self.devices = self.placement.devices
        self.models = self.placement.models
        self._waiting: dict[int, Waiting] = {}
        self._admitted: dict[int, Admitted] = {}
        self._calibration = Calibration()
        self._wake_at: float | None = None
        self._again_at = inf
        self._order = 0
        # what the policies have not seen yet; when more come between two plans, they see the latest
        self._arrivals: deque[tuple[float, str]] = deque(maxlen=ARRIVALS_KEPT)
        self._credit = 0.0
        self._credit_at = 0.0
        self._strict = self.ordering.strict

    def __repr__(self) -> str:
        return f"<Core models={len(self.models)} waiting={len(self._waiting)} admitted={len(self._admitted)}>"

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
            case LoadProgress():
                self._progress(event)
                return []
            case MemoryMeasured():
                out = self._measured(event, now)
            case EngineReady():
                out = self._engine_ready(event, now)
            case EngineFailed():
                out = self._engine_failed(event, now)
            case EngineStopped(engine_id):
                out = self._engine_gone(engine_id, now)
            case Asleep(engine_id, error):
                out = self._asleep(engine_id, error, now)
            case ProbeAnswered():
                out = self._probe_answered(event, now)
            case LoadAsked(name):
                out = self._load_asked(name)
            case UnloadAsked(name):
                out = self._unload_asked(name)
            case ConfigChanged(models, settings):
                out = self._config_changed(models, settings)
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
        self._arrivals.append((now, ticket.model))
        if model.state is Residency.READY and not len(model.queue) and not (self._strict and self._waiting):
            admit = self._try_admit(ticket, model, now)
            if admit is not None:
                return [admit]
        refusal = self._refusal(ticket, model, now)
        if refusal is not None:
            return [refusal]
        self._enqueue(ticket, model, now)
        # on a ready model it may have gone straight to the head, past a large one of a lower class, and fit
        if model.state is Residency.READY:
            return self._with_wake(self._admit_waiting(model, now))
        return self._with_wake(self._plan_soon(now))

    def admit_now(self, ticket: Ticket, now: float) -> Admit | None:
        """Admit a ticket if `arrive` would do it at once; else nothing has happened. O(1)."""
        model = self.models.get(ticket.model)
        if model is None or model.removed or model.state is not Residency.READY or len(model.queue):
            return None
        if self._strict and self._waiting:
            return None
        admit = self._try_admit(ticket, model, now)
        if admit is not None:
            model.demand.count += 1
            self._arrivals.append((now, ticket.model))
        return admit

    def finish(
        self, ticket_id: int, now: float, prompt_tokens: int | None = None, output_tokens: int | None = None
    ) -> list[Command]:
        """A lease comes back, with the tokens it really used where they are known; whoever fits now is admitted. O(1),
        and O(log n) for each ticket admitted."""
        admitted = self._admitted.pop(ticket_id, None)
        if admitted is None:
            return []
        engine, model = admitted.engine, admitted.model
        engine.capacity.give(admitted.weight)
        engine.in_flight -= 1
        engine.served += 1
        demand = model.demand
        demand.served += 1
        demand.busy_s += now - admitted.since_s
        if output_tokens is not None:
            _settle(admitted, prompt_tokens or 0, output_tokens)
        if model.engine is not engine:
            return []
        model.last_used_s = now
        model.failures = 0
        out = self._admit_waiting(model, now) if model.state is Residency.READY and len(model.queue) else []
        if not engine.in_flight:
            model.pace.ended(now)
            out += self._became_idle(model, now)
            if model.state is not Residency.READY:
                return self._with_wake(out + self._plan(now))
        return self._with_wake(out + self._plan_soon(now)) if self._waiting else self._with_wake(out)

    def cancel(self, ticket_id: int, now: float) -> list[Command]:
        """A caller has gone, waiting or admitted. O(1) for an admitted ticket, else as `_plan`."""
        waiting = self._waiting.pop(ticket_id, None)
        if waiting is None:
            return self.finish(ticket_id, now)
        model = self.models[waiting.ticket.model]
        model.queue.remove(waiting.ticket)
        # it may have been the large head that held back small ones, or the only reason for an eviction
        out = self._admit_waiting(model, now) if model.state is Residency.READY else []
        return self._with_wake(out + self._plan_soon(now))

    def _engine_ready(self, event: EngineReady, now: float) -> list[Command]:
        if event.adopted:
            return self._adopt(event, now)
        model = self.placement.by_engine(event.engine_id)
        if model is None or model.engine is None or model.state not in (Residency.LOADING, Residency.WAKING):
            return []
        self.placement.start_over(model.engine)
        model.seconds_to_load = event.load_seconds
        _charge_load(model, event.load_seconds)
        if model.state is Residency.WAKING or self.placement.may_sleep(model):
            return [Probe(event.engine_id)]
        return self._now_ready(model, now)

    def _probe_answered(self, event: ProbeAnswered, now: float) -> list[Command]:
        model = self.placement.by_engine(event.engine_id)
        if model is None or model.engine is None:
            return []
        if model.state is Residency.LOADING:
            model.engine.says = None if event.error else event
            return self._now_ready(model, now)
        if model.state is not Residency.WAKING or model.engine.says is None:
            return []
        wrong = difference(model.engine.says, event)
        if wrong is None:
            model.sleepless_times = 0
            return self._now_ready(model, now)
        self._keep_awake(model, now)
        return self.placement.stop(model, StopCause.CORRUPT, f"it did not wake as it was: {wrong}")

    def _asleep(self, engine_id: str, error: str, now: float) -> list[Command]:
        model = self.placement.by_engine(engine_id)
        if model is None or model.engine is None or model.state is not Residency.SUSPENDING:
            return []
        if error:
            self._keep_awake(model, now)
            return self.placement.stop(model, StopCause.EVICTED, f"it could not be put to sleep: {error}")
        if self.placement.departures.answered(model.engine, now):
            self.placement.asleep(model)
        return []

    def _keep_awake(self, model: ModelState, now: float) -> None:
        """Sleep failed this model: its engines are stopped instead, for a while that grows."""
        pause = self._pause_s(model.sleepless_times)
        model.sleepless, model.sleepless_times = True, model.sleepless_times + 1
        self._timers.push(now + pause, "sleepless", model.spec.name)

    def _adopt(self, event: EngineReady, now: float) -> list[Command]:
        model = self.models.get(event.model)
        known = all(name in self.devices for name in (event.device, *event.partners))
        if model is None or not known or model.engine is not None:
            return [
                Stop(
                    event.engine_id,
                    StopCause.CONFIGURATION,
                    "an engine from before that the configuration no longer has a place for",
                )
            ]
        self.placement.adopt(model, event.engine_id, event.device, event.revision, event.partners)
        return self._now_ready(model, now)

    def _now_ready(self, model: ModelState, now: float) -> list[Command]:
        assert model.engine is not None
        model.loads += model.state is not Residency.WAKING
        model.move(Residency.READY)
        model.progress, model.note, model.last_error = 1.0, "", ""
        model.ran_out, model.engine.was_ready = False, True
        self.placement.learn(model)
        model.wanted_order = None
        model.last_used_s = model.last_asked_s = now
        out = self._admit_waiting(model, now)
        if model.engine is not None and not model.engine.in_flight:
            out += self._became_idle(model, now)
        return out

    def _engine_failed(self, event: EngineFailed, now: float) -> list[Command]:
        model = self.placement.by_engine(event.engine_id)
        if model is None or model.engine is None:
            return []
        if model.state is Residency.STOPPING:
            return self._engine_gone(event.engine_id, now)
        loading = model.state is Residency.LOADING
        once_more = loading and event.out_of_memory and not model.ran_out
        if loading and event.out_of_memory:
            model.ran_out = True
            self.placement.ran_out(model)
        model.failures += not once_more
        model.last_error = event.reason
        if (loading and not once_more) or model.failures >= MAX_CRASHES:
            model.engine.end = Residency.FAILED
        if not self.placement.frees_late(model.engine):
            return self._departed(model, now)
        self.placement.stop(model, StopCause.LEAKED, "it has gone, its memory not yet")
        return self._engine_gone(event.engine_id, now)

    def _back_off(self, model: ModelState, now: float) -> list[Command]:
        model.move(Residency.FAILED)
        model.wanted_order = None
        model.retry_at_s = now + self._pause_s(model.failures - 1)
        self._timers.push(model.retry_at_s, "retry", model.spec.name)
        return [
            self._refuse_waiting(waiting, self._failed(waiting.ticket, model, now)) for waiting in model.queue.drain()
        ]

    def _pause_s(self, times: int) -> float:
        return min(self.settings.backoff_limit_s, self.settings.backoff_first_s * 2.0 ** min(times, 30))

    def _engine_gone(self, engine_id: str, now: float) -> list[Command]:
        """No process is left; on some devices that is not yet the end."""
        model = self.placement.by_engine(engine_id)
        if model is None or model.engine is None:
            return []
        if model.state is Residency.STOPPING and not self.placement.departures.answered(model.engine, now):
            return []
        return self._departed(model, now)

    def _departed(self, model: ModelState, now: float) -> list[Command]:
        """The engine is gone and its memory is back, or is not waited for any longer."""
        engine = model.engine
        assert engine is not None
        self.placement.detach(model)
        if model.removed:
            del self.models[model.spec.name]
            return []
        if engine.end is Residency.FAILED:
            return self._back_off(model, now)
        model.move(Residency.COLD)
        return []

    def _load_asked(self, name: str) -> list[Command]:
        model = self.models.get(name)
        if model is None or model.state in (Residency.READY, Residency.LOADING, Residency.WAKING):
            return []
        if model.state is Residency.FAILED:
            model.move(Residency.COLD)
        model.wanted_order = self._next_order()
        return []

    def _unload_asked(self, name: str) -> list[Command]:
        model = self.models.get(name)
        if model is None:
            return []
        model.wanted_order = None
        return self.placement.give_up(model, StopCause.OPERATOR, "an operator asked for it")

    def _config_changed(self, specs: Iterable[ModelSpec], settings: SchedulerSettings) -> list[Command]:
        self.settings = settings
        self.placement.configure(settings)
        wanted = {spec.name: spec for spec in specs}
        out: list[Command] = []
        for name, spec in wanted.items():
            model = self.models.setdefault(name, ModelState(spec, self.fairness))
            model.spec, model.removed = spec, False
            self.placement.book(model)
            if model.engine is not None and model.engine.revision == spec.revision:
                model.engine.capacity.resize(spec.kv_tokens, spec.max_sequences)
        for name in self.models.keys() - wanted.keys():
            out += self._remove(self.models[name])
        return out

    def _remove(self, model: ModelState) -> list[Command]:
        model.removed, model.wanted_order = True, None
        name = model.spec.name
        out: list[Command] = [
            self._refuse_waiting(
                waiting,
                Refuse(waiting.ticket.id, RefusalCode.UNKNOWN_MODEL, f"{name!r} was removed from the configuration"),
            )
            for waiting in model.queue.drain()
        ]
        if model.engine is None:
            del self.models[name]
            return out
        return out + self.placement.give_up(model, StopCause.CONFIGURATION, "removed from the configuration")

    def _measured(self, event: MemoryMeasured, now: float) -> list[Command]:
        ledger = self.devices.get(event.device)
        if ledger is None:
            return []
        ledger.measured(event.used_bytes, event.foreign_bytes, event.overhead_bytes, event.engines)
        out: list[Command] = []
        for model in self.placement.leaving(event.device):
            if model.engine is not None and self.placement.departures.complete(model.engine):
                out += self._gave_back(model, now)
        return out

    def _gave_back(self, model: ModelState, now: float) -> list[Command]:
        if model.state is not Residency.SUSPENDING:
            return self._departed(model, now)
        self.placement.asleep(model)
        return []

    def _fall_over(self, engine_id: str, now: float) -> list[Command]:
        """An engine said some time ago that it sleeps or has gone: has its memory come back?"""
        model = self.placement.by_engine(engine_id)
        departures = self.placement.departures
        if model is None or (engine := model.engine) is None or not departures.due(engine):
            return []
        if departures.complete(engine):
            return self._gave_back(model, now)
        if departures.wait_longer(engine, now):
            return []
        once_more = departures.again(engine) == 1
        what = f"its memory is still in use after {self.settings.fall_limit_s:g} s"
        if model.state is Residency.SUSPENDING:
            if once_more:
                return [Sleep(engine_id, StopCause.LEAKED, f"it says that it sleeps, and {what}: once more")]
            self._keep_awake(model, now)
            return self.placement.stop(model, StopCause.LEAKED, f"it says that it sleeps, and {what}", force=True)
        if once_more:
            return [Stop(engine_id, StopCause.LEAKED, f"it has gone, and {what}: once more, by force", force=True)]
        model.failures += 1
        model.last_error = f"its last engine has gone, and {what}"
        engine.end = Residency.FAILED
        return self._departed(model, now)

    def _progress(self, event: LoadProgress) -> None:
        model = self.placement.by_engine(event.engine_id)
        if model is not None and model.state is Residency.LOADING:
            model.progress, model.note = max(model.progress, event.fraction), event.note

    # ----------------------------------------------------------------- timers

    def _tick(self, now: float) -> list[Command]:
        self._wake_at = None
        out: list[Command] = []
        due = False
        while (timer := self._timers.pop_due(now)) is not None:
            out += self._due(timer, now)
            due = True
        return out + (self._plan(now) if due else self._plan_soon(now))

    def _due(self, timer: Timer, now: float) -> list[Command]:
        _, _, kind, key = timer
        if kind == "wait":
            return self._wait_over(int(key), now)
        if kind == "plan":
            self._again_at = inf  # every tick that is due plans
            return []
        if kind == "fall":
            return self._fall_over(str(key), now)
        model = self.models.get(str(key))
        if model is None:
            return []
        if kind == "ttl":
            return self._ttl_over(model, now)
        if kind == "sleepless":
            model.sleepless = False
            return []
        if model.state is Residency.FAILED and model.retry_at_s <= now:
            model.move(Residency.COLD)
        return []

    def _wait_over(self, ticket_id: int, now: float) -> list[Command]:
        waiting = self._waiting.get(ticket_id)
        if waiting is None:
            return []
        ticket = waiting.ticket
        model = self.models[ticket.model]
        model.queue.remove(ticket)
        waited = f"waited {now - waiting.since_s:.0f} s for {ticket.model}"
        code = RefusalCode.WAITED_TOO_LONG
        if ticket.deadline_s is not None and now >= ticket.deadline_s:
            code, waited = RefusalCode.DEADLINE, f"its deadline has passed: it {waited}"
        reason = f"{waited}, {self._why_waiting(model)}"
        out: list[Command] = [
            self._refuse_waiting(waiting, Refuse(ticket.id, code, reason, model.expected_load_s(now)))
        ]
        if model.state is Residency.READY:
            out += self._admit_waiting(model, now)
        return out

    def _ttl_over(self, model: ModelState, now: float) -> list[Command]:
        model.ttl_armed = False
        ttl = model.spec.ttl_s
        if ttl is None or not model.idle:
            return []
        if self.placement.start_beside(model):
            model.ttl_armed = True
            self._timers.push(now + TTL_AGAIN_S, "ttl", model.spec.name)
            return []
        if now >= model.last_used_s + ttl:
            return self.placement.give_up(
                model, StopCause.IDLE, f"idle for {now - model.last_used_s:.0f} s (ttl_s = {ttl:g})"
            )
        self._arm_ttl(model)
        return []

    def _arm_ttl(self, model: ModelState) -> None:
        if model.spec.ttl_s is not None and not model.ttl_armed and not model.spec.pinned:
            model.ttl_armed = True
            self._timers.push(model.last_used_s + model.spec.ttl_s, "ttl", model.spec.name)

    def _with_wake(self, out: list[Command]) -> list[Command]:
        """Adds a WakeAt when the next moment of interest has moved nearer."""
        at = self._timers.next_at()
        if at is not None and (self._wake_at is None or at < self._wake_at):
            self._wake_at = at
            out.append(WakeAt(at))
        return out

    def _timer_alive(self, timer: Timer) -> bool:
        return timer[2] != "wait" or timer[3] in self._waiting

    # -------------------------------------------------------------- admission

    def _try_admit(self, ticket: Ticket, model: ModelState, now: float) -> Admit | None:
        engine = model.engine
        assert engine is not None
        # an estimate must not refuse: what looks larger than the engine takes it whole, and the engine decides
        weight = min(_tokens_of(ticket, model), engine.capacity.tokens)
        return self._admit(ticket, model, weight, False, now) if engine.capacity.try_take(weight) else None

    def _admit(self, ticket: Ticket, model: ModelState, weight: int, charged: bool, now: float) -> Admit:
        engine = model.engine
        assert engine is not None
        if not engine.in_flight:
            model.pace.began(now)
        engine.in_flight += 1
        model.last_asked_s = now
        shares = model.shares
        if shares is not None and ticket.tenant not in shares.shares:
            for tenant, latency_class, tokens in shares.join(ticket.tenant, ticket.latency_class):
                model.queue.charge(tenant, latency_class, tokens)
        self._admitted[ticket.id] = Admitted(ticket, model, engine, weight, charged, now)
        return Admit(ticket.id, engine.id)

    def _admit_waiting(self, model: ModelState, now: float) -> list[Command]:
        if self._strict:
            return self._admit_in_order(now)
        engine = model.engine
        assert engine is not None
        out: list[Command] = []
        for waiting in model.queue.take(engine.capacity, now):
            del self._waiting[waiting.ticket.id]
            self._calibration.learn(waiting.stage, waiting.estimate_s, now - waiting.since_s)
            out.append(self._admit(waiting.ticket, model, waiting.tokens, True, now))
        return out

    def _admit_in_order(self, now: float) -> list[Command]:
        out: list[Command] = []
        while self._waiting:
            first = next(iter(self._waiting.values()))
            model = self.models[first.ticket.model]
            admit = self._try_admit(first.ticket, model, now) if model.state is Residency.READY else None
            if admit is None:
                break
            model.queue.remove(first.ticket)
            del self._waiting[first.ticket.id]
            out.append(admit)
        return out

    def _enqueue(self, ticket: Ticket, model: ModelState, now: float) -> None:
        patience = self.settings.patience_s[ticket.latency_class]
        overdue_s = now + self.settings.overdue_after * patience
        # never above what the engine will have, or it would wait for ever
        tokens = min(_tokens_of(ticket, model), model.spec.kv_tokens)
        waiting = Waiting(ticket, self._next_order(), now, now + patience, overdue_s, tokens)
        self._waiting[ticket.id] = waiting
        waiting.stage, waiting.estimate_s = self._estimate(model, len(model.queue), now)
        model.queue.push(waiting)
        until = now + self.settings.max_wait_s
        if ticket.deadline_s is not None:
            until = min(until, ticket.deadline_s)
        if until < inf:
            self._timers.push(until, "wait", ticket.id)
        self._timers.compact(self._timer_alive, len(self._waiting) + len(self.models))

    def _refusal(self, ticket: Ticket, model: ModelState, now: float) -> Refuse | None:
        """Why a ticket that cannot be admitted now may not wait either."""
        if model.state is Residency.FAILED:
            return self._failed(ticket, model, now)
        if model.engine is None and (reason := self.placement.never_fits(model.spec)) is not None:
            return Refuse(ticket.id, RefusalCode.NEVER_FITS, reason)
        if ticket.deadline_s is not None and ticket.deadline_s <= now:
            return Refuse(ticket.id, RefusalCode.DEADLINE, "its deadline has passed already")
        if ticket.deadline_s is not None and model.loads:  # what was never loaded may be faster than was guessed
            eta = self._calibration.eta(*self._estimate(model, len(model.queue), now))
            if now + eta.low_s > ticket.deadline_s:
                left_s = ticket.deadline_s - now
                reason = f"its deadline is in {left_s:.1f} s and {ticket.model} is at best {eta.low_s:.1f} s away"
                return Refuse(ticket.id, RefusalCode.DEADLINE, reason, eta.expected_s)
        if len(model.queue) >= model.spec.max_queue:
            reason = f"{len(model.queue)} requests wait for {ticket.model} already (max_queue = {model.spec.max_queue})"
            return Refuse(ticket.id, RefusalCode.QUEUE_FULL, reason, self._retry_after(model, now))
        if len(self._waiting) >= self.settings.max_waiting:
            reason = f"{len(self._waiting)} requests wait already (limits.max_waiting = {self.settings.max_waiting})"
            return Refuse(ticket.id, RefusalCode.QUEUE_FULL, reason, self._retry_after(model, now))
        return None

    def _retry_after(self, model: ModelState, now: float) -> float:
        return max(1.0, self._calibration.eta(*self._estimate(model, len(model.queue), now)).expected_s)

    def _failed(self, ticket: Ticket, model: ModelState, now: float) -> Refuse:
        pause = max(0.0, model.retry_at_s - now)
        reason = f"{ticket.model} could not be loaded: {model.last_error}; next try in {pause:.0f} s"
        return Refuse(ticket.id, RefusalCode.LOAD_FAILED, reason, pause)

    def _refuse_waiting(self, waiting: Waiting, refusal: Refuse) -> Refuse:
        del self._waiting[waiting.ticket.id]
        return refusal

    def _became_idle(self, model: ModelState, now: float) -> list[Command]:
        if model.state is Residency.DRAINING:
            if model.stop_cause is StopCause.EVICTED:
                return []  # its plan stops it, unless that is revised
            return self.placement.drained(model)
        self._arm_ttl(model)
        return self.placement.relieve_pressure(self.settings.pressure_threshold)

    def _plan_soon(self, now: float) -> list[Command]:
        """Plan now if that is cheap for what has happened, else in a moment.

        A plan costs O(wanted models), and one more arrival or end seldom changes it. Each such event earns a credit,
        and so does time; with w models to choose from a plan is due at w^2 / 100 credits, w at most. So nearly every
        event plans while few are wanted, the cost per event is bounded however many are, and no plan is older than a
        second.
        """
        wanted = self.placement.wanted
        per_s = max(CREDIT_PER_S, wanted)
        self._credit += 1.0 + per_s * (now - self._credit_at)
        self._credit_at = now
        missing = min(0.01 * wanted * wanted, wanted) - self._credit
        if missing <= 0.0:
            return self._plan(now)
        self._plan_at(now + missing / per_s)
        return []

    def _plan_at(self, at_s: float) -> None:
        if at_s < self._again_at:
            self._again_at = at_s
            self._timers.push(at_s, "plan", "")

    def _plan(self, now: float) -> list[Command]:
        """Anything but the hot pair may change what should be resident."""
        self._credit, self._credit_at = 0.0, now
        if self._arrivals:
            self.ordering.saw(self._arrivals)
            self.placement.eviction.saw(self._arrivals)
            self._arrivals.clear()
        out, revived = self.placement.plan(now)
        if self._strict:
            out += self._admit_in_order(now)
        for model in revived:
            out += self._admit_waiting(model, now)
            if model.idle:
                self._arm_ttl(model)
        self._plan_at(self.placement.again_at)
        return out + self.placement.relieve_pressure(self.settings.pressure_threshold)

    # ---------------------------------------------------------------- answers

    def describe(self, ticket_id: int, now: float) -> str:
        """One line for the client that waits: what happens, how far it is, who goes first. O(1)."""
        waiting = self._waiting.get(ticket_id)
        if waiting is None:
            return ""
        model = self.models[waiting.ticket.model]
        ahead = model.queue.ahead(waiting)
        parts = [self._why_waiting(model)]
        if ahead:
            parts.append(f"{ahead} before you")
        eta = self._calibration.eta(*self._estimate(model, ahead, now))
        parts.append(f"about {eta.expected_s:.0f} s ({eta.low_s:.0f} to {eta.high_s:.0f} s)")
        return ", ".join(parts)

    def quote(self, ticket: Ticket, now: float) -> Quote:
        """When this ticket would get, or will get, its lease, and what its load would cost the others. Changes
        nothing. O(devices). A model that may not wait at all is not known here: ask `arrive`."""
        model = self.models[ticket.model]
        waiting = self._waiting.get(ticket.id)
        if waiting is None and model.state is Residency.READY and not len(model.queue):
            engine = model.engine
            if engine is not None and engine.capacity.free_sequences and engine.capacity.free_tokens:
                return Quote(Eta(0.0, 0.0, 0.0), 0.0)
        ahead = len(model.queue) if waiting is None else model.queue.ahead(waiting)
        eta = self._calibration.eta(*self._estimate(model, ahead, now))
        alone = model.engine is None and len(model.queue) <= (waiting is not None)
        return Quote(eta, model.seconds_to_load if alone else 0.0)

    def _estimate(self, model: ModelState, ahead: int, now: float) -> tuple[Stage, float]:
        """Where a ticket with so many before it stands, and for how long it should wait if nothing comes between."""
        service_s = model.demand.mean_service_s()
        if model.state is Residency.READY:
            return Stage.BUSY, (ahead + 1) * service_s / max(1, model.in_flight)
        rounds_s = ahead // model.spec.max_sequences * service_s
        if model.state is Residency.LOADING:
            return Stage.LOADING, model.expected_load_s(now) + rounds_s
        planned, begin_s = self.placement.begins_in_s(model, now)
        return Stage.PLANNED if planned else Stage.QUEUED, begin_s + model.seconds_to_load + rounds_s

    def _why_waiting(self, model: ModelState) -> str:
        name = model.spec.name
        match model.state:
            case Residency.LOADING:
                return f"loading {name}, {model.progress:.0%} ({model.note})"
            case Residency.WAKING:
                return f"waking {name}"
            case Residency.READY:
                return f"{name} is busy"
            case Residency.DRAINING | Residency.SUSPENDING | Residency.STOPPING:
                return f"{name} makes room for another model first"
            case _:
                return f"making room for {name}"

    def waiting_tickets(self) -> Iterator[Ticket]:
        """Everybody who waits, in the order of arrival."""
        return (waiting.ticket for waiting in self._waiting.values())

    def waiting_by_class(self) -> list[int]:
        """How many tickets wait in each latency class. O(models)."""
        return [sum(model.queue.count(c) for model in self.models.values()) for c in LatencyClass]

    # ------------------------------------------------------------------ small

    def _next_order(self) -> int:
        self._order += 1
        return self._order

    def check(self) -> None:
        """What always holds; tests call this after every event. O(everything)."""
        for ledger in self.devices.values():
            ledger.check()
        self.placement.sleep_memory.check()
        assert not self._waiting.keys() & self._admitted.keys()
        assert len(self._waiting) == sum(len(model.queue) for model in self.models.values())
        for model in self.models.values():
            assert (model.engine is None) == (model.state in (Residency.COLD, Residency.FAILED)), model
            if model.engine is not None:
                mine = [a for a in self._admitted.values() if a.engine is model.engine]
                assert len(mine) == model.engine.in_flight, model
                assert sum(a.weight for a in mine) == model.engine.capacity.held_tokens, model
            model.queue.check()
            head = model.queue.head()
            if head is not None and model.state is Residency.READY and model.engine is not None and not self._strict:
                # what a tenant is charged for another model may change whose turn it is here: the next end looks again
                charged = model.engine.in_flight and len({tenant for tenant, _, _ in model.queue.places()}) > 1
                weight = min(head.tokens, model.engine.capacity.tokens)
                assert charged or not model.engine.capacity.fits(weight), f"{model}: whoever is the head would fit"
        self.fairness.check(place for model in self.models.values() for place in model.queue.places())


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


def _charge_load(model: ModelState, load_s: float) -> None:
    """A load is over: its seconds are charged, as tokens, to whoever's ticket made it necessary."""
    cause, model.cause, model.shares = model.cause, None, None
    if cause is not None:
        tokens = round(load_s * model.pace.tokens_per_s)
        model.shares = LoadShares(tokens, cause.tenant, cause.latency_class)
        model.queue.charge(cause.tenant, cause.latency_class, tokens)
