"""What should be resident, and where: loads, victims, drains, and the memory that they promise and free.

Given who is wanted (`ModelState.rank`), `plan` makes one decision per device: the most urgent model is loaded if it
fits; else the cheapest victims are drained and stopped, and it is loaded when they are gone. The most urgent model
blocks the less urgent ones of its device, so nobody starves; one start per device at a time, and no eviction on a
device while one is under way.

Knows nothing of tickets. Cost: `plan` is O(models log models); everything else O(models) at most.
"""

from __future__ import annotations

from collections.abc import Iterable

from scheduler import eviction
from scheduler.commands import Command, Load, Stop
from scheduler.ledger import DeviceLedger
from scheduler.model import DeviceSpec, ModelSpec, Residency, StopCause
from scheduler.state import EngineState, ModelState

FIRM = (StopCause.OPERATOR, StopCause.CONFIGURATION)  # not taken back when somebody wants the model after all


class Placement:
    """Models, their engines, and the devices' books.

    model.engine is not None exactly when the engine holds memory in the book of its device.
    """

    def __init__(self, devices: Iterable[DeviceSpec], models: Iterable[ModelSpec], engines_before: int) -> None:
        self.devices = {spec.name: DeviceLedger(spec) for spec in devices}
        self.models = {spec.name: ModelState(spec) for spec in models}
        self._by_engine: dict[str, ModelState] = {}
        self._engine_count = engines_before

    def by_engine(self, engine_id: str) -> ModelState | None:
        """The model that this living engine serves."""
        return self._by_engine.get(engine_id)

    # --------------------------------------------------------------- planning

    def plan(self, now: float) -> list[Command]:
        """What must be loaded and stopped now."""
        out: list[Command] = []
        served: set[str] = set()
        for model in self._wanted():
            if model.state is Residency.COLD:
                out += self._make_resident(model, served, now)
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
            idle = (
                f"idle for {now - victim.last_used_s:.0f} s"
                if not victim.in_flight
                else f"{victim.in_flight} in flight"
            )
            need = _size(model.spec.memory_bytes)
            why = f"evicted for {model.spec.name}, which needs {need} (least recently used, {idle})"
            out += self.give_up(self.models[victim.model], StopCause.EVICTED, why)
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
        self._attach(model, EngineState(engine_id, ledger.spec.name, model.spec), starting=True)
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

    def revivable(self) -> list[ModelState]:
        """Victims that are still draining and may serve on: no cold model is wanted on their device."""
        cold = [model for model in self._wanted() if model.state is Residency.COLD]
        needed = {ledger.spec.name for model in cold for ledger in self._devices_of(model.spec)}
        return [
            model
            for model in self.models.values()
            if model.state is Residency.DRAINING
            and model.stop_cause is StopCause.EVICTED
            and model.engine is not None
            and model.engine.device not in needed
        ]

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
