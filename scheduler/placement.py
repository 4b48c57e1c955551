"""What should be resident, and where: loads, victims, drains, and the memory that they promise and free.

`plan` asks the ordering policy for one choice per device and follows it as far as it can: victims drain, stop when all
of them are idle, and the model is loaded when they are gone. Until then the choice may be revised at every event, and a
victim that is no longer needed serves on. One start per device at a time, and no engine is stopped for room on a device
while one is under way.

Knows nothing of tickets. Cost: `plan` is O(models log models); everything else O(models) at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf

from scheduler.commands import Command, Load, Stop
from scheduler.eviction.base import Eviction
from scheduler.fairness import Fairness
from scheduler.forecast import LEAST_WATCHED_S, drain_s
from scheduler.ledger import DeviceLedger
from scheduler.model import DeviceSpec, ModelSpec, Residency, StopCause
from scheduler.ordering import Choice, Ordering, Scene
from scheduler.state import EngineState, ModelState

HELD_S = 0.5  # a load that is held back is thought over again after so long, if nothing happens before
FIRM = (StopCause.OPERATOR, StopCause.CONFIGURATION)  # not taken back when somebody wants the model after all


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
    ) -> None:
        self.devices = {spec.name: DeviceLedger(spec) for spec in devices}
        self.models = {spec.name: ModelState(spec, fairness) for spec in models}
        self.ordering = ordering
        self.eviction = eviction
        # when to plan again if nothing happens before: a victim must stop admitting, or a load is held back
        self.again_at = inf
        self.patience_s = 10.0  # of the standard class
        self.wanted = 0  # how many cold models the last plan had to choose from
        self._watched_since: float | None = None
        ordering.watch(self.models, self.devices)
        eviction.watch(self.models, self.devices)
        self._by_engine: dict[str, ModelState] = {}
        self._planned: dict[str, str] = {}  # by device: the model that the last plan wants next
        self._made_room_for: dict[str, str] = {}  # by device: the model for which victims have been stopped
        self._engine_count = engines_before

    def by_engine(self, engine_id: str) -> ModelState | None:
        """The model that this living engine serves."""
        return self._by_engine.get(engine_id)

    # --------------------------------------------------------------- planning

    def plan(self, now: float) -> tuple[list[Command], list[ModelState]]:
        """What must be loaded and stopped now, and which victims need not go after all (they are ready again)."""
        if self._watched_since is None:
            self._watched_since = now
        self.again_at = inf
        out: list[Command] = []
        revived: list[ModelState] = []
        cold = [model for model in self.models.values() if model.state is Residency.COLD and model.wanted]
        self.wanted = len(cold)
        # a device where a load can begin now chooses before one that is still busy with its last
        for ledger in sorted(self.devices.values(), key=lambda each: (each.starting is not None, -each.free)):
            choice = self._choose(ledger, cold, now)
            revived += self._spare(ledger, choice)
            if choice is not None:
                cold.remove(choice.model)
                out += self._follow(ledger, choice, now)
            elif cold and ledger.starting is None:
                self.again_at = min(self.again_at, now + HELD_S)
        return out + self._replace_outdated(), revived

    def _choose(self, ledger: DeviceLedger, cold: Sequence[ModelState], now: float) -> Choice | None:
        name = ledger.spec.name
        wanted = [model for model in cold if model.spec.device in (name, ledger.spec.kind)]
        planned = self._planned.pop(name, None)
        if not wanted:
            return None
        scene = self._scene(ledger, wanted, planned, now)
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
        model = next((each for each in scene.wanted if each.spec.name == self._made_room_for.get(name)), None)
        victims = None if model is None else scene.room_for(model)
        if model is None or victims is None:
            self._made_room_for.pop(name, None)
            return None
        return Choice(model, victims, "room was made for it")

    def _scene(self, ledger: DeviceLedger, wanted: Sequence[ModelState], planned: str | None, now: float) -> Scene:
        residents = []
        free = ledger.free
        link_free_s = now
        for model in self._by_engine.values():
            engine = model.engine
            if engine is None or engine.device != ledger.spec.name:
                continue
            if model.state is Residency.LOADING:
                link_free_s = now + model.expected_load_s(now)
            elif model.state is Residency.STOPPING or (
                model.state is Residency.DRAINING and model.stop_cause is not StopCause.EVICTED
            ):
                free += self._held(ledger, engine)
            elif not model.spec.pinned:
                residents.append((model, self._held(ledger, engine)))
        watched_s = max(LEAST_WATCHED_S, now - (self._watched_since or now))
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

    @staticmethod
    def _held(ledger: DeviceLedger, engine: EngineState) -> int:
        holding = ledger.holding(engine.id)
        return holding.held if holding is not None else 0

    def _spare(self, ledger: DeviceLedger, choice: Choice | None) -> list[ModelState]:
        """Victims of an earlier plan that this one does not need serve on."""
        kept = {victim.model for victim in choice.victims} if choice is not None else set()
        spared = [
            model
            for model in self._by_engine.values()
            if model.state is Residency.DRAINING
            and model.stop_cause is StopCause.EVICTED
            and model.engine is not None
            and model.engine.device == ledger.spec.name
            and model.spec.name not in kept
        ]
        for model in spared:
            model.move(Residency.READY)
            model.note = ""
        return spared

    def _follow(self, ledger: DeviceLedger, choice: Choice, now: float) -> list[Command]:
        """Begin what can begin: drain victims in time, stop them when all are idle, load when they are gone."""
        wanted = choice.model
        victims = [self.models[victim.model] for victim in choice.victims]
        reason = f"evicted for {wanted.spec.name}, which needs {_size(wanted.spec.memory_bytes)}: {choice.why}"
        for victim in victims:
            self._drain(victim, ledger, reason, now)
        if ledger.starting is not None or any(victim.in_flight for victim in victims):
            return []  # one start at a time, no neighbour leaves while it measures the device, nobody is cut off
        out: list[Command] = []
        if victims:
            self._made_room_for[ledger.spec.name] = wanted.spec.name
        for victim, candidate in zip(victims, choice.victims, strict=True):
            self.eviction.evicted(candidate)
            out += self.stop(victim, StopCause.EVICTED, f"{reason} ({_use(victim, now)})")
        if not victims and ledger.free >= wanted.spec.memory_bytes:
            self._made_room_for.pop(ledger.spec.name, None)
            out.append(self._load(wanted, ledger, now))
        return out

    def _drain(self, victim: ModelState, ledger: DeviceLedger, reason: str, now: float) -> None:
        """Let a busy victim admit nobody more, once its drain would otherwise outlast the load under way."""
        if victim.state is not Residency.READY or not victim.in_flight:
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

    def _load(self, model: ModelState, ledger: DeviceLedger, now: float) -> Load:
        self._engine_count += 1
        engine_id = f"{model.spec.name}#{self._engine_count}"
        free = _size(ledger.free)
        self._attach(model, EngineState(engine_id, ledger.spec.name, model.spec), starting=True)
        model.cause = model.longest_waiting() if model.wanted_order is None else None
        model.move(Residency.LOADING)
        model.load_started_s, model.progress, model.note = now, 0.0, "starting"
        asked = "an operator asked for it" if model.wanted_order is not None else f"{len(model.queue)} waiting"
        reason = f"{asked}; needs {_size(model.spec.memory_bytes)} of {free} free"
        return Load(engine_id, model.spec.name, ledger.spec.name, reason)

    def give_up(self, model: ModelState, cause: StopCause, why: str) -> list[Command]:
        """Drain a ready model, or stop it at once when it is idle. Operators and reloads also break off a start, and
        what they asked for is not taken back when an eviction's reason goes away."""
        engine = model.engine
        if engine is None or model.state is Residency.STOPPING:
            return []
        if (model.state is Residency.READY and engine.in_flight) or (
            model.state is Residency.DRAINING and cause in FIRM
        ):
            if model.state is Residency.READY:
                model.move(Residency.DRAINING)
            model.stop_cause, model.note = cause, why
            return []
        if model.state is Residency.READY or (model.state is Residency.LOADING and cause in FIRM):
            return self.stop(model, cause, why)
        return []

    def stop(self, model: ModelState, cause: StopCause, why: str) -> list[Command]:
        """End the model's engine: nothing is in flight there, or nobody may wait for that."""
        assert model.engine is not None
        self.devices[model.engine.device].started(model.engine.id)
        model.move(Residency.STOPPING)
        model.note = why
        return [Stop(model.engine.id, cause, why)]

    def relieve_pressure(self, threshold: float) -> list[Command]:
        """Evict idle models, oldest first, while a device is fuller than `threshold` of its capacity, before anyone
        waits. A device where a start is under way is left alone."""
        out: list[Command] = []
        for name, ledger in self.devices.items():
            allowed = threshold * ledger.spec.capacity_bytes
            full = ledger.held + ledger.overhead + ledger.foreign
            if full <= allowed or ledger.starting is not None:
                continue
            for model in sorted(self._idle_on(name), key=lambda m: m.last_used_s):
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
            if (
                model.state is Residency.READY
                and model.engine is not None
                and model.engine.revision != model.spec.revision
            ):
                out += self.give_up(model, StopCause.CONFIGURATION, "its configuration has changed")
        return out

    # ---------------------------------------------------------------- engines

    def adopt(self, model: ModelState, engine_id: str, device: str, revision: str) -> None:
        """Book an engine that outlived an earlier proxy."""
        engine = EngineState(engine_id, device, model.spec)
        engine.revision = revision
        self._attach(model, engine, starting=False)

    def _attach(self, model: ModelState, engine: EngineState, *, starting: bool) -> None:
        self.devices[engine.device].promise(engine.id, model.spec.memory_bytes, starting=starting)
        self._by_engine[engine.id] = model
        model.engine = engine

    def detach(self, model: ModelState) -> None:
        """The engine is gone, and its memory with it."""
        engine = model.engine
        assert engine is not None
        self.devices[engine.device].release(engine.id)
        del self._by_engine[engine.id]
        model.engine = None
        model.progress, model.note = 0.0, ""

    # ---------------------------------------------------------------- answers

    def never_fits(self, spec: ModelSpec) -> str | None:
        """Why the model can never be resident, or None. Pinned models' memory is not to be had; other engines' and
        foreign memory is, in time, so it does not count here: nothing is evicted for what cannot fit
        (ollama/ollama#18282)."""
        devices = list(self._devices_of(spec))
        if not devices:
            return f"{spec.name} runs on {spec.device} memory, and there is no such device"
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

    def _devices_of(self, spec: ModelSpec) -> Iterable[DeviceLedger]:
        return (ledger for ledger in self.devices.values() if spec.device in (ledger.spec.kind, ledger.spec.name))


def _size(size: int) -> str:
    """Bytes for people: two significant figures are enough to act on."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _use(model: ModelState, now: float) -> str:
    return f"idle for {now - model.last_used_s:.0f} s"
