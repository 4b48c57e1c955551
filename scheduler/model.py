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
    SUSPENDING = "suspending"
    ASLEEP = "asleep"
    WAKING = "waking"
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
    """Why an engine is given up. `WITHDRAWN`: it was here on a guess, unused, and a request wants its place."""

    EVICTED = "evicted"
    PRESSURE = "pressure"
    IDLE = "idle"
    OPERATOR = "operator"
    CONFIGURATION = "configuration"
    LEAKED = "leaked"
    CORRUPT = "corrupt"
    WITHDRAWN = "withdrawn"


class Ticket(msgspec.Struct, frozen=True):
    """A request as the scheduler sees it.

    `weight_tokens`: its prompt and the most it may answer; of one that is `open_ended` (no limit to its answer) the
    prompt alone, to which the scheduler adds what it expects. `session` is what its tenant calls the conversation that
    it belongs to, "" where that is not said. Tickets of one `prefix` (below 2^63, 0: unknown) begin with the same
    prompt, which their engine need read only once.
    """

    id: int
    model: str
    latency_class: LatencyClass = LatencyClass.STANDARD
    tenant: str = ""
    weight_tokens: int = 1
    deadline_s: float | None = None
    open_ended: bool = False
    session: str = ""
    prefix: int = 0


class ModelSpec(msgspec.Struct, frozen=True):
    """What the scheduler must know of a local model (one deployment).

    `device` is a kind (nvidia, host, simulated) or the name of one device. `revision` names everything that an engine
    was started with: one that runs under another revision is drained and replaced.

    `memory_bytes` is on each of its `devices_needed` devices (tensor parallel); `stated` when it is an operator's
    promise rather than an estimate. `sleep_keeps_bytes` is what stays on each device while the engine sleeps, None for
    one that cannot; `sleep_host_bytes` what it then takes of host memory; `wake_estimate_s` how long its first wake
    should take (None: a tenth of a load).
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
    stated: bool = False
    devices_needed: int = 1
    sleep_keeps_bytes: int | None = None
    sleep_host_bytes: int = 0
    wake_estimate_s: float | None = None


class DeviceSpec(msgspec.Struct, frozen=True):
    """A device at start: what the ledger may promise is capacity less reserve less foreign use.

    `frees_late`: memory may stay in use after the last process that held it has gone (GPUs; the kernel frees host
    memory before it says that a process has gone). There an engine counts as gone when the reading says so.
    """

    name: str
    kind: str
    capacity_bytes: int
    reserve_bytes: int = 0
    frees_late: bool = False


class SchedulerSettings(msgspec.Struct, frozen=True):
    """Limits of the core. `pressure_threshold` is a share of a device's capacity.

    `patience_s` by latency class: a wait until the lease that still counts as on time. It is the unit of urgency, not a
    reason to refuse, and longer than the class's target, because a cold model can meet no target for the first token.
    A ticket that has waited `overdue_after` times its patience decides what is loaded next, and is let in out of turn
    (`scheduler.admission.AGEING_SHARE`).

    `fall_limit_s`: how long after a stop or a sleep a device's reading may take to fall. `sleep_memory_bytes` is host
    memory for engines that sleep; 0: none does.

    `anticipate`: models are loaded and woken before they are asked for, where nobody pays for it, and swaps are held
    back for a moment (`scheduler.anticipation`).
    """

    pressure_threshold: float = 0.95
    max_wait_s: float = 600.0
    max_waiting: int = 20_000
    backoff_first_s: float = 5.0
    backoff_limit_s: float = 300.0
    patience_s: tuple[float, float, float, float, float] = (2.0, 5.0, 10.0, 30.0, 120.0)
    overdue_after: float = 40.0
    fall_limit_s: float = 5.0
    sleep_memory_bytes: int = 0
    anticipate: bool = False
