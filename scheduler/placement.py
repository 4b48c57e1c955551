"""What should be resident, and where: loads, victims, drains, and the memory that they promise and free.

`plan` asks the ordering policy for one choice per device and follows it as far as it can: victims drain, stop when all
of them are idle (or sleep, where they can), and the model is loaded, or woken, when they are gone. Until then the
choice may be revised at every event, and a victim that is no longer needed serves on. One start per device at a time,
and no engine leaves a device while one is under way.

An engine that needs several devices takes all of them at once or none: it waits for nothing while it holds something,
so two can never wait for each other. The first of them chooses for all, before the others choose for themselves.

What is there, and what is promised to whom, is in the books (`scheduler.books`); what sleep and guesses give back, in
`scheduler.sleepers`. Knows nothing of tickets. Cost: `plan` is O(models log models); everything else O(models) at most.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from math import inf

from scheduler.books import Books
from scheduler.commands import Command, Load, Sleep, Stop, Wake
from scheduler.eviction.base import Eviction
from scheduler.forecast import LEAST_WATCHED_S, drain_s
from scheduler.guesses import LEAVING, Guesses
from scheduler.holding import Holding
from scheduler.ledger import DeviceLedger, readable_size
from scheduler.model import LatencyClass, Residency, SchedulerSettings, StopCause
from scheduler.ordering import Choice, Ordering, Scene
from scheduler.sequences import Sequences
from scheduler.sleepers import Sleepers, kept
from scheduler.state import EngineState, Guess, ModelState

HELD_S = 0.5  # a load that is held back is thought over again after so long, if nothing happens before
FIRM = (StopCause.OPERATOR, StopCause.CONFIGURATION)  # not taken back when somebody wants the model after all
SLEEPS = (StopCause.EVICTED, StopCause.PRESSURE, StopCause.WITHDRAWN)  # an engine given up for these may come back


class Placement:
    """What the last plan wants, and how the engines that there are become those that it wants."""

    def __init__(self, books: Books, ordering: Ordering, eviction: Eviction, engines_before: int) -> None:
        self._books = books
        self._devices, self._models, self._wanted = books.devices, books.models, books.wanted
        self.ordering = ordering
        self.eviction = eviction
        # when to plan again if nothing happens before: a victim must stop admitting, or a load is held back
        self.again_at = inf
        self.patience_s = 10.0  # of the standard class
        self.paused = False  # nothing is begun: somebody else is about to decide
        self.weighed = 0  # how many models the last plan had to look at, on all devices together
        self._competing = 0  # how many it had to choose from
        self._watched_since: float | None = None
        ordering.watch(self._models, self._devices)
        eviction.watch(self._models, self._devices)
        self._planned: dict[str, str] = {}  # by device: the model that the last plan wants next
        self._made_room_for: dict[str, str] = {}  # by device: the model for which victims have been stopped
        self._engine_count = engines_before
        self.guesses = Guesses()
        self.sequences = Sequences(self._answered_s)
        self.holding = Holding(self.sequences)
        self.sleepers = Sleepers(books, self.guesses)

    def configure(self, settings: SchedulerSettings) -> None:
        """Settings that hold from now on."""
        self.patience_s = settings.patience_s[LatencyClass.STANDARD]

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
        for ledger in self._in_turn(others):
            if ledger.spec.name in taken:
                continue
            here = [model for model in self._wanted.on(ledger.spec.name, ledger.spec.kind) if model not in chosen]
            here += [model for model in others if model not in chosen and self._begins_at(ledger, model, taken)]
            self.weighed += len(here)
            choice = self._choose(ledger, here, now)
            if choice is not None:
                chosen.add(choice.model)
                group = self._books.group(ledger, choice.model)
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

    def _in_turn(self, others: Sequence[ModelState]) -> list[DeviceLedger]:
        """In which order the devices choose: where room was made, before a neighbour takes it for an engine on both;
        where several are chosen for; then where a load can begin now, before one that is still busy with its last."""
        first = {
            ledger.spec.name
            for model in others
            if model.spec.devices_needed > 1
            for ledger in self._devices.values()
            if self._begins_at(ledger, model)
        }
        return sorted(
            self._devices.values(),
            key=lambda each: (
                each.spec.name not in self._made_room_for,
                each.spec.name not in first,
                self._starts(each),
                -each.free - self.sleepers.lent(each),
            ),
        )

    def _starts(self, ledger: DeviceLedger) -> bool:
        """Whether a start is under way that a load must wait for."""
        return ledger.starting is not None and self.guesses.loading(ledger) is None

    def _begins_at(self, ledger: DeviceLedger, model: ModelState, taken: Collection[str] = ()) -> bool:
        """Whether this device chooses for all that the model needs, or is where it sleeps."""
        group = self._books.group(ledger, model)
        return bool(group) and not any(each.spec.name in taken for each in group)

    def _choose(self, ledger: DeviceLedger, wanted: Sequence[ModelState], now: float) -> Choice | None:
        name = ledger.spec.name
        planned = self._planned.pop(name, None)
        if not wanted:
            self._made_room_for.pop(name, None)
            return None
        scene = self._scene(ledger, wanted, planned, now)
        for model in wanted if self._wanted.others else ():
            if model.spec.devices_needed > 1:
                scene.spans(model, [self._scene(each, (), None, now) for each in self._books.group(ledger, model)[1:]])
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
        for model in self._books.engaged():
            engine = model.engine
            if engine is None or ledger.spec.name not in engine.devices:
                continue
            if engine.guess is not None and model.guessed:
                free += self.sleepers.lends(ledger, model)
                if model.state is Residency.WAKING:
                    link_free_s = now + model.expected_load_s(now)
                elif self.sleepers.has_slept(engine) and not model.spec.pinned:
                    residents.append((model, kept(model)))  # the sleeper that it would be had nobody guessed
            elif model.state in (Residency.LOADING, Residency.WAKING):
                link_free_s = now + model.expected_load_s(now)
            elif model.state is Residency.STOPPING or (
                model.state is Residency.DRAINING and model.stop_cause is not StopCause.EVICTED
            ):
                free += ledger.held_by(engine.id)
            elif model.state is Residency.SUSPENDING:
                free += ledger.held_by(engine.id) - kept(model)
            elif not model.spec.pinned:
                residents.append((model, ledger.held_by(engine.id)))
        return Scene(
            now,
            ledger,
            wanted,
            residents,
            free=free,
            link_free_s=link_free_s,
            planned=planned,
            watched_s=self.watched_s(now),
            patience_s=self.patience_s,
            eviction=self.eviction,
        )

    def _answered_s(self, name: str, at_s: float) -> float | None:
        """When a model was last done with all its requests, at this moment of late."""
        model = self._models.get(name)
        if model is None:
            return None
        idle = not model.in_flight and model.last_used_s <= at_s
        return model.last_used_s if idle else model.rested_s

    def watched_s(self, now: float) -> float:
        """For how long arrivals have been counted."""
        since = now if self._watched_since is None else self._watched_since
        return max(LEAST_WATCHED_S, now - since)

    def _spare(self, kept: Collection[str]) -> list[ModelState]:
        """Victims of an earlier plan that this one does not need serve on."""
        spared = [
            model
            for model in self._books.engaged()
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
        victims = [self._models[victim.model] for victim in choice.victims]
        out = self.break_off(group, f"{wanted.spec.name} is asked for")
        for victim in victims:
            out += self.break_off(self._books.ledgers_of(victim), f"{wanted.spec.name} is asked for")
        reason = f"evicted for {wanted.spec.name}, which needs {readable_size(wanted.need_bytes)}: {choice.why}"
        for victim in victims:
            self._drain(victim, ledger, reason, now)
        starting = any(each.starting is not None for each in group) or any(map(self._books.start_beside, victims))
        if starting or any(victim.occupied for victim in victims):
            return out  # one start at a time, no neighbour leaves while it measures the device, nobody is cut off
        if victims:
            self._made_room_for[ledger.spec.name] = wanted.spec.name
            reason += self.holding.over(wanted, now)
        ended = self.sleepers.not_to_sleep(victims, wanted, group)
        for victim, candidate in zip(victims, choice.victims, strict=True):
            self.eviction.evicted(candidate)
            if victim.state is Residency.STOPPING:
                continue  # a sleeper that has just lost its host memory to another of these victims
            why = f"{reason} ({_use(victim, now)})"
            # what a guess lends comes back by itself: one that is a victim has to give what it would keep asleep
            leave = self.stop if victim in ended or victim.guessed else self._leave
            out += leave(victim, StopCause.EVICTED, why)
        out += self._withdraw_for(wanted, group)
        if not victims and all(each.free >= wanted.need_bytes for each in group):
            self._made_room_for.pop(ledger.spec.name, None)
            out.append(self._start(wanted, group, now))
        return out

    def _is_held(self, group: Sequence[DeviceLedger], choice: Choice, now: float) -> bool:
        """Whether a swap that could begin now waits for a moment; its victims serve on meanwhile."""
        victims = [self._models[victim.model] for victim in choice.victims]
        if any(victim.occupied for victim in victims) or any(map(self._starts, group)):
            return False
        until = self.holding.until(choice.model, victims, now)
        if until is not None:
            self.again_at = min(self.again_at, until)
        return until is not None

    def _stays(self, model: ModelState) -> bool:
        return self.paused or self._books.start_beside(model)

    def _drain(self, victim: ModelState, ledger: DeviceLedger, reason: str, now: float) -> None:
        """Let a busy victim admit nobody more, once its drain would otherwise outlast the load under way."""
        if victim.state is not Residency.READY or not victim.occupied:
            return
        if ledger.starting is not None:
            starting = self._books.by_engine(ledger.starting)
            assert starting is not None
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
        free = readable_size(ledger.free)
        engine = EngineState(engine_id, ledger.spec.name, model.spec, partners)
        engine.guess = guess
        self._books.attach(model, engine, starting=True)
        model.cause = model.longest_waiting() if model.wanted_order is None else None
        model.move(Residency.LOADING)
        model.load_started_s, model.progress, model.note = now, 0.0, "starting"
        reason = f"{_asked(model)}; needs {readable_size(model.booked_bytes)} of {free} free"
        return Load(engine_id, model.spec.name, ledger.spec.name, reason, partners)

    def _wake(self, model: ModelState, now: float, guess: Guess | None) -> Wake:
        engine = model.engine
        assert engine is not None
        engine.guess = guess
        for ledger in self._books.ledgers(engine):
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
        for model in list(self._books.engaged()):
            if model.state is Residency.DRAINING and model.stop_cause is not StopCause.EVICTED:
                out += self.drained(model)
        return out

    def drained(self, model: ModelState) -> list[Command]:
        """A draining engine may be idle now, and then it goes."""
        if model.occupied or self.paused:
            return []
        out = self.break_off(self._books.ledgers_of(model), f"{model.spec.name} is to leave")
        if self._books.start_beside(model):
            return out
        return out + self._leave(model, model.stop_cause, model.note)

    def _leave(self, model: ModelState, cause: StopCause, why: str) -> list[Command]:
        """An idle engine gives its memory back: asleep where it can come back from that, else for good."""
        engine = model.engine
        assert engine is not None
        if cause not in SLEEPS or not model.can_sleep:
            return self.stop(model, cause, why)
        if not self._books.sleep_memory.take(engine.id, model.spec.sleep_host_bytes):
            return self.stop(model, cause, why) + self._end_older(model)
        self._books.departures.begin(engine, keeps=model.spec.sleep_keeps_bytes)
        model.move(Residency.SUSPENDING)
        model.note = why
        return [Sleep(engine.id, cause, why)]

    def _end_older(self, model: ModelState) -> list[Command]:
        """Host memory for this one's next sleep. Not for this time: what it takes is not there until others have gone,
        and this one's memory is wanted now."""
        out: list[Command] = []
        for sleeper in self.sleepers.older(model):
            out += self.stop(sleeper, StopCause.EVICTED, f"its host memory is wanted by {model.spec.name}")
        return out

    def stop(self, model: ModelState, cause: StopCause, why: str, *, force: bool = False) -> list[Command]:
        """End the model's engine: nothing is in flight there, or nobody may wait for that."""
        engine = model.engine
        assert engine is not None
        self._books.start_over(engine)
        self._books.departures.begin(engine)
        model.move(Residency.STOPPING)
        if cause is not StopCause.WITHDRAWN:
            model.stopped_for = cause
        model.note = why
        return [Stop(engine.id, cause, why, force)]

    def relieve_pressure(self, threshold: float) -> list[Command]:
        """Evict idle models, oldest first, while a device is fuller than `threshold` of its capacity, before anyone
        waits. A device where a start is under way is left alone."""
        out: list[Command] = []
        for name, ledger in self._devices.items():
            allowed = threshold * ledger.spec.capacity_bytes
            full = ledger.held + ledger.overhead + ledger.foreign
            if full <= allowed:
                continue
            out += self.break_off((ledger,), f"{name} is too full (pressure_threshold)")
            if ledger.starting is not None:
                continue
            for model in sorted(self._idle_on(name), key=lambda m: (not m.guessed, m.last_used_s)):
                if full - self.sleepers.leaving(ledger) <= allowed:
                    break
                share = full / ledger.spec.capacity_bytes
                why = f"{name} is {share:.0%} full (pressure_threshold), idle the longest"
                out += self.give_up(model, StopCause.PRESSURE, why)
        return out

    def _idle_on(self, device: str) -> list[ModelState]:
        return [
            model
            for model in self._models.values()
            if model.idle and not model.spec.pinned and model.engine is not None and device in model.engine.devices
        ]

    def _replace_outdated(self) -> list[Command]:
        out: list[Command] = []
        for model in list(self._books.engaged()):
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
            and not any(ledger in group for model in waits.others.values() for group in self._books.groups_for(model))
            and not any(
                each.state in LEAVING and each.engine is not None and name in each.engine.devices
                for each in self._books.engaged()
            )
        )

    def is_guessed_load(self, engine_id: str) -> bool:
        """Whether this engine loads and nobody has asked for it."""
        model = self._books.by_engine(engine_id)
        return model is not None and model.state is Residency.LOADING and model.guessed

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
            missing = wanted.need_bytes - ledger.free - self.sleepers.leaving(ledger)
            for model in list(self.guesses.on(ledger)):
                if missing > 0 and model.state is not Residency.WAKING:
                    missing -= self.sleepers.lends(ledger, model)
                    out += self._withdraw(model, f"{wanted.spec.name} needs its memory")
        return out

    def _withdraw(self, model: ModelState, why: str) -> list[Command]:
        """It was a wrong guess. What slept sleeps again; what was loaded has nothing to lose and is killed, because a
        request waits for its place."""
        engine = model.engine
        assert engine is not None
        why = f"{why}, and nobody has asked for {model.spec.name}"
        if model.state is Residency.READY and self.sleepers.has_slept(engine):
            return self._leave(model, StopCause.WITHDRAWN, why)
        return self.stop(model, StopCause.WITHDRAWN, why, force=True)

    # ---------------------------------------------------------------- answers

    def begins_in_s(self, model: ModelState, now: float) -> tuple[bool, float]:
        """Whether the model is the next to load somewhere, and in how many seconds that load should begin: after the
        one under way, and, unless it is the next, after half of the others that are wanted. O(devices)."""
        best = (False, inf)
        others = 0.5 * max(0, self._competing - 1) / len(self._devices)
        for ledger in self._books.devices_of(model.spec):
            starting = self._books.by_engine(ledger.starting or "") if self._starts(ledger) else None
            begin_s = 0.0 if starting is None else starting.expected_load_s(now)
            planned = self._planned.get(ledger.spec.name) == model.spec.name
            if not planned:
                begin_s += others * model.seconds_to_load
            if begin_s < best[1]:
                best = planned, begin_s
        return best


def _asked(model: ModelState) -> str:
    guess = model.engine.guess if model.engine is not None else None
    if guess is not None:
        return f"guessed: {guess.why}"
    return "an operator asked for it" if model.wanted_order is not None else f"{len(model.queue)} waiting"


def _use(model: ModelState, now: float) -> str:
    return f"idle for {now - model.last_used_s:.0f} s"
