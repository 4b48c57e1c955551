"""The core's memory of one model and of one engine. Fields and small questions; others decide."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ext.weighted_semaphore import Capacity
from scheduler.admission import WaitQueue
from scheduler.credit import Credits
from scheduler.events import ProbeAnswered
from scheduler.expected_output import ExpectedOutput
from scheduler.fairness import Fairness, LoadShares, Pace
from scheduler.forecast import Demand
from scheduler.ledger import SleepMemory
from scheduler.model import ModelSpec, Residency, StopCause, Ticket
from scheduler.residency import move

WAKE_SOONER = 10.0  # than a load, where nobody knows better
WAKES_NEXT = (Residency.SUSPENDING, Residency.ASLEEP, Residency.WAKING)


def first_wake_s(spec: ModelSpec) -> float:
    """Seconds that a wake should take, until one has been seen."""
    return spec.load_estimate_s / WAKE_SOONER if spec.wake_estimate_s is None else spec.wake_estimate_s


class Guess:
    """Why an engine came here before anybody had asked for it; `served` is how much it had served until then."""

    __slots__ = ("served", "why")

    def __init__(self, served: int, why: str) -> None:
        self.served = served
        self.why = why


class EngineState:
    """A living engine: in_flight == tickets admitted and not finished, and requests on credit by the last reports;
    capacity counts the tickets' weights, and all credit that is out.

    `device` is the first of its `devices`. `says` is what it answered to the probe after its load, None for one that
    was not asked: it cannot be put to sleep, because nobody could tell whether it woke as it was. `end` is what its
    model becomes when it has gone, `was_ready` that it came as far as serving. `guess` is set where its last load or
    wake was one.
    """

    __slots__ = ("capacity", "credits", "device", "devices", "end", "guess", "id", "in_flight", "revision", "says",
                 "served", "was_ready")  # fmt: skip

    def __init__(self, engine_id: str, device: str, spec: ModelSpec, partners: Sequence[str] = ()) -> None:
        self.id = engine_id
        self.device = device
        self.devices = (device, *partners)
        self.says: ProbeAnswered | None = None
        self.end = Residency.COLD
        self.was_ready = False
        self.guess: Guess | None = None
        self.revision = spec.revision
        self.capacity = Capacity(spec.kv_tokens, spec.max_sequences)
        self.credits = Credits(self.capacity)
        self.in_flight = 0
        self.served = 0

    @property
    def occupied(self) -> bool:
        """Whether somebody has a lease there, or may have one without asking."""
        return self.in_flight > 0 or self.credits.sequences > 0


class Wanted:
    """The models that a plan chooses from: neither loaded nor on their way, and waited for, or asked for by an
    operator. Exact at every moment, because every change of a model says so: a plan need not look at the others.

    Each is at one place: where its `spec.device` says (a kind, or the name of one device), or among `others`, which
    need a closer look: what sleeps can wake only where it is, and what needs several devices needs them all. O(1) each.
    """

    __slots__ = ("_by_device", "others")

    def __init__(self) -> None:
        self.others: dict[str, ModelState] = {}
        self._by_device: dict[str, dict[str, ModelState]] = {}

    def __len__(self) -> int:
        return len(self.others) + sum(map(len, self._by_device.values()))

    def __iter__(self) -> Iterator[ModelState]:
        yield from self.others.values()
        for each in self._by_device.values():
            yield from each.values()

    def place(self, model: ModelState) -> dict[str, ModelState] | None:
        """Where the model belongs now."""
        if model.state not in (Residency.COLD, Residency.ASLEEP) or not model.wanted:
            return None
        if model.state is Residency.ASLEEP or model.spec.devices_needed > 1:
            return self.others
        return self._by_device.setdefault(model.spec.device, {})

    def on(self, *device: str) -> Iterable[ModelState]:
        """Those for which the device of this name and kind is enough."""
        return (model for each in dict.fromkeys(device) for model in self._by_device.get(each, {}).values())


class ModelState:
    """One model: its residency, its engine if it has one, and who waits for it.

    state COLD or FAILED implies engine is None, and the other way round.
    """

    __slots__ = (
        "_place", "_sleep_memory", "_wanted", "_wanted_order", "booked_bytes", "cause", "demand", "engine", "failures",
        "last_asked_s", "last_error", "last_used_s", "load_s", "load_started_s", "loads", "note", "output", "pace",
        "progress", "queue", "ran_out", "removed", "rested_s", "retry_at_s", "seconds_to_load", "shares", "sleepless",
        "sleepless_times", "spec", "state", "stop_cause", "stopped_for", "ttl_armed", "wake_s",
    )  # fmt: skip

    def __init__(
        self,
        spec: ModelSpec,
        fairness: Fairness | None = None,
        wanted: Wanted | None = None,
        sleep_memory: SleepMemory | None = None,
    ) -> None:
        self._wanted = Wanted() if wanted is None else wanted
        self._sleep_memory = SleepMemory(0) if sleep_memory is None else sleep_memory
        self._place: dict[str, ModelState] | None = None  # among the wanted
        self._wanted_order: int | None = None
        self.spec = spec
        self.state = Residency.COLD
        self.engine: EngineState | None = None
        self.queue = WaitQueue(fairness, self.changed)
        self.output = ExpectedOutput()
        self.pace = Pace()
        self.cause: Ticket | None = None  # whose waiting made the load under way, or the last one, necessary
        self.shares: LoadShares | None = None  # of the load that brought the engine here
        self.demand = Demand()
        self.last_asked_s = 0.0  # when it last let somebody in, or became ready
        self.last_used_s = 0.0  # when its last answer ended
        self.rested_s = 0.0  # the same, before it was last busy
        self.load_started_s = 0.0
        self.load_s = spec.load_estimate_s
        self.wake_s = first_wake_s(spec)
        self.seconds_to_load = self.load_s  # until it is ready from where it is: a load, or a wake
        self.booked_bytes = spec.memory_bytes  # on each device: stated, estimated or learned
        self.ran_out = False  # its last start ended for want of memory, and is tried once more
        self.sleepless = False  # its last sleep or wake failed: it is stopped instead, for a while
        self.sleepless_times = 0
        self.progress = 0.0
        self.note = ""
        self.loads = 0
        self.failures = 0
        self.retry_at_s = 0.0
        self.last_error = ""
        self.stop_cause = StopCause.EVICTED  # meaningful while draining
        self.stopped_for: StopCause | None = None  # why its last engine was given up
        self.removed = False
        self.ttl_armed = False

    def __repr__(self) -> str:
        flight = self.engine.in_flight if self.engine else 0
        return f"<ModelState {self.spec.name} {self.state} in_flight={flight} waiting={len(self.queue)}>"

    def move(self, target: Residency) -> None:
        """Change the state, if the table allows it."""
        self.state = move(self.state, target)
        self.seconds_to_load = self.wake_s if target in WAKES_NEXT else self.load_s
        self.changed()

    def changed(self) -> None:
        """It may be wanted now, or no longer, or elsewhere."""
        place = self._wanted.place(self)
        if place is not self._place:
            if self._place is not None:
                del self._place[self.spec.name]
            if place is not None:
                place[self.spec.name] = self
            self._place = place

    @property
    def wanted_order(self) -> int | None:
        """Set while an operator's load is outstanding: its place among those."""
        return self._wanted_order

    @wanted_order.setter
    def wanted_order(self, order: int | None) -> None:
        self._wanted_order = order
        self.changed()

    def check(self) -> None:
        """What always holds."""
        assert (self.engine is None) == (self.state in (Residency.COLD, Residency.FAILED)), self
        assert self._place is self._wanted.place(self), self
        assert self._place is None or self._place[self.spec.name] is self, self

    @property
    def idle(self) -> bool:
        """Ready, and nobody uses or awaits it."""
        return (
            self.state is Residency.READY
            and self.engine is not None
            and self.engine.in_flight == 0
            and not len(self.queue)
            and self.wanted_order is None
        )

    @property
    def guessed(self) -> bool:
        """Its engine is here, or on its way, on a guess: nobody has asked for it so far."""
        engine = self.engine
        return (
            engine is not None
            and engine.guess is not None
            and engine.guess.served == engine.served
            and not engine.occupied
            and not self.wanted
            and self.state in (Residency.LOADING, Residency.WAKING, Residency.READY)
        )

    @property
    def in_flight(self) -> int:
        """Requests on its engine."""
        return self.engine.in_flight if self.engine is not None else 0

    @property
    def occupied(self) -> bool:
        """Whether its engine cannot be stopped now without cutting somebody off."""
        return self.engine is not None and self.engine.occupied

    @property
    def can_sleep(self) -> bool:
        """Whether its engine can come back from sleep as it is now, and gives memory back for it."""
        engine = self.engine
        return (
            self.spec.sleep_keeps_bytes is not None
            and self.spec.sleep_keeps_bytes < self.booked_bytes
            and engine is not None
            and self.state in (Residency.READY, Residency.DRAINING)
            and engine.says is not None
            and engine.revision == self.spec.revision
            and not self.sleepless
            and not self.removed
        )

    @property
    def return_s(self) -> float:
        """Seconds to bring it back once it has been evicted: those of a wake where it sleeps, or surely would; else
        those of a load. O(1).

        Surely: has slept before, or all that could sleep have room to. Where they compete for host memory, a wake as
        the price of each would have the same few trade places all the time: more loads in the end, not fewer.
        """
        return self.wake_s if self.state in WAKES_NEXT or self._would_sleep() else self.load_s

    @property
    def loss_s(self) -> float:
        """Seconds by which its next use is late if it is evicted now. A sleeper is stopped then, and so is one that was
        woken on a guess: it would have had to wake anyway. O(1)."""
        if self.state is Residency.ASLEEP or self.guessed:
            return max(0.0, self.load_s - self.wake_s)
        return self.return_s

    @property
    def kept_bytes(self) -> int:
        """What an eviction now would leave of it on each of its devices: what it keeps asleep, if it would sleep."""
        if not self.can_sleep or self.engine is None or self.guessed:
            return 0
        has_room = self._sleep_memory.has_room(self.engine.id, self.spec.sleep_host_bytes)
        return self.spec.sleep_keeps_bytes or 0 if has_room else 0

    def _would_sleep(self) -> bool:
        return self.can_sleep and self.engine is not None and self._sleep_memory.certain(self.engine.id)

    def longest_waiting(self) -> Ticket | None:
        """The ticket that came first of those that wait."""
        first = min(self.queue.heads(), key=lambda waiting: waiting.order, default=None)
        return None if first is None else first.ticket

    def took(self, seconds: float) -> None:
        """The load, or the wake, that has ended took so long; the next is expected to."""
        if self.state is Residency.WAKING:
            self.wake_s = seconds
        else:
            self.load_s = seconds
        self.seconds_to_load = seconds

    @property
    def need_bytes(self) -> int:
        """What must be free on each device for it to be loaded, or woken."""
        kept = self.spec.sleep_keeps_bytes if self.state is Residency.ASLEEP else None
        return self.booked_bytes - (kept or 0)

    @property
    def wanted(self) -> bool:
        """Somebody waits for it, or an operator asked for it."""
        return len(self.queue) > 0 or self._wanted_order is not None

    @property
    def resting(self) -> bool:
        """Cold or asleep, and nobody wants anything else: nothing will happen to it by itself."""
        return self.state in (Residency.COLD, Residency.ASLEEP) and not self.wanted

    def expected_load_s(self, now: float) -> float:
        """Seconds until a start under way, or one begun now, should be ready."""
        if self.state in (Residency.LOADING, Residency.WAKING):
            return max(0.0, self.seconds_to_load - (now - self.load_started_s))
        return self.seconds_to_load
