"""The scheduler's core: one synchronous state machine, `step(event, now) -> list[Command]`.

It never waits, logs, reads a clock, opens anything or raises for load. Two shells drive it: the asyncio driver in
production and a simulator in virtual time. How it decides:

- A request for a model that is ready and has room is admitted at once (`arrive`), and its end makes room (`finish`).
  These two are the hot pair and never plan.
- Anything else may change what should be resident, so it ends in `_plan`: per device, the most urgent model that
  somebody waits for is loaded if it fits; else the cheapest set of victims is drained and stopped, and it is loaded when
  they are gone. One start per device at a time, and no eviction on a device while one is under way.
- Most urgent is latency class first, then order of arrival (`ordering` in a later room replaces this). The most urgent
  model of a device blocks the less urgent ones there, so nobody starves.
- A model that is ready serves everything that waits for it before it can become a victim, so two models that trade
  places always make progress.

Cost: arrive and finish O(1); everything else O(models) at most.
"""

from __future__ import annotations

from collections.abc import Iterable

from scheduler import eviction
from scheduler.admission import Waiting
from scheduler.commands import Admit, Command, Load, Refuse, Stop, WakeAt
from scheduler.events import (
    Arrived,
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
    Tick,
    UnloadAsked,
)
from scheduler.ledger import DeviceLedger
from scheduler.model import DeviceSpec, ModelSpec, RefusalCode, Residency, SchedulerSettings, Ticket
from scheduler.state import EngineState, ModelState
from scheduler.timers import Timer, Timers

MAX_CRASHES = 3  # a ready engine that dies this often without serving anybody in between is backed off


