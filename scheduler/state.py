"""The core's memory of one model and of one engine. Fields and small questions; others decide."""

from __future__ import annotations

from collections.abc import Sequence

from ext.weighted_semaphore import Capacity
from scheduler.admission import WaitQueue
from scheduler.events import ProbeAnswered
from scheduler.expected_output import ExpectedOutput
from scheduler.fairness import Fairness, LoadShares, Pace
from scheduler.forecast import Demand
from scheduler.model import ModelSpec, Residency, StopCause, Ticket
from scheduler.residency import move

WAKE_SOONER = 10.0  # than a load, until it has been seen


class EngineState:
    """A living engine: in_flight == tickets admitted and not finished; capacity counts their weights.

    `device` is the first of its `devices`. `says` is what it answered to the probe after its load, None for one that
    was not asked: it cannot be put to sleep, because nobody could tell whether it woke as it was. `end` is what its
    model becomes when it has gone, `was_ready` that it came as far as serving.
    """

    __slots__ = ("capacity", "device", "devices", "end", "id", "in_flight", "revision", "says", "served",
                 "was_ready")  # fmt: skip

    def __init__(self, engine_id: str, device: str, spec: ModelSpec, partners: Sequence[str] = ()) -> None:
        self.id = engine_id
        self.device = device
        self.devices = (device, *partners)
        self.says: ProbeAnswered | None = None
        self.end = Residency.COLD
        self.was_ready = False
        self.revision = spec.revision
        self.capacity = Capacity(spec.kv_tokens, spec.max_sequences)
        self.in_flight = 0
        self.served = 0


class ModelState:
    """One model: its residency, its engine if it has one, and who waits for it.

    state COLD or FAILED implies engine is None, and the other way round.
    """

    __slots__ = (
        "booked_bytes", "cause", "demand", "engine", "failures", "last_asked_s", "last_error", "last_used_s", "load_s",
        "load_started_s", "loads", "note", "output", "pace", "progress", "queue", "ran_out", "removed", "retry_at_s",
        "shares", "sleepless", "sleepless_times", "spec", "state", "stop_cause", "ttl_armed", "wake_s", "wanted_order",
    )  # fmt: skip

    def __init__(self, spec: ModelSpec, fairness: Fairness | None = None) -> None:
        self.spec = spec
        self.state = Residency.COLD
        self.engine: EngineState | None = None
        self.queue = WaitQueue(fairness)
        self.output = ExpectedOutput()
        self.pace = Pace()
        self.cause: Ticket | None = None  # whose waiting made the load under way, or the last one, necessary
        self.shares: LoadShares | None = None  # of the load that brought the engine here
        self.demand = Demand()
        self.last_asked_s = 0.0  # when it last let somebody in, or became ready
        self.last_used_s = 0.0  # when its last answer ended
        self.load_started_s = 0.0
        self.load_s = spec.load_estimate_s
        self.wake_s = spec.load_estimate_s / WAKE_SOONER
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
        self.wanted_order: int | None = None  # set while an operator's load is outstanding
        self.stop_cause = StopCause.EVICTED  # meaningful while draining
        self.removed = False
        self.ttl_armed = False

    def __repr__(self) -> str:
        flight = self.engine.in_flight if self.engine else 0
        return f"<ModelState {self.spec.name} {self.state} in_flight={flight} waiting={len(self.queue)}>"

    def move(self, target: Residency) -> None:
        """Change the state, if the table allows it."""
        self.state = move(self.state, target)

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
    def in_flight(self) -> int:
        """Requests on its engine."""
        return self.engine.in_flight if self.engine is not None else 0

    def longest_waiting(self) -> Ticket | None:
        """The ticket that came first of those that wait."""
        first = min(self.queue.heads(), key=lambda waiting: waiting.order, default=None)
        return None if first is None else first.ticket

    @property
    def seconds_to_load(self) -> float:
        """How long it takes to be ready from where it is: a wake, or a load. Setting it is learning it."""
        return self.wake_s if self.state in (Residency.ASLEEP, Residency.WAKING) else self.load_s

    @seconds_to_load.setter
    def seconds_to_load(self, seconds: float) -> None:
        if self.state in (Residency.ASLEEP, Residency.WAKING):
            self.wake_s = seconds
        else:
            self.load_s = seconds

    @property
    def need_bytes(self) -> int:
        """What must be free on each device for it to be loaded, or woken."""
        kept = self.spec.sleep_keeps_bytes if self.state is Residency.ASLEEP else None
        return self.booked_bytes - (kept or 0)

    @property
    def wanted(self) -> bool:
        """Somebody waits for it, or an operator asked for it."""
        return len(self.queue) > 0 or self.wanted_order is not None

    def expected_load_s(self, now: float) -> float:
        """Seconds until a start under way, or one begun now, should be ready."""
        if self.state in (Residency.LOADING, Residency.WAKING):
            return max(0.0, self.seconds_to_load - (now - self.load_started_s))
        return self.seconds_to_load
