"""What is known of models, engines and devices: which engine serves what, what is promised where, and what was learned.

Others decide (`scheduler.placement`, `scheduler.lifecycle`); it is written down here, so that all of them see the same,
and what always holds can be said of the whole (`check`).

An engine that needs several devices has them all or none. Which ones is fixed: the neighbours 0 to n-1, n to 2n-1, ...,
so that groups do not overlap; the first of them speaks for all.

Knows nothing of tickets and plans. Cost: looking up is O(1), everything else O(models) at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from scheduler.departures import Departures
from scheduler.events import ProbeAnswered
from scheduler.fairness import Fairness
from scheduler.footprints import MUCH, Footprints
from scheduler.ledger import DeviceLedger, SleepMemory, readable_size
from scheduler.model import DeviceSpec, ModelSpec, Residency, SchedulerSettings
from scheduler.state import EngineState, ModelState, Wanted
from scheduler.timers import Timers

SETTLED = (Residency.READY, Residency.DRAINING, Residency.ASLEEP)
LEARNED_MARGIN = 1.05  # measured figures are moments, and an engine may take a little more between two
RAN_OUT = 1.25  # a start that ran out of memory is booked with so much more than it was promised


class Books:
    """Models, their engines, and the devices' ledgers.

    model.engine is not None exactly when the engine holds memory in the ledgers of its devices.
    """

    def __init__(
        self,
        devices: Iterable[DeviceSpec],
        models: Iterable[ModelSpec],
        fairness: Fairness,
        timers: Timers,
        footprints: Footprints | None = None,
    ) -> None:
        self.devices = {spec.name: DeviceLedger(spec) for spec in devices}
        self.models: dict[str, ModelState] = {}
        self.wanted = Wanted()
        self.departures = Departures(self.devices, timers, limit_s=5.0)
        self.sleep_memory = SleepMemory(0)
        self.footprints = Footprints() if footprints is None else footprints
        self._fairness = fairness
        self._by_engine: dict[str, ModelState] = {}
        self._pinned: dict[str, ModelState] = {}  # those that have an engine
        self._matching: dict[str, list[DeviceLedger]] = {}  # by name and by kind
        for ledger in self.devices.values():
            for each in dict.fromkeys((ledger.spec.name, ledger.spec.kind)):
                self._matching.setdefault(each, []).append(ledger)
        self._grouped: dict[tuple[str, int], list[list[DeviceLedger]]] = {}  # by kind or name, and how many at once
        for spec in models:
            self.specify(spec)

    def specify(self, spec: ModelSpec) -> ModelState:
        """A model is configured, for the first time or anew."""
        model = self.models.get(spec.name)
        if model is None:
            model = self.models[spec.name] = ModelState(spec, self._fairness, self.wanted, self.sleep_memory)
        model.spec, model.removed = spec, False
        model.changed()
        self._pin(model)
        self.book(model)
        return model

    def configure(self, settings: SchedulerSettings) -> None:
        """Settings that hold from now on."""
        self.departures.limit_s = settings.fall_limit_s
        self.sleep_memory.budget = settings.sleep_memory_bytes

    # ----------------------------------------------------------------- engines

    def by_engine(self, engine_id: str) -> ModelState | None:
        """The model that this living engine serves."""
        return self._by_engine.get(engine_id)

    def engaged(self) -> Iterable[ModelState]:
        """The models that have an engine, in whatever state."""
        return self._by_engine.values()

    @property
    def settled(self) -> bool:
        """Whether no engine starts, stops, or is between two states of sleep. O(engines)."""
        return all(model.state in SETTLED for model in self._by_engine.values())

    def leaving(self, device: str) -> list[ModelState]:
        """Models whose engines are asked to give memory of this device back."""
        return [
            model
            for engine_id, model in self._by_engine.items()
            if engine_id in self.departures and model.engine is not None and device in model.engine.devices
        ]

    def frees_late(self, engine: EngineState) -> bool:
        """Whether its memory may outlast its processes."""
        return any(ledger.spec.frees_late for ledger in self.ledgers(engine))

    def start_beside(self, model: ModelState) -> bool:
        """Whether a neighbour is in its start on one of the engine's devices: it would measure this one's leaving as
        its own memory (vllm-project/vllm#56830)."""
        engine = model.engine
        return engine is not None and any(each.starting not in (None, engine.id) for each in self.ledgers(engine))

    def works(self, ledger: DeviceLedger, since_s: float) -> bool:
        """Whether an engine there has requests, or has had some since. O(engines)."""
        name = ledger.spec.name
        return any(
            model.in_flight > 0 or model.last_used_s > since_s
            for model in self._by_engine.values()
            if model.engine is not None and name in model.engine.devices
        )

    def adopt(
        self, model: ModelState, engine_id: str, device: str, revision: str, partners: Sequence[str] = ()
    ) -> None:
        """Book an engine that outlived an earlier proxy."""
        engine = EngineState(engine_id, device, model.spec, partners)
        engine.revision = revision
        self.attach(model, engine, starting=False)

    def attach(self, model: ModelState, engine: EngineState, *, starting: bool) -> None:
        """Book an engine that starts now, or that is there already, with what its model is promised."""
        for ledger in self.ledgers(engine):
            ledger.promise(engine.id, model.booked_bytes, starting=starting)
        self._by_engine[engine.id] = model
        model.engine = engine
        self._pin(model)

    def may_sleep_one_day(self, model: ModelState, says: ProbeAnswered) -> None:
        """What the engine says awake is known, so that it could be seen to wake as it was."""
        engine = model.engine
        assert engine is not None
        engine.says = says
        if model.spec.sleep_keeps_bytes is not None:
            self.sleep_memory.claim(engine.id, model.spec.sleep_host_bytes)

    def start_over(self, engine: EngineState) -> None:
        """The engine's start, or its wake, is over, one way or the other."""
        for ledger in self.ledgers(engine):
            ledger.started(engine.id)

    def detach(self, model: ModelState) -> None:
        """The engine is gone, and its memory with it."""
        engine = model.engine
        assert engine is not None
        self.learn(model)
        for ledger in self.ledgers(engine):
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

    # ------------------------------------------------------------------ groups

    def group(self, ledger: DeviceLedger, model: ModelState) -> list[DeviceLedger]:
        """The devices of the model's engine that has this one as its first; [] when there is none."""
        if model.engine is not None:
            return self.ledgers(model.engine) if model.engine.device == ledger.spec.name else []
        return next((group for group in self._groups(model.spec) if group[0] is ledger), [])

    def groups_for(self, model: ModelState) -> list[list[DeviceLedger]]:
        """Every set of devices on which the model could be loaded, or woken."""
        return [self.ledgers(model.engine)] if model.engine is not None else self._groups(model.spec)

    def _groups(self, spec: ModelSpec) -> list[list[DeviceLedger]]:
        key = spec.device, spec.devices_needed
        groups = self._grouped.get(key)
        if groups is None:
            devices, n = self.devices_of(spec), spec.devices_needed
            groups = self._grouped[key] = [devices[i : i + n] for i in range(0, len(devices) - n + 1, n)]
        return groups

    def ledgers(self, engine: EngineState) -> list[DeviceLedger]:
        """Those of the engine's devices, the first of them first."""
        return [self.devices[name] for name in engine.devices]

    def ledgers_of(self, model: ModelState) -> list[DeviceLedger]:
        """Those of its engine's devices; [] without an engine."""
        return [] if model.engine is None else self.ledgers(model.engine)

    def devices_of(self, spec: ModelSpec) -> list[DeviceLedger]:
        """The devices of the kind, or the one of the name, that the model asks for."""
        return self._matching.get(spec.device, [])

    # -------------------------------------------------------------- footprints

    def learn(self, model: ModelState) -> None:
        """What the engine has been seen with counts for the next start; nothing before its first reading."""
        engine = model.engine
        if engine is None or not engine.was_ready or engine.revision != model.spec.revision:
            return
        holdings = [ledger.holding(engine.id) for ledger in self.ledgers(engine)]
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
            f"memory_bytes is {readable_size(spec.memory_bytes)}, and nine in ten of its starts took at most "
            f"{readable_size(learned)}: "
            f"{'more is kept for it' if learned < spec.memory_bytes else 'it is booked with that'}"
        )

    def _learned(self, spec: ModelSpec) -> int | None:
        kinds = {ledger.spec.kind for ledger in self.devices_of(spec)}
        return max((p for kind in kinds if (p := self.footprints.p90(_what(spec), kind)) is not None), default=None)

    # ----------------------------------------------------------------- answers

    def never_fits(self, spec: ModelSpec) -> str | None:
        """Why the model can never be resident, or None. Pinned models' memory is not to be had; other engines' and
        foreign memory is, in time, so it does not count here: nothing is evicted for what cannot fit
        (ollama/ollama#18282)."""
        groups = self._groups(spec)
        if any(spec.memory_bytes <= self._attainable_of(group, spec.name) for group in groups):
            return None
        if groups:
            return self._too_large(spec, max(groups, key=lambda each: self._attainable_of(each, spec.name)))
        devices = self.devices_of(spec)
        if devices:
            return f"{spec.name} needs {spec.devices_needed} {spec.device} devices, and there are {len(devices)}"
        return f"{spec.name} runs on {spec.device} memory, and there is no such device"

    def _too_large(self, spec: ModelSpec, group: Sequence[DeviceLedger]) -> str:
        scarce = min(group, key=lambda ledger: self._attainable(ledger, spec.name))
        pinned = self._pinned_bytes(scarce, spec.name)
        besides = f", {readable_size(pinned)} of it pinned" if pinned else ""
        return (
            f"{spec.name} needs {readable_size(spec.memory_bytes)} and {scarce.spec.name} can give at most "
            f"{readable_size(scarce.limit - pinned)} ({readable_size(scarce.spec.capacity_bytes)} in all{besides})"
        )

    def _attainable_of(self, group: Sequence[DeviceLedger], name: str) -> int:
        return min(self._attainable(ledger, name) for ledger in group)

    def _attainable(self, ledger: DeviceLedger, name: str) -> int:
        return ledger.limit - self._pinned_bytes(ledger, name)

    def _pinned_bytes(self, ledger: DeviceLedger, but: str) -> int:
        total = 0
        for model in self._pinned.values():
            if model.engine is not None and model.spec.name != but:
                total += ledger.held_by(model.engine.id)
        return total

    # ------------------------------------------------------------------ checks

    def check(self) -> None:
        """What always holds. O(everything)."""
        for ledger in self.devices.values():
            ledger.check()
        self.sleep_memory.check()
        for model in self.models.values():
            model.check()
        assert len(self.wanted) == sum(self.wanted.place(model) is not None for model in self.models.values())
        assert self._pinned == {
            name: model for name, model in self.models.items() if model.spec.pinned and model.engine is not None
        }


def _what(spec: ModelSpec) -> str:
    """What a footprint is of."""
    return f"{spec.name}@{spec.revision}"
