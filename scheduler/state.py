"""The core's memory of one model and of one engine. Fields and small questions; `scheduler.core` decides."""

from __future__ import annotations

from ext.weighted_semaphore import Capacity
from scheduler.admission import WaitQueue
from scheduler.expected_output import ExpectedOutput
from scheduler.fairness import Fairness, LoadShares, Pace
from scheduler.forecast import Demand
from scheduler.model import ModelSpec, Residency, StopCause, Ticket
from scheduler.residency import move


class EngineState:
    """A living engine: in_flight == tickets admitted and not finished; capacity counts their weights."""

    __slots__ = ("capacity", "device", "id", "in_flight", "revision", "served")

    def __init__(self, engine_id: str, device: str, spec: ModelSpec) -> None:
        self.id = engine_id
        self.device = device
        self.revision = spec.revision
        self.capacity = Capacity(spec.kv_tokens, spec.max_sequences)
        self.in_flight = 0
        self.served = 0


class ModelState:
    """One model: its residency, its engine if it has one, and who waits for it.

    state COLD or FAILED implies engine is None, and the other way round.
    """

    __slots__ = (
        "cause", "demand", "engine", "failures", "last_asked_s", "last_error", "last_used_s", "load_started_s",
        "loads", "note", "output", "pace", "progress", "queue", "removed", "retry_at_s", "seconds_to_load", "shares",
        "spec", "state", "stop_cause", "ttl_armed", "wanted_order",
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
        self.seconds_to_load = spec.load_estimate_s
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
    def wanted(self) -> bool:
        """Somebody waits for it, or an operator asked for it."""
        return len(self.queue) > 0 or self.wanted_order is not None

    def expected_load_s(self, now: float) -> float:
        """Seconds until a start under way, or one begun now, should be ready."""
        if self.state is Residency.LOADING:
            return max(0.0, self.seconds_to_load - (now - self.load_started_s))
        return self.seconds_to_load
