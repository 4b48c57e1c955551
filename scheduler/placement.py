"""What should be resident, and where: loads, victims, drains, and the memory that they promise and free.

`plan` asks the ordering policy for one choice per device and follows it as far as it can: victims drain, stop when all
of them are idle (or sleep, where they can), and the model is loaded, or woken, when they are gone. Until then the
choice may be revised at every event, and a victim that is no longer needed serves on. One start per device at a time,
and no engine leaves a device while one is under way.

An engine that needs several devices takes all of them at once or none: it waits for nothing while it holds something,
so two can never wait for each other. Which devices is fixed: the neighbours 0 to n-1, n to 2n-1, ..., so that groups do
not overlap; the first of them chooses for all, before the others choose for themselves.

Knows nothing of tickets. Cost: `plan` is O(models log models); everything else O(models) at most.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from math import inf

from scheduler.commands import Command, Load, Sleep, Stop, Wake
from scheduler.departures import Departures
from scheduler.eviction.base import Eviction
from scheduler.fairness import Fairness
from scheduler.footprints import MUCH, Footprints
from scheduler.forecast import LEAST_WATCHED_S, drain_s
from scheduler.guesses import LEAVING, Guesses
from scheduler.holding import Holding
from scheduler.ledger import DeviceLedger, SleepMemory
from scheduler.model import DeviceSpec, LatencyClass, ModelSpec, Residency, SchedulerSettings, StopCause
from scheduler.ordering import Choice, Ordering, Scene
from scheduler.sequences import Sequences
from scheduler.state import EngineState, Guess, ModelState, Wanted
from scheduler.timers import Timers

HELD_S = 0.5  # a load that is held back is thought over again after so long, if nothing happens before
FIRM = (StopCause.OPERATOR, StopCause.CONFIGURATION)  # not taken back when somebody wants the model after all
SETTLED = (Residency.READY, Residency.DRAINING, Residency.ASLEEP)
SLEEPS = (StopCause.EVICTED, StopCause.PRESSURE, StopCause.WITHDRAWN)  # an engine given up for these may come back
LEARNED_MARGIN = 1.05  # measured figures are moments, and an engine may take a little more between two
RAN_OUT = 1.25  # a start that ran out of memory is booked with so much more than it was promised


class Placement:
    """Models, their engines, and the devices' books.

    model.engine is not None exactly when the engine holds memory in the book of its device.
    """

    def __init__(
        self,
        devices: Iterable[DeviceSpec],
        models: Iterable[ModelSpec],
        ordering: Ordering,
        eviction: Eviction,
        engines_before: int,
        fairness: Fairness | None = None,
        *,
        timers: Timers | None = None,
        footprints: Footprints | None = None,
    ) -> None:
        self.devices = {spec.name: DeviceLedger(spec) for spec in devices}
        self._matching: dict[str, list[DeviceLedger]] = {}  # by name and by kind
        for ledger in self.devices.values():
            for each in dict.fromkeys((ledger.spec.name, ledger.spec.kind)):
                self._matching.setdefault(each, []).append(ledger)
        self._grouped: dict[tuple[str, int], list[list[DeviceLedger]]] = {}  # by kind or name, and how many at once
        self._fairness = fairness
        self._wanted = Wanted()
        self._pinned: dict[str, ModelState] = {}  # those that have an engine
        self.models: dict[str, ModelState] = {}
        self.ordering = ordering
        self.eviction = eviction
        # when to plan again if nothing happens before: a victim must stop admitting, or a load is held back
        self.again_at = inf
        self.patience_s = 10.0  # of the standard class
        self.paused = False  # nothing is begun: somebody else is about to decide
        self.weighed = 0  # how many models the last plan had to look at, on all devices together
        self._competing = 0  # how many it had to choose from
        self._watched_since: float | None = None
        ordering.watch(self.models, self.devices)
        eviction.watch(self.models, self.devices)
        self._by_engine: dict[str, ModelState] = {}
        self._planned: dict[str, str] = {}  # by device: the model that the last plan wants next
        self._made_room_for: dict[str, str] = {}  # by device: the model for which victims have been stopped
        self._engine_count = engines_before
        self.guesses = Guesses()
        self.sequences = Sequences(self._answered_s)
        self.holding = Holding(self.sequences)
        self.departures = Departures(self.devices, Timers() if timers is None else timers, limit_s=5.0)
        self.sleep_memory = SleepMemory(0)
        self.footprints = Footprints() if footprints is None else footprints
        for spec in models:
            self.specify(spec)

    def specify(self, spec: ModelSpec) -> ModelState:
        """A model is configured, for the first time or anew."""
        model = self.models.get(spec.name)
        if model is None:
            model = self.models[spec.name] = ModelState(spec, self._fairness, self._wanted)
        model.spec, model.removed = spec, False
        model.changed()
        self._pin(model)
        self.book(model)
        return model

    def configure(self, settings: SchedulerSettings) -> None:
        """Settings that hold from now on."""
        self.patience_s = settings.patience_s[LatencyClass.STANDARD]
        self.departures.limit_s = settings.fall_limit_s
        self.sleep_memory.budget = settings.sleep_memory_bytes

    def leaving(self, device: str) -> list[ModelState]:
        """Models whose engines are asked to give memory of this device back."""
        return [
            model
            for engine_id, model in self._by_engine.items()
            if engine_id in self.departures and model.engine is not None and device in model.engine.devices
        ]

    def frees_late(self, engine: EngineState) -> bool:
        """Whether its memory may outlast its processes."""
        return any(ledger.spec.frees_late for ledger in self._books(engine))

    def by_engine(self, engine_id: str) -> ModelState | None:
        """The model that this living engine serves."""
        return self._by_engine.get(engine_id)

    def engaged(self) -> Iterable[ModelState]:
        """The models that have an engine, in whatever state."""
        return self._by_engine.values()

    # --------------------------------------------------------------- planning

    def plan(self, now: float) -> tuple[list[Command], list[ModelState]]:
        """What must be loaded and stopped now, and which victims need not go after all (they are ready again)."""
        if self._watched_since is None:
            self._watched_since = now
        self.again_at = inf
        if self.paused:
            return [], []
        out: list[Command] = []
        revived: list[ModelState] = []
        self._competing, self.weighed = len(self._wanted), 0
        others = list(self._wanted.others.values())
        chosen: set[ModelState] = set()
        taken: set[str] = set()
        kept: set[str] = set()
        # a device where a load can begin now chooses before one that is still busy with its last
        for ledger in self._in_turn(others):
            if ledger.spec.name in taken:
                continue
            here = [model for model in self._wanted.on(ledger.spec.name, ledger.spec.kind) if model not in chosen]
            here += [model for model in others if model not in chosen and self._begins_at(ledger, model, taken)]
            self.weighed += len(here)
            choice = self._choose(ledger, here, now)
            if choice is not None:
                chosen.add(choice.model)
                group = self._group(ledger, choice.model)
                taken |= {each.spec.name for each in group}
                if self._is_held(group, choice, now):
                    continue
                kept |= {victim.model for victim in choice.victims}
                out += self._follow(group, choice, now)
            elif len(chosen) < self._competing and not self._starts(ledger):
                self.again_at = min(self.again_at, now + HELD_S)
        revived += self._spare(kept)
        return out + self._replace_outdated() + self._sweep(), revived

    def pause(self) -> list[ModelState]:
        """Begin nothing more. Returns the victims of the last plan, which serve on."""
        self.paused = True
        return self._spare(())

    @property
    def settled(self) -> bool:
        """Whether no engine starts, stops, or is between two states of sleep. O(engines)."""
        return all(model.state in SETTLED for model in self._by_engine.values())

    def _in_turn(self, others: Sequence[ModelState]) -> list[DeviceLedger]:
        first = {
            ledger.spec.name
            for model in others
            if model.spec.devices_needed > 1
            for ledger in self.devices.values()
            if self._begins_at(ledger, model)
        }
        return sorted(
            self.devices.values(),
            key=lambda each: (each.spec.name not in first, self._starts(each), -each.free - self._lent(each)),
        )

    def _starts(self, ledger: DeviceLedger) -> bool:
        """Whether a start is under way that a load must wait for."""
        return ledger.starting is not None and self.guesses.loading(ledger) is None

    def _begins_at(self, ledger: DeviceLedger, model: ModelState, taken: Collection[str] = ()) -> bool:
        """Whether this device chooses for all that the model needs, or is where it sleeps."""
        group = self._group(ledger, model)
        return bool(group) and not any(each.spec.name in taken for each in group)

    def _group(self, ledger: DeviceLedger, model: ModelState) -> list[DeviceLedger]:
        """The devices of the model's engine that has this one as its first; [] when there is none."""
        if model.engine is not None:
            return self._books(model.engine) if model.engine.device == ledger.spec.name else []
        return next((group for group in self._groups(model.spec) if group[0] is ledger), [])

    def _groups(self, spec: ModelSpec) -> list[list[DeviceLedger]]:
        key = spec.device, spec.devices_needed
        groups = self._grouped.get(key)
        if groups is None:
            devices, n = self._devices_of(spec), spec.devices_needed
            groups = self._grouped[key] = [devices[i : i + n] for i in range(0, len(devices) - n + 1, n)]
        return groups

    def _books(self, engine: EngineState) -> list[DeviceLedger]:
        return [self.devices[name] for name in engine.devices]

    def _books_of(self, model: ModelState) -> list[DeviceLedger]:
        return [] if model.engine is None else self._books(model.engine)

    def _choose(self, ledger: DeviceLedger, wanted: Sequence[ModelState], now: float) -> Choice | None:
        name = ledger.spec.name
        planned = self._planned.pop(name, None)
        if not wanted:
            return None
        scene = self._scene(ledger, wanted, planned, now)
        for model in wanted if self._wanted.others else ():
            if model.spec.devices_needed > 1:
                scene.spans(model, [self._scene(each, (), None, now) for each in self._group(ledger, model)[1:]])
        asked = min((m for m in wanted if m.wanted_order is not None), key=lambda m: m.wanted_order or 0, default=None)
        if asked is not None and (victims := scene.room_for(asked)) is not None:
            choice: Choice | None = Choice(asked, victims, "an operator asked for it")
        else:
            choice = self._promised(scene, name) or self.ordering.choose(scene)
        if choice is not None:
            self._planned[name] = choice.model.spec.name
        return choice

    def _promised(self, scene: Scene, name: str) -> Choice | None:
        """Once its victims have been stopped, a plan is kept: whoever took the room that was made for it, the victim
        itself perhaps, could trade places with it for ever without anybody being served."""
        promised = self._made_room_for.get(name)
        if promised is None:
            return None
        model = next((each for each in scene.wanted if each.spec.name == promised), None)
        victims = None if model is None else scene.room_for(model)
        if model is None or victims is None:
            del self._made_room_for[name]
            return None
        return Choice(model, victims, "room was made for it")

    def _scene(self, ledger: DeviceLedger, wanted: Sequence[ModelState], planned: str | None, now: float) -> Scene:
        residents = []
        free = ledger.free
        link_free_s = now
        for model in self._by_engine.values():
            engine = model.engine
            if engine is None or ledger.spec.name not in engine.devices:
                continue
            if engine.guess is not None and model.guessed:
                free += self._lends(ledger, model)
                if model.state is Residency.WAKING:
                    link_free_s = now + model.expected_load_s(now)
            elif model.state in (Residency.LOADING, Residency.WAKING):
                link_free_s = now + model.expected_load_s(now)
            elif model.state is Residency.STOPPING or (
                model.state is Residency.DRAINING and model.stop_cause is not StopCause.EVICTED
            ):
                free += self._held(ledger, engine)
            elif model.state is Residency.SUSPENDING:
                free += self._held(ledger, engine) - (model.spec.sleep_keeps_bytes or 0)
            elif not model.spec.pinned:
                residents.append((model, self._held(ledger, engine)))
        since = now if self._watched_since is None else self._watched_since
        watched_s = max(LEAST_WATCHED_S, now - since)
        return Scene(
            now,
            ledger,
            wanted,
            residents,
            free=free,
            link_free_s=link_free_s,
            planned=planned,
            watched_s=watched_s,
            patience_s=self.patience_s,
            eviction=self.eviction,
        )

    def _answered_s(self, name: str, at_s: float) -> float | None:
        """When a model was last done with all its requests, at this moment of late."""
        model = self.models.get(name)
        if model is None:
            return None
        idle = not model.in_flight and model.last_used_s <= at_s
        return model.last_used_s if idle else model.rested_s

    def watched_s(self, now: float) -> float:
        """For how long arrivals have been counted."""
        since = now if self._watched_since is None else self._watched_since
        return max(LEAST_WATCHED_S, now - since)

    @staticmethod
    def _held(ledger: DeviceLedger, engine: EngineState) -> int:
        holding = ledger.holding(engine.id)
        return holding.held if holding is not None else 0

    def _spare(self, kept: Collection[str]) -> list[ModelState]:
        """Victims of an earlier plan that this one does not need serve on."""
        spared = [
            model
            for model in self._by_engine.values()
            if model.state is Residency.DRAINING
            and model.stop_cause is StopCause.EVICTED
            and model.spec.name not in kept
        ]
        for model in spared:
            model.move(Residency.READY)
            model.note = ""
        return spared

    def _follow(self, group: Sequence[DeviceLedger], choice: Choice, now: float) -> list[Command]:
        """Begin what can begin: drain victims in time, stop them when all are idle, load when they are gone."""
        wanted, ledger = choice.model, group[0]
        victims = [self.models[victim.model] for victim in choice.victims]
        out = self.break_off(group, f"{wanted.spec.name} is asked for")
        for victim in victims:
            out += self.break_off(self._books_of(victim), f"{wanted.spec.name} is asked for")
        reason = f"evicted for {wanted.spec.name}, which needs {_size(wanted.need_bytes)}: {choice.why}"
        for victim in victims:
            self._drain(victim, ledger, reason, now)
        starting = any(each.starting is not None for each in group) or any(self.start_beside(each) for each in victims)
        if starting or any(victim.occupied for victim in victims):
            return out  # one start at a time, no neighbour leaves while it measures the device, nobody is cut off
        if victims:
            self._made_room_for[ledger.spec.name] = wanted.spec.name
            reason += self.holding.over(wanted, now)
        for victim, candidate in zip(victims, choice.victims, strict=True):
            self.eviction.evicted(candidate)
            if victim.state is Residency.STOPPING:
                continue  # a sleeper that has just lost its host memory to another of these victims
            out += self._leave(victim, StopCause.EVICTED, f"{reason} ({_use(victim, now)})")
        out += self._withdraw_for(wanted, group)
        if not victims and all(each.free >= wanted.need_bytes for each in group):
            self._made_room_for.pop(ledger.spec.name, None)
            out.append(self._start(wanted, group, now))
        return out

    def _is_held(self, group: Sequence[DeviceLedger], choice: Choice, now: float) -> bool:
        """Whether a swap that could begin now waits for a moment; its victims serve on meanwhile."""
        victims = [self.models[victim.model] for victim in choice.victims]
        if any(victim.occupied for victim in victims) or any(map(self._starts, group)):
            return False
        until = self.holding.until(choice.model, victims, now)
        if until is not None:
            self.again_at = min(self.again_at, until)
        return until is not None

    def start_beside(self, model: ModelState) -> bool:
        """Whether a neighbour is in its start on one of the engine's devices: it would measure this one's leaving as
        its own memory (vllm-project/vllm#56830)."""
        engine = model.engine
        return engine is not None and any(each.starting not in (None, engine.id) for each in self._books(engine))

    def _stays(self, model: ModelState) -> bool:
        return self.paused or self.start_beside(model)

    def _drain(self, victim: ModelState, ledger: DeviceLedger, reason: str, now: float) -> None:
        """Let a busy victim admit nobody more, once its drain would otherwise outlast the load under way."""
        if victim.state is not Residency.READY or not victim.occupied:
            return
        if ledger.starting is not None:
            starting = self._by_engine[ledger.starting]
            drain = drain_s(victim.in_flight, victim.demand.mean_service_s())
            begin = now + starting.expected_load_s(now) - drain
            if not self.ordering.just_in_time:
                return
            if begin > now:
                self.again_at = min(self.again_at, begin)
                return
        victim.move(Residency.DRAINING)
        victim.stop_cause, victim.note = StopCause.EVICTED, reason

    def _start(
        self, model: ModelState, group: Sequence[DeviceLedger], now: float, guess: Guess | None = None
    ) -> Load | Wake:
        return self._load(model, group, now, guess) if model.engine is None else self._wake(model, now, guess)

    def _load(self, model: ModelState, group: Sequence[DeviceLedger], now: float, guess: Guess | None) -> Load:
        ledger, partners = group[0], tuple(each.spec.name for each in group[1:])
        self._engine_count += 1
        engine_id = f"{model.spec.name}#{self._engine_count}"
        free = _size(ledger.free)
        engine = EngineState(engine_id, ledger.spec.name, model.spec, partners)
        engine.guess = guess
        self._attach(model, engine, starting=True)
        model.cause = model.longest_waiting() if model.wanted_order is None else None
        model.move(Residency.LOADING)
        model.load_started_s, model.progress, model.note = now, 0.0, "starting"
        reason = f"{_asked(model)}; needs {_size(model.booked_bytes)} of {free} free"
        return Load(engine_id, model.spec.name, ledger.spec.name, reason, partners)

    def _wake(self, model: ModelState, now: float, guess: Guess | None) -> Wake:
        engine = model.engine
        assert engine is not None
        engine.guess = guess
        for ledger in self._books(engine):
            ledger.resize(engine.id, model.booked_bytes, starting=True)
        model.cause = model.longest_waiting() if model.wanted_order is None else None
        model.move(Residency.WAKING)
        model.load_started_s, model.progress, model.note = now, 0.0, "waking"
        return Wake(engine.id, f"{_asked(model)}; it sleeps, and its memory is free")

    def give_up(self, model: ModelState, cause: StopCause, why: str) -> list[Command]:
        """Drain a ready model, or stop it at once when it is idle. Operators and reloads also break off a start, and
        what they asked for is not taken back when an eviction's reason goes away."""
        engine = model.engine
        if engine is None or model.state is Residency.STOPPING or (self.paused and cause not in FIRM):
            return []
        if model.state is Residency.DRAINING:
            if cause in FIRM:
                model.stop_cause, model.note = cause, why
            return []
        if model.state in (Residency.LOADING, Residency.SUSPENDING, Residency.WAKING):
            return self.stop(model, cause, why) if cause in FIRM else []
        if engine.occupied or self._stays(model):
            model.move(Residency.DRAINING)
            model.stop_cause, model.note = cause, why
            return []
        return self._leave(model, cause, why)

    def _sweep(self) -> list[Command]:
        """Engines that were to go, are idle, and need wait for no neighbour's start any more."""
        out: list[Command] = []
        for model in list(self._by_engine.values()):
            if model.state is Residency.DRAINING and model.stop_cause is not StopCause.EVICTED:
                out += self.drained(model)
        return out

    def drained(self, model: ModelState) -> list[Command]:
        """A draining engine may be idle now, and then it goes."""
        if model.occupied or self.paused:
            return []
        out = self.break_off(self._books_of(model), f"{model.spec.name} is to leave")
        if self.start_beside(model):
            return out
        return out + self._leave(model, model.stop_cause, model.note)

    def _leave(self, model: ModelState, cause: StopCause, why: str) -> list[Command]:
        """An idle engine gives its memory back: asleep where it can come back from that, else for good."""
        engine = model.engine
        assert engine is not None
        if cause not in SLEEPS or not self._can_sleep(model, engine):
            return self.stop(model, cause, why)
        if not self.sleep_memory.take(engine.id, model.spec.sleep_host_bytes):
            return self.stop(model, cause, why) + self._room_to_sleep(model)
        self.departures.begin(engine, keeps=model.spec.sleep_keeps_bytes)
        model.move(Residency.SUSPENDING)
        model.note = why
        return [Sleep(engine.id, cause, why)]

    @staticmethod
    def _can_sleep(model: ModelState, engine: EngineState) -> bool:
        return (
            model.state in (Residency.READY, Residency.DRAINING)
            and model.spec.sleep_keeps_bytes is not None
            and engine.says is not None
            and engine.revision == model.spec.revision
            and not model.sleepless
            and not model.removed
        )

    def _room_to_sleep(self, model: ModelState) -> list[Command]:
        """Host memory for the next time: the sleepers that nobody has used for longest go, if that is long enough. Not
        for this time: their memory is not there until they have gone, and this one's is wanted now."""
        missing = self.sleep_memory.held + model.spec.sleep_host_bytes - self.sleep_memory.budget
        older = [
            other
            for other in self._by_engine.values()
            if other.state is Residency.ASLEEP
            and not other.wanted
            and other.last_used_s < model.last_used_s
            and not self.start_beside(other)
        ]
        out: list[Command] = []
        for sleeper in sorted(older, key=lambda each: each.last_used_s):
            if missing <= 0:
                break
            missing -= self.sleep_memory.share(sleeper.engine.id) if sleeper.engine is not None else 0
            out += self.stop(sleeper, StopCause.EVICTED, f"its host memory is wanted by {model.spec.name}")
        return out

    def may_sleep(self, model: ModelState) -> bool:
        """Whether its engine may be put to sleep one day, and must be asked now what it says awake."""
        return model.spec.sleep_keeps_bytes is not None and self.sleep_memory.budget > 0

    def asleep(self, model: ModelState) -> None:
        """The readings confirm that it sleeps."""
        engine = model.engine
        assert engine is not None
        for ledger in self._books(engine):
            ledger.resize(engine.id, model.spec.sleep_keeps_bytes or 0)
        model.move(Residency.ASLEEP)

    def stop(self, model: ModelState, cause: StopCause, why: str, *, force: bool = False) -> list[Command]:
        """End the model's engine: nothing is in flight there, or nobody may wait for that."""
        engine = model.engine
        assert engine is not None
        self.start_over(engine)
        self.departures.begin(engine)
        model.move(Residency.STOPPING)
        if cause is not StopCause.WITHDRAWN:
            model.stopped_for = cause
        model.note = why
        return [Stop(engine.id, cause, why, force)]

    def start_over(self, engine: EngineState) -> None:
        """The engine's start, or its wake, is over, one way or the other."""
        for ledger in self._books(engine):
            ledger.started(engine.id)

    def relieve_pressure(self, threshold: float) -> list[Command]:
        """Evict idle models, oldest first, while a device is fuller than `threshold` of its capacity, before anyone
        waits. A device where a start is under way is left alone."""
        out: list[Command] = []
        for name, ledger in self.devices.items():
            allowed = threshold * ledger.spec.capacity_bytes
            full = ledger.held + ledger.overhead + ledger.foreign
            if full <= allowed:
                continue
            out += self.break_off((ledger,), f"{name} is too full (pressure_threshold)")
            if ledger.starting is not None:
                continue
            for model in sorted(self._idle_on(name), key=lambda m: (not m.guessed, m.last_used_s)):
                if full - self._leaving(ledger) <= allowed:
                    break
                share = full / ledger.spec.capacity_bytes
                why = f"{name} is {share:.0%} full (pressure_threshold), idle the longest"
                out += self.give_up(model, StopCause.PRESSURE, why)
        return out

    def _idle_on(self, device: str) -> list[ModelState]:
        return [
            model
            for model in self.models.values()
            if model.idle and not model.spec.pinned and model.engine is not None and device in model.engine.devices
        ]

    def _leaving(self, ledger: DeviceLedger) -> int:
        """Bytes of engines that are on their way out of the device."""
        total = 0
        for model in self.models.values():
            if model.state in (Residency.STOPPING, Residency.SUSPENDING) and model.engine is not None:
                holding = ledger.holding(model.engine.id)
                kept = (model.spec.sleep_keeps_bytes or 0) if model.state is Residency.SUSPENDING else 0
                total += holding.held - kept if holding is not None else 0
        return total

    def _replace_outdated(self) -> list[Command]:
        out: list[Command] = []
        for model in list(self._by_engine.values()):
            if (
                model.state in (Residency.READY, Residency.ASLEEP)
                and model.engine is not None
                and (model.engine.revision != model.spec.revision or model.removed)
            ):
                out += self.give_up(model, StopCause.CONFIGURATION, "its configuration has changed")
        return out

    # ---------------------------------------------------------------- guesses

    def guess(self, model: ModelState, group: Sequence[DeviceLedger], why: str, now: float) -> Load | Wake:
        """Load or wake a model that nobody waits for, on devices where that is in nobody's way."""
        guess = Guess(model.engine.served if model.engine is not None else 0, why)
        command = self._start(model, group, now, guess)
        assert model.engine is not None
        self.guesses.add(model, model.engine)
        return command

    def is_at_rest(self, ledger: DeviceLedger) -> bool:
        """Whether a start there is in nobody's way: nothing starts or leaves, nobody waits for a load. O(engines +
        what needs a closer look)."""
        name, waits = ledger.spec.name, self._wanted
        return (
            ledger.starting is None
            and not any(True for _ in waits.on(name, ledger.spec.kind))
            and not any(ledger in group for model in waits.others.values() for group in self.groups_for(model))
            and not any(
                each.state in LEAVING and each.engine is not None and name in each.engine.devices
                for each in self._by_engine.values()
            )
        )

    def works(self, ledger: DeviceLedger, since_s: float) -> bool:
        """Whether an engine there has requests, or has had some since. O(engines)."""
        name = ledger.spec.name
        return any(
            model.in_flight > 0 or model.last_used_s > since_s
            for model in self._by_engine.values()
            if model.engine is not None and name in model.engine.devices
        )

    def is_guessed_load(self, engine_id: str) -> bool:
        """Whether this engine loads and nobody has asked for it."""
        model = self._by_engine.get(engine_id)
        return model is not None and model.state is Residency.LOADING and model.guessed

    def groups_for(self, model: ModelState) -> list[list[DeviceLedger]]:
        """Every set of devices on which the model could be loaded, or woken."""
        return [self._books(model.engine)] if model.engine is not None else self._groups(model.spec)

    def _lends(self, ledger: DeviceLedger, model: ModelState) -> int:
        """Bytes of a guessed engine that a plan may count on: all that it would not hold had nobody guessed."""
        engine = model.engine
        assert engine is not None
        kept = (model.spec.sleep_keeps_bytes or 0) if self._has_slept(engine) else 0
        return max(0, self._held(ledger, engine) - kept)

    def _lent(self, ledger: DeviceLedger) -> int:
        return sum(self._lends(ledger, model) for model in self.guesses.leaving_or_on(ledger))

    def _has_slept(self, engine: EngineState) -> bool:
        return self.sleep_memory.share(engine.id) > 0

    def break_off(self, ledgers: Iterable[DeviceLedger], why: str) -> list[Command]:
        """End the guessed loads that are under way there."""
        out: list[Command] = []
        for ledger in ledgers if len(self.guesses) and not self.paused else ():
            model = self.guesses.loading(ledger)
            if model is not None:
                out += self._withdraw(model, why)
        return out

    def _withdraw_for(self, wanted: ModelState, group: Sequence[DeviceLedger]) -> list[Command]:
        """Guessed engines go as far as the memory is short without theirs; the oldest guess first."""
        out: list[Command] = []
        for ledger in group if len(self.guesses) else ():
            missing = wanted.need_bytes - ledger.free - self._leaving(ledger)
            for model in list(self.guesses.on(ledger)):
                if missing > 0 and model.state is not Residency.WAKING:
                    missing -= self._lends(ledger, model)
                    out += self._withdraw(model, f"{wanted.spec.name} needs its memory")
        return out

    def _withdraw(self, model: ModelState, why: str) -> list[Command]:
        """It was a wrong guess. What slept sleeps again; what was loaded has nothing to lose and is killed, because a
        request waits for its place."""
        engine = model.engine
        assert engine is not None
        why = f"{why}, and nobody has asked for {model.spec.name}"
        if model.state is Residency.READY and self._has_slept(engine):
            return self._leave(model, StopCause.WITHDRAWN, why)
        return self.stop(model, StopCause.WITHDRAWN, why, force=True)

    # ---------------------------------------------------------------- engines

    def adopt(
        self, model: ModelState, engine_id: str, device: str, revision: str, partners: Sequence[str] = ()
    ) -> None:
        """Book an engine that outlived an earlier proxy."""
        engine = EngineState(engine_id, device, model.spec, partners)
        engine.revision = revision
        self._attach(model, engine, starting=False)

    def _attach(self, model: ModelState, engine: EngineState, *, starting: bool) -> None:
        for ledger in self._books(engine):
            ledger.promise(engine.id, model.booked_bytes, starting=starting)
        self._by_engine[engine.id] = model
        model.engine = engine
        self._pin(model)

    def detach(self, model: ModelState) -> None:
        """The engine is gone, and its memory with it."""
        engine = model.engine
        assert engine is not None
        self.learn(model)
        for ledger in self._books(engine):
            ledger.release(engine.id)
        self.departures.forget(engine.id)
        self.sleep_memory.release(engine.id)
        del self._by_engine[engine.id]
        model.engine = None
        self._pin(model)
        model.progress, model.note = 0.0, ""

    def _pin(self, model: ModelState) -> None:
        """Its engine counts among those that stay, or no longer."""
        if model.spec.pinned and model.engine is not None:
            self._pinned[model.spec.name] = model
        else:
            self._pinned.pop(model.spec.name, None)

    # -------------------------------------------------------------- footprints

    def learn(self, model: ModelState) -> None:
        """What the engine has been seen with counts for the next start; nothing before its first reading."""
        engine = model.engine
        if engine is None or not engine.was_ready or engine.revision != model.spec.revision:
            return
        holdings = [ledger.holding(engine.id) for ledger in self._books(engine)]
        peak = max((holding.peak for holding in holdings if holding is not None), default=0)
        if peak:
            self.footprints.note(_what(model.spec), self.devices[engine.device].spec.kind, engine.id, peak)
            self.book(model)

    def ran_out(self, model: ModelState) -> None:
        """The engine found less memory than it needs, whatever it was promised."""
        engine = model.engine
        assert engine is not None
        kind = self.devices[engine.device].spec.kind
        self.footprints.note(_what(model.spec), kind, engine.id, int(RAN_OUT * model.booked_bytes))
        self.book(model)

    def book(self, model: ModelState) -> None:
        """What the next start is promised: an operator's figure or what was learned, whichever is more; what was
        learned in place of an estimate. Never more than there is: a learned figure must not make a model impossible
        that ran."""
        spec = model.spec
        learned = self._learned(spec)
        model.booked_bytes = spec.memory_bytes
        if learned is None:
            return
        most = max((self._attainable_of(group, spec.name) for group in self._groups(spec)), default=0)
        booked = min(int(LEARNED_MARGIN * learned), max(most, spec.memory_bytes))
        model.booked_bytes = max(spec.memory_bytes, booked) if spec.stated else booked

    def misjudged(self, model: ModelState) -> str:
        """What to tell the operator when the stated figure is far from what was learned; "" otherwise."""
        spec, learned = model.spec, self._learned(model.spec)
        if not spec.stated or learned is None or abs(learned - spec.memory_bytes) <= MUCH * spec.memory_bytes:
            return ""
        return (
            f"memory_bytes is {_size(spec.memory_bytes)}, and nine in ten of its starts took at most {_size(learned)}: "
            f"{'more is kept for it' if learned < spec.memory_bytes else 'it is booked with that'}"
        )

    def _learned(self, spec: ModelSpec) -> int | None:
        kinds = {ledger.spec.kind for ledger in self._devices_of(spec)}
        return max((p for kind in kinds if (p := self.footprints.p90(_what(spec), kind)) is not None), default=None)

    # ---------------------------------------------------------------- answers

    def begins_in_s(self, model: ModelState, now: float) -> tuple[bool, float]:
        """Whether the model is the next to load somewhere, and in how many seconds that load should begin: after the
        one under way, and, unless it is the next, after half of the others that are wanted. O(devices)."""
        best = (False, inf)
        others = 0.5 * max(0, self._competing - 1) / len(self.devices)
        for ledger in self._devices_of(model.spec):
            starting = self._by_engine.get(ledger.starting or "") if self._starts(ledger) else None
            begin_s = 0.0 if starting is None else starting.expected_load_s(now)
            planned = self._planned.get(ledger.spec.name) == model.spec.name
            if not planned:
                begin_s += others * model.seconds_to_load
            if begin_s < best[1]:
                best = planned, begin_s
        return best

    def never_fits(self, spec: ModelSpec) -> str | None:
        """Why the model can never be resident, or None. Pinned models' memory is not to be had; other engines' and
        foreign memory is, in time, so it does not count here: nothing is evicted for what cannot fit
        (ollama/ollama#18282)."""
        groups = self._groups(spec)
        if any(spec.memory_bytes <= self._attainable_of(group, spec.name) for group in groups):
            return None
        if groups:
            return self._too_large(spec, max(groups, key=lambda each: self._attainable_of(each, spec.name)))
        devices = self._devices_of(spec)
        if devices:
            return f"{spec.name} needs {spec.devices_needed} {spec.device} devices, and there are {len(devices)}"
        return f"{spec.name} runs on {spec.device} memory, and there is no such device"

    def _too_large(self, spec: ModelSpec, group: Sequence[DeviceLedger]) -> str:
        scarce = min(group, key=lambda ledger: self._attainable(ledger, spec.name))
        pinned = self._pinned_bytes(scarce, spec.name)
        besides = f", {_size(pinned)} of it pinned" if pinned else ""
        return (
            f"{spec.name} needs {_size(spec.memory_bytes)} and {scarce.spec.name} can give at most "
            f"{_size(scarce.limit - pinned)} ({_size(scarce.spec.capacity_bytes)} in all{besides})"
        )

    def _attainable_of(self, group: Sequence[DeviceLedger], name: str) -> int:
        return min(self._attainable(ledger, name) for ledger in group)

    def _attainable(self, ledger: DeviceLedger, name: str) -> int:
        return ledger.limit - self._pinned_bytes(ledger, name)

    def _pinned_bytes(self, ledger: DeviceLedger, but: str) -> int:
        total = 0
        for model in self._pinned.values():
            if model.engine is not None and model.spec.name != but:
                total += self._held(ledger, model.engine)
        return total

    def _devices_of(self, spec: ModelSpec) -> list[DeviceLedger]:
        return self._matching.get(spec.device, [])

    # ------------------------------------------------------------------ checks

    def check(self) -> None:
        """What always holds. O(everything)."""
        for ledger in self.devices.values():
            ledger.check()
        self.sleep_memory.check()
        for model in self.models.values():
            model.check()
        assert len(self._wanted) == sum(self._wanted.place(model) is not None for model in self.models.values())
        assert self._pinned == {
            name: model for name, model in self.models.items() if model.spec.pinned and model.engine is not None
        }


def _size(size: int) -> str:
    """Bytes for people: two significant figures are enough to act on."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _what(spec: ModelSpec) -> str:
    """What a footprint is of."""
    return f"{spec.name}@{spec.revision}"


def _asked(model: ModelState) -> str:
    guess = model.engine.guess if model.engine is not None else None
    if guess is not None:
        return f"guessed: {guess.why}"
    return "an operator asked for it" if model.wanted_order is not None else f"{len(model.queue)} waiting"


def _use(model: ModelState, now: float) -> str:
    return f"idle for {now - model.last_used_s:.0f} s"
