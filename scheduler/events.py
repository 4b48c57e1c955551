"""What has happened: the only things that can change the scheduler's core.

Past tense, frozen, and free of clocks: the time of an event is the `now` given to `Core.step(event, now)`.
Seconds are monotonic floats, sizes are bytes, tokens are KV-cache tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from scheduler.model import LatencyClass, ModelSpec, SchedulerSettings, Ticket


class Arrived(msgspec.Struct, frozen=True):
    """A request wants a lease on its model's engine."""

    ticket: Ticket


class Cancelled(msgspec.Struct, frozen=True):
    """The caller of a waiting or admitted ticket has gone."""

    ticket_id: int


class Finished(msgspec.Struct, frozen=True):
    """An admitted ticket's lease came back, however its request ended. Tokens are what it really used; None: unknown,
    and the estimate stands."""

    ticket_id: int
    prompt_tokens: int | None = None
    output_tokens: int | None = None


class CreditAsked(msgspec.Struct, frozen=True):
    """A holder of credit wants more of the model's engine."""

    holder: int
    model: str


class Served(msgspec.Struct, frozen=True, array_like=True):
    """A request that was let in from credit, and is over. Tokens as in `Finished`, weight as in `Ticket`."""

    tenant: str
    latency_class: LatencyClass
    since_s: float
    until_s: float
    open_ended: bool
    prompt_tokens: int | None = None
    output_tokens: int | None = None


class CreditReported(msgspec.Struct, frozen=True):
    """What a holder did with its credit on an engine since its last report: whom it let in (tenant and session of each
    request), how many are `in_use` now, which are over. `sequences` and `tokens` it gives back."""

    holder: int
    engine_id: str
    begun: tuple[tuple[str, str], ...]
    in_use: int
    served: tuple[Served, ...] = ()
    sequences: int = 0
    tokens: int = 0


class HolderCame(msgspec.Struct, frozen=True):
    """A process that lets in on credit."""

    holder: int


class HolderGone(msgspec.Struct, frozen=True):
    """A holder of credit has died, and with it all that it had in use."""

    holder: int


class LoadAsked(msgspec.Struct, frozen=True):
    """An operator wants the model resident."""

    model: str


class UnloadAsked(msgspec.Struct, frozen=True):
    """An operator wants the model gone (drained first)."""

    model: str


class EngineReady(msgspec.Struct, frozen=True):
    """The engine answered a real request, or says that it is awake again; `adopted` when it outlived an earlier proxy.
    `device` is the first of those it runs on, `partners` the others.

    Of an adopted one: `in_flight` are requests there of a proxy that still lives, each with the weight that it holds;
    `says` is what it answered to the probe after its load, `asleep` that it is put to sleep.
    """

    engine_id: str
    model: str
    device: str
    load_seconds: float
    adopted: bool = False
    revision: str = ""
    partners: tuple[str, ...] = ()
    in_flight: tuple[Ticket, ...] = ()
    says: ProbeAnswered | None = None
    asleep: bool = False


class EngineFailed(msgspec.Struct, frozen=True):
    """The engine did not start, or died; its processes are gone when this is sent. `out_of_memory`: for want of it."""

    engine_id: str
    reason: str
    out_of_memory: bool = False


class EngineStopped(msgspec.Struct, frozen=True):
    """A stop that we asked for is complete: no process of the engine is left."""

    engine_id: str


class Asleep(msgspec.Struct, frozen=True):
    """The engine says that it sleeps, which its device has yet to confirm; `error` when it could not be put to
    sleep."""

    engine_id: str
    error: str = ""


class ProbeAnswered(msgspec.Struct, frozen=True):
    """What an idle engine answered to the fixed probe: its most likely token and the logarithm of that one's
    probability. `error` when it gave no such answer, or did not even wake."""

    engine_id: str
    token: str = ""
    logprob: float = 0.0
    error: str = ""


class LoadProgress(msgspec.Struct, frozen=True):
    """How far a start has come: `fraction` 0 to 1, `note` for people."""

    engine_id: str
    fraction: float
    note: str


class MemoryMeasured(msgspec.Struct, frozen=True):
    """A device was read. `foreign_bytes` is held by strangers, `overhead_bytes` by us but by none of our engines."""

    device: str
    total_bytes: int
    used_bytes: int
    foreign_bytes: int
    engines: Mapping[str, int]
    overhead_bytes: int = 0


class ConfigChanged(msgspec.Struct, frozen=True):
    """A reload: the models and settings that hold from now on."""

    models: tuple[ModelSpec, ...]
    settings: SchedulerSettings


class HandOverAsked(msgspec.Struct, frozen=True):
    """Another scheduler is to take the engines over: what is under way goes on, nothing more is begun."""


class HandOverOff(msgspec.Struct, frozen=True):
    """It is not, after all."""


class Tick(msgspec.Struct, frozen=True):
    """Time has passed: the answer to a `WakeAt`."""


Event = (
    Arrived
    | Cancelled
    | Finished
    | CreditAsked
    | CreditReported
    | HolderCame
    | HolderGone
    | LoadAsked
    | UnloadAsked
    | EngineReady
    | EngineFailed
    | EngineStopped
    | Asleep
    | ProbeAnswered
    | LoadProgress
    | MemoryMeasured
    | ConfigChanged
    | HandOverAsked
    | HandOverOff
    | Tick
)
