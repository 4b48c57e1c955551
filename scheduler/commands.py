"""What must be done: everything the core ever asks of its shell. Imperative, frozen, printable."""

from __future__ import annotations

import msgspec

from scheduler.model import RefusalCode, StopCause


class Admit(msgspec.Struct, frozen=True):
    """Give the waiting ticket its lease on this engine."""

    ticket_id: int
    engine_id: str


class Refuse(msgspec.Struct, frozen=True):
    """Turn the ticket away. `reason` is a sentence for people."""

    ticket_id: int
    code: RefusalCode
    reason: str
    retry_after_s: float | None = None


class Load(msgspec.Struct, frozen=True):
    """Start an engine for the model on the device; its memory is already promised."""

    engine_id: str
    model: str
    device: str
    reason: str


class Stop(msgspec.Struct, frozen=True):
    """End the engine's processes: nobody uses it any more. `reason` goes into the decision log."""

    engine_id: str
    cause: StopCause
    reason: str


class WakeAt(msgspec.Struct, frozen=True):
    """Send a `Tick` at this moment (monotonic seconds); a later WakeAt replaces an earlier one."""

    at_s: float


Command = Admit | Refuse | Load | Stop | WakeAt
