"""The scheduler's nouns: tickets, models, devices' settings, states. Values only, no behaviour."""

from __future__ import annotations

from enum import IntEnum, StrEnum

import msgspec


class LatencyClass(IntEnum):
    """The promise asked for, shortest first: a target and an order, never a reason to refuse."""

    INSTANT = 0
    FAST = 1
    STANDARD = 2
    DELIBERATE = 3
    BATCH = 4


class Residency(StrEnum):
    """Where a model's engine is in its life. Legal moves: `scheduler.residency.TRANSITIONS`."""

    COLD = "cold"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"
    FAILED = "failed"


class RefusalCode(StrEnum):
    """Why a ticket is turned away."""

    UNKNOWN_MODEL = "unknown_model"
    NEVER_FITS = "never_fits"
    QUEUE_FULL = "queue_full"
    WAITED_TOO_LONG = "waited_too_long"
    DEADLINE = "deadline"
    LOAD_FAILED = "load_failed"
    STOPPING = "stopping"


class StopCause(StrEnum):
    """Why an engine is given up."""

    EVICTED = "evicted"
    PRESSURE = "pressure"
    IDLE = "idle"
    OPERATOR = "operator"
    CONFIGURATION = "configuration"


class Ticket(msgspec.Struct, frozen=True):
    """A request as the scheduler sees it.

    `weight_tokens`: its prompt and the most it may answer; of one that is `open_ended` (no limit to its answer) the
    prompt alone, to which the scheduler adds what it expects.
    """

    id: int
    model: str
    latency_class: LatencyClass = LatencyClass.STANDARD
    tenant: str = ""
    weight_tokens: int = 1
    deadline_s: float | None = None
    open_ended: bool = False


class ModelSpec(msgspec.Struct, frozen=True):
    """What the scheduler must know of a local model (one deployment).

    `device` is a kind (nvidia, host, simulated) or the name of one device. `revision` names everything that an engine
    was started with: one that runs under another revision is drained and replaced.
    """

    name: str
    memory_bytes: int
    device: str
    max_sequences: int = 32
    kv_tokens: int = 1 << 30
    pinned: bool = False
    ttl_s: float | None = None
    max_queue: int = 1000
    load_estimate_s: float = 30.0
    revision: str = ""


class DeviceSpec(msgspec.Struct, frozen=True):
    """A device at start: what the ledger may promise is capacity less reserve less foreign use."""

    name: str
    kind: str
    capacity_bytes: int
    reserve_bytes: int = 0


class SchedulerSettings(msgspec.Struct, frozen=True):
    """Limits of the core. `pressure_threshold` is a share of a device's capacity.

    `patience_s` by latency class: a wait until the lease that still counts as on time. It is the unit of urgency, not a
    reason to refuse, and longer than the class's target, because a cold model can meet no target for the first token.
    A ticket that has waited `overdue_after` times its patience goes before everything else.
    """

    pressure_threshold: float = 0.95
    max_wait_s: float = 600.0
    max_waiting: int = 20_000
    backoff_first_s: float = 5.0
    backoff_limit_s: float = 300.0
    patience_s: tuple[float, float, float, float, float] = (2.0, 5.0, 10.0, 30.0, 120.0)
    overdue_after: float = 40.0