class Admitted:
    """A ticket that holds a lease: what to give back, and to whom."""

    __slots__ = ("engine", "model", "ticket", "weight")

    def __init__(self, ticket: Ticket, model: ModelState, engine: EngineState, weight: int) -> None:
        self.ticket = ticket
        self.model = model
        self.engine = engine
        self.weight = weight


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
    ) -> None:
        """`engines_before`: how many engine ids are taken already, by engines that outlived an earlier proxy."""
        self.settings = settings or SchedulerSettings()
        self.devices = {spec.name: DeviceLedger(spec) for spec in devices}
        self.models = {spec.name: ModelState(spec) for spec in models}
        self._waiting: dict[int, Waiting] = {}
        self._admitted: dict[int, Admitted] = {}
        self._by_engine: dict[str, ModelState] = {}
        self._timers = Timers()
        self._wake_at: float | None = None
        self._order = 0
        self._engine_count = engines_before

    def __repr__(self) -> str:
        return f"<Core models={len(self.models)} waiting={len(self._waiting)} admitted={len(self._admitted)}>"

    # ---------------------------------------------------------------- events

    def step(self, event: Event, now: float) -> list[Command]:
        """Take in what happened, answer with what must be done. Unknown ids are late news and change nothing."""
        match event:
            case Arrived(ticket):
                return self.arrive(ticket, now)
            case Finished(ticket_id):
                return self.finish(ticket_id, now)
            case Cancelled(ticket_id):
                return self.cancel(ticket_id, now)
            case LoadProgress():
                self._progress(event)
                return []
            case MemoryMeasured():
                self._measured(event)
                out: list[Command] = []
            case EngineReady():
                out = self._engine_ready(event, now)
            case EngineFailed(engine_id, reason):
                out = self._engine_failed(engine_id, reason, now)
            case EngineStopped(engine_id):
                out = self._engine_gone(engine_id)
            case LoadAsked(name):
                out = self._load_asked(name)
            case UnloadAsked(name):
                out = self._unload_asked(name)
            case ConfigChanged(models, settings):
                out = self._config_changed(models, settings)
            case Tick():
                out = self._tick(now)
        out += self._plan(now)
        return self._with_wake(out)

    def arrive(self, ticket: Ticket, now: float) -> list[Command]:
        """A ticket comes: admitted at once, queued, or refused. O(1) unless it must plan."""
        model = self.models.get(ticket.model)
        if model is None or model.removed:
            return [Refuse(ticket.id, RefusalCode.UNKNOWN_MODEL, f"no local model named {ticket.model!r}")]
        if model.state is Residency.READY and not len(model.queue):
            admit = self._try_admit(ticket, model, now)
            if admit is not None:
                return [admit]
        refusal = self._refusal(ticket, model, now)
        if refusal is not None:
            return [refusal]
        self._enqueue(ticket, model, now)
        # on a ready model it may have gone straight to the head, past a large one of a lower class, and fit
        return self._with_wake(self._admit_waiting(model, now) if model.state is Residency.READY else self._plan(now))

    def finish(self, ticket_id: int, now: float) -> list[Command]:
        """A lease comes back; whoever fits now is admitted. O(1) for each ticket admitted."""
        admitted = self._admitted.pop(ticket_id, None)
        if admitted is None:
            return []
        engine, model = admitted.engine, admitted.model
        engine.capacity.give(admitted.weight)
        engine.in_flight -= 1
        engine.served += 1
        if model.engine is not engine:
            return []
        model.last_used_s = now
        model.failures = 0
        if model.state is Residency.READY and len(model.queue):
            return self._admit_waiting(model, now)
        if engine.in_flight:
            return []
        return self._with_wake(self._became_idle(model, now))

    def cancel(self, ticket_id: int, now: float) -> list[Command]:
        waiting = self._waiting.pop(ticket_id, None)
        if waiting is None:
            return self.finish(ticket_id, now)
        model = self.models[waiting.ticket.model]
        model.queue.remove(waiting.ticket)
        # it may have been the large head that held back small ones, or the only reason for an eviction
        out = self._admit_waiting(model, now) if model.state is Residency.READY else []
        return self._with_wake(out + self._plan(now))

    def _engine_ready(self, event: EngineReady, now: float) -> list[Command]:
        if event.adopted:
            return self._adopt(event, now)
        model = self._by_engine.get(event.engine_id)
        if model is None or model.state is not Residency.LOADING or model.engine is None:
            return []
        self.devices[model.engine.device].started(event.engine_id)
        model.seconds_to_load = event.load_seconds
        return self._now_ready(model, now)

    def _adopt(self, event: EngineReady, now: float) -> list[Command]:
        model = self.models.get(event.model)
        ledger = self.devices.get(event.device)
        if model is None or ledger is None or model.engine is not None:
            return [Stop(event.engine_id, "an engine from before that the configuration no longer has a place for")]
        engine = EngineState(event.engine_id, event.device, model.spec)
        engine.revision = event.revision
        ledger.promise(engine.id, model.spec.memory_bytes, starting=False)
        self._by_engine[engine.id] = model
        model.engine = engine
        return self._now_ready(model, now)

    def _now_ready(self, model: ModelState, now: float) -> list[Command]:
        model.move(Residency.READY)
        model.progress, model.note, model.last_error = 1.0, "", ""
        model.loads += 1
        model.wanted_order = None
        model.last_used_s = now
        out = self._admit_waiting(model, now)
        if model.engine is not None and not model.engine.in_flight:
            out += self._became_idle(model, now)
        return out

    def _engine_failed(self, engine_id: str, reason: str, now: float) -> list[Command]:
        model = self._by_engine.get(engine_id)
        if model is None:
            return []
        if model.state is Residency.STOPPING:
            return self._engine_gone(engine_id)
        loading = model.state is Residency.LOADING
        model.failures += 1
        model.last_error = reason
        self._detach(model)
        if model.removed:
            del self.models[model.spec.name]
            return []
        if not loading and model.failures < MAX_CRASHES:
            model.move(Residency.COLD)
            return []
        return self._back_off(model, now)

    def _back_off(self, model: ModelState, now: float) -> list[Command]:
        model.move(Residency.FAILED)
        model.wanted_order = None
        doublings = min(model.failures - 1, 30)
        pause = min(self.settings.backoff_limit_s, self.settings.backoff_first_s * 2.0**doublings)
        model.retry_at_s = now + pause
        self._timers.push(model.retry_at_s, "retry", model.spec.name)
        return [self._refuse_waiting(waiting, self._failed(waiting.ticket, model, now)) for waiting in model.queue.drain()]

    def _engine_gone(self, engine_id: str) -> list[Command]:
        model = self._by_engine.get(engine_id)
        if model is None:
            return []
        self._detach(model)
        model.move(Residency.COLD)
        if model.removed:
            del self.models[model.spec.name]
        return []

    def _load_asked(self, name: str) -> list[Command]:
        model = self.models.get(name)
        if model is None or model.state in (Residency.READY, Residency.LOADING):
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
        return self._give_up(model, "an operator asked for it", operator=True)

    def _config_changed(self, specs: Iterable[ModelSpec], settings: SchedulerSettings) -> list[Command]:
        self.settings = settings
        wanted = {spec.name: spec for spec in specs}
        out: list[Command] = []
        for name, spec in wanted.items():
            model = self.models.setdefault(name, ModelState(spec))
            model.spec, model.removed = spec, False
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
        return out + self._give_up(model, "removed from the configuration", operator=True)

    def _measured(self, event: MemoryMeasured) -> None:
        ledger = self.devices.get(event.device)
        if ledger is not None:
            ledger.measured(event.used_bytes, event.foreign_bytes, event.overhead_bytes, event.engines)

    def _progress(self, event: LoadProgress) -> None:
        model = self._by_engine.get(event.engine_id)
        if model is not None and model.state is Residency.LOADING:
            model.progress, model.note = max(model.progress, event.fraction), event.note

    # ----------------------------------------------------------------- timers

    def _tick(self, now: float) -> list[Command]:
        self._wake_at = None
        out: list[Command] = []
        while (timer := self._timers.pop_due(now)) is not None:
            out += self._due(timer, now)
        return out

    def _due(self, timer: Timer, now: float) -> list[Command]:
        _, _, kind, key = timer
        if kind == "wait":
            return self._wait_over(int(key), now)
        model = self.models.get(str(key))
        if model is None:
            return []
        if kind == "ttl":
            return self._ttl_over(model, now)
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
        out: list[Command] = [self._refuse_waiting(waiting, Refuse(ticket.id, code, reason, model.expected_load_s(now)))]
        if model.state is Residency.READY:
            out += self._admit_waiting(model, now)
        return out

    def _ttl_over(self, model: ModelState, now: float) -> list[Command]:
        model.ttl_armed = False
        ttl = model.spec.ttl_s
        if ttl is None or not model.idle:
            return []
        if now >= model.last_used_s + ttl:
            return self._give_up(model, f"idle for {now - model.last_used_s:.0f} s (ttl_s = {ttl:g})")
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
        # An estimate must not refuse: what looks larger than the engine takes it whole, and the engine has the last word
        weight = min(ticket.weight_tokens, engine.capacity.tokens)
        if not engine.capacity.try_take(weight):
            return None
        engine.in_flight += 1
        model.last_used_s = now
        self._admitted[ticket.id] = Admitted(ticket, model, engine, weight)
        return Admit(ticket.id, engine.id)

    def _admit_waiting(self, model: ModelState, now: float) -> list[Command]:
        out: list[Command] = []
        while (head := model.queue.head()) is not None:
            admit = self._try_admit(head.ticket, model, now)
            if admit is None:
                break
            model.queue.remove(head.ticket)
            del self._waiting[head.ticket.id]
            out.append(admit)
        return out

    def _enqueue(self, ticket: Ticket, model: ModelState, now: float) -> None:
        waiting = Waiting(ticket, self._next_order(), now)
        self._waiting[ticket.id] = waiting
        model.queue.push(waiting)
        until = now + self.settings.max_wait_s
        if ticket.deadline_s is not None:
            until = min(until, ticket.deadline_s)
        self._timers.push(until, "wait", ticket.id)
        self._timers.compact(self._timer_alive, len(self._waiting) + len(self.models))

    def _refusal(self, ticket: Ticket, model: ModelState, now: float) -> Refuse | None:
        """Why a ticket that cannot be admitted now may not wait either."""
        if model.state is Residency.FAILED:
            return self._failed(ticket, model, now)
        if model.engine is None and (reason := self.never_fits(model.spec)) is not None:
            return Refuse(ticket.id, RefusalCode.NEVER_FITS, reason)
        if ticket.deadline_s is not None and ticket.deadline_s <= now:
            return Refuse(ticket.id, RefusalCode.DEADLINE, "its deadline has passed already")
        if len(model.queue) >= model.spec.max_queue:
            reason = f"{len(model.queue)} requests wait for {ticket.model} already (max_queue = {model.spec.max_queue})"
            return Refuse(ticket.id, RefusalCode.QUEUE_FULL, reason, self._retry_after(model, now))
        if len(self._waiting) >= self.settings.max_waiting:
            reason = f"{len(self._waiting)} requests wait already (limits.max_waiting = {self.settings.max_waiting})"
            return Refuse(ticket.id, RefusalCode.QUEUE_FULL, reason, self._retry_after(model, now))
        return None

    def _retry_after(self, model: ModelState, now: float) -> float:
        return 1.0 if model.state is Residency.READY else max(1.0, model.expected_load_s(now))

    def _failed(self, ticket: Ticket, model: ModelState, now: float) -> Refuse:
        pause = max(0.0, model.retry_at_s - now)
        reason = f"{ticket.model} could not be loaded: {model.last_error}; next try in {pause:.0f} s"
        return Refuse(ticket.id, RefusalCode.LOAD_FAILED, reason, pause)

    def _refuse_waiting(self, waiting: Waiting, refusal: Refuse) -> Refuse:
        del self._waiting[waiting.ticket.id]
        return refusal

    # --------------------------------------------------------------- planning

    def _plan(self, now: float) -> list[Command]:
        """What should be resident: one decision per device, for the most urgent model that can run there."""
        wanted = self._wanted()
        out: list[Command] = []
        served: set[str] = set()
        for model in wanted:
            if model.state is Residency.COLD:
                out += self._make_resident(model, served, now)
        out += self._revive_draining({model.spec.device_kind for model in wanted if model.state is Residency.COLD}, now)
        out += self._relieve_pressure(served, now)
        return out + self._replace_outdated()

    def _wanted(self) -> list[ModelState]:
        """Models that are not ready and that somebody waits for, most urgent first."""
        ranked = [
            (rank, model.spec.name, model)
            for model in self.models.values()
            if model.state is not Residency.READY and (rank := model.rank()) is not None
        ]
        ranked.sort(key=lambda entry: entry[:2])
        return [model for _, _, model in ranked]

    def _make_resident(self, model: ModelState, served: set[str], now: float) -> list[Command]:
        """Load the model on the device where that costs least, or start to make room there.

        `served` are devices that a more urgent model has claimed in this plan; that model's claim includes the room
        being made for it, so nobody else may take it.
        """
        options: list[tuple[int, int, DeviceLedger, list[eviction.Candidate]]] = []
        for ledger in self._devices_of(model.spec):
            if ledger.spec.name in served:
                continue
            victims = self._room_for(model, ledger)
            if victims is not None:
                options.append((len(victims), -ledger.free, ledger, victims))
        if not options:
            return []
        _, _, ledger, victims = min(options, key=lambda option: option[:2])
        served.add(ledger.spec.name)
        if ledger.starting is not None:
            return []  # one start at a time, and no neighbour leaves while it measures the device
        if ledger.free >= model.spec.memory_bytes:
            return [self._load(model, ledger, now)]
        out: list[Command] = []
        for victim in victims:
            idle = f"idle for {now - victim.last_used_s:.0f} s" if not victim.in_flight else f"{victim.in_flight} in flight"
            why = f"evicted for {model.spec.name}, which needs {_size(model.spec.memory_bytes)} (least recently used, {idle})"
            out += self._give_up(self.models[victim.model], why)
        return out

    def _room_for(self, model: ModelState, ledger: DeviceLedger) -> list[eviction.Candidate] | None:
        """The victims whose end makes room on this device: [] when there is, or will be, room without any."""
        leaving = 0
        candidates = []
        for other in self.models.values():
            engine = other.engine
            if engine is None or engine.device != ledger.spec.name:
                continue
            holding = ledger.holding(engine.id)
            held = holding.held if holding is not None else 0
            if other.state in (Residency.DRAINING, Residency.STOPPING):
                leaving += held
            elif other.state is Residency.READY and not other.spec.pinned:
                candidates.append(eviction.Candidate(other.spec.name, held, engine.in_flight, other.last_used_s))
        missing = model.spec.memory_bytes - ledger.free - leaving
        return [] if missing <= 0 else eviction.lru(candidates, missing)

    def _load(self, model: ModelState, ledger: DeviceLedger, now: float) -> Load:
        self._engine_count += 1
        engine_id = f"{model.spec.name}#{self._engine_count}"
        free = _size(ledger.free)
        ledger.promise(engine_id, model.spec.memory_bytes)
        model.engine = EngineState(engine_id, ledger.spec.name, model.spec)
        self._by_engine[engine_id] = model
        model.move(Residency.LOADING)
        model.load_started_s, model.progress, model.note = now, 0.0, "starting"
        asked = "an operator asked for it" if model.wanted_order is not None else f"{len(model.queue)} waiting"
        reason = f"{asked}; needs {_size(model.spec.memory_bytes)} of {free} free"
        return Load(engine_id, model.spec.name, ledger.spec.name, reason)

    def _give_up(self, model: ModelState, why: str, *, operator: bool = False) -> list[Command]:
        """Drain a ready model, or stop it at once when it is idle; a start under way is broken off for operators only."""
        model.unload = model.unload or operator
        engine = model.engine
        if engine is None or model.state is Residency.STOPPING:
            return []
        if model.state is Residency.LOADING and operator:
            return self._stop(model, why)
        if model.state is Residency.READY:
            model.note = why
            if not engine.in_flight:
                return self._stop(model, why)
            model.move(Residency.DRAINING)
        return []

    def _stop(self, model: ModelState, why: str) -> list[Command]:
        assert model.engine is not None
        self.devices[model.engine.device].started(model.engine.id)
        model.move(Residency.STOPPING)
        model.note = why
        return [Stop(model.engine.id, why)]

    def _became_idle(self, model: ModelState, now: float) -> list[Command]:
        if model.state is Residency.DRAINING:
            return self._stop(model, model.note)
        self._arm_ttl(model)
        return self._relieve_pressure(set(), now)

    def _revive_draining(self, needed: set[str], now: float) -> list[Command]:
        """Victims that are still draining serve on, unless their kind of memory is `needed` for a cold model."""
        out: list[Command] = []
        for model in self.models.values():
            if model.state is not Residency.DRAINING or model.unload or self._outdated(model):
                continue
            if model.spec.device_kind not in needed:
                model.move(Residency.READY)
                model.note = ""
                out += self._admit_waiting(model, now)
        return out

    def _relieve_pressure(self, served: set[str], now: float) -> list[Command]:
        """Evict idle models, oldest first, while a device is fuller than `pressure_threshold`, before anyone waits.

        Devices where a start is under way or that are making room for a waiting model are left to that.
        """
        out: list[Command] = []
        for name, ledger in self.devices.items():
            allowed = self.settings.pressure_threshold * ledger.spec.capacity_bytes
            full = ledger.held + ledger.overhead + ledger.foreign
            if full <= allowed or ledger.starting is not None or name in served:
                continue
            for model in sorted(self._idle_on(name), key=lambda m: m.last_used_s):
                if full - self._leaving(ledger) <= allowed:
                    break
                share = full / ledger.spec.capacity_bytes
                out += self._give_up(model, f"{name} is {share:.0%} full (pressure_threshold), idle the longest")
        return out

    def _idle_on(self, device: str) -> list[ModelState]:
        return [
            model
            for model in self.models.values()
            if model.idle and not model.spec.pinned and model.engine is not None and model.engine.device == device
        ]

    def _leaving(self, ledger: DeviceLedger) -> int:
        """Bytes of engines that are on their way out of the device."""
        total = 0
        for model in self.models.values():
            if model.state is Residency.STOPPING and model.engine is not None:
                holding = ledger.holding(model.engine.id)
                total += holding.held if holding is not None else 0
        return total

    def _replace_outdated(self) -> list[Command]:
        out: list[Command] = []
        for model in self.models.values():
            if model.state is Residency.READY and self._outdated(model):
                out += self._give_up(model, "its configuration has changed")
        return out

    def _outdated(self, model: ModelState) -> bool:
        return model.engine is not None and model.engine.revision != model.spec.revision

    # ---------------------------------------------------------------- answers

    def never_fits(self, spec: ModelSpec) -> str | None:
        """Why the model can never be resident, or None. Pinned models' memory is not to be had; other engines' and
        foreign memory is, in time, so it does not count here: nothing is evicted for what cannot fit
        (ollama/ollama#18282)."""
        devices = list(self._devices_of(spec))
        if not devices:
            return f"{spec.name} runs on {spec.device_kind} memory, and there is no such device"
        largest = max(devices, key=lambda ledger: self._attainable(ledger, spec.name))
        attainable = self._attainable(largest, spec.name)
        if spec.memory_bytes <= attainable:
            return None
        pinned = self._pinned_bytes(largest, spec.name)
        besides = f", {_size(pinned)} of it pinned" if pinned else ""
        return (
            f"{spec.name} needs {_size(spec.memory_bytes)} and {largest.spec.name} can give at most "
            f"{_size(attainable)} ({_size(largest.spec.capacity_bytes)} in all{besides})"
        )

    def _attainable(self, ledger: DeviceLedger, name: str) -> int:
        return ledger.limit - self._pinned_bytes(ledger, name)

    def _pinned_bytes(self, ledger: DeviceLedger, but: str) -> int:
        total = 0
        for model in self.models.values():
            if model.spec.pinned and model.engine is not None and model.spec.name != but:
                holding = ledger.holding(model.engine.id)
                total += holding.held if holding is not None else 0
        return total

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
        if model.state is not Residency.READY:
            parts.append(f"about {model.expected_load_s(now):.0f} s")
        return ", ".join(parts)

    def _why_waiting(self, model: ModelState) -> str:
        name = model.spec.name
        match model.state:
            case Residency.LOADING:
                return f"loading {name}, {model.progress:.0%} ({model.note})"
            case Residency.READY:
                return f"{name} is busy"
            case Residency.DRAINING | Residency.STOPPING:
                return f"{name} makes room for another model first"
            case _:
                return f"making room for {name}"

    def waiting_by_class(self) -> list[int]:
        """How many tickets wait in each latency class. O(models)."""
        from_queues = [[model.queue.count(c) for model in self.models.values()] for c in range(5)]  # type: ignore[arg-type]
        return [sum(counts) for counts in from_queues]

    # ------------------------------------------------------------------ small

    def _devices_of(self, spec: ModelSpec) -> Iterable[DeviceLedger]:
        return (ledger for ledger in self.devices.values() if ledger.spec.kind == spec.device_kind)

    def _detach(self, model: ModelState) -> None:
        engine = model.engine
        assert engine is not None
        self.devices[engine.device].release(engine.id)
        del self._by_engine[engine.id]
        model.engine = None
        model.unload = False
        model.progress, model.note = 0.0, ""

    def _next_order(self) -> int:
        self._order += 1
        return self._order

    def check(self) -> None:
        """What always holds; tests call this after every event. O(everything)."""
        for ledger in self.devices.values():
            ledger.check()
        assert not self._waiting.keys() & self._admitted.keys()
        assert len(self._waiting) == sum(len(model.queue) for model in self.models.values())
        for model in self.models.values():
            assert (model.engine is None) == (model.state in (Residency.COLD, Residency.FAILED)), model
            if model.engine is not None:
                mine = [a for a in self._admitted.values() if a.engine is model.engine]
                assert len(mine) == model.engine.in_flight, model
                assert sum(a.weight for a in mine) == model.engine.capacity.held_tokens, model
            head = model.queue.head()
            if head is not None and model.state is Residency.READY and model.engine is not None:
                capacity = model.engine.capacity
                fits = capacity.free_sequences > 0 and capacity.free_tokens >= min(head.ticket.weight_tokens, capacity.tokens)
                assert not fits, f"{model}: the head would fit"


def _size(size: int) -> str:
    """Bytes for people: two significant figures are enough to act on."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
