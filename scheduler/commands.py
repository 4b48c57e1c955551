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


class Credit(msgspec.Struct, frozen=True):
    """Let the holder fill so much more of this engine without asking. `output_tokens` is what it is to expect of an
    answer without a limit."""

    holder: int
    model: str
    engine_id: str
    sequences: int
    tokens: int
    output_tokens: int


class Revoke(msgspec.Struct, frozen=True):
    """Have every holder return its credit on this engine: at once what is unused, the rest as it falls free."""

    engine_id: str


class Load(msgspec.Struct, frozen=True):
    """Start an engine for the model on the device and its partners; its memory is already promised on all of them."""

    engine_id: str
    model: str
    device: str
    reason: str
    partners: tuple[str, ...] = ()


class Stop(msgspec.Struct, frozen=True):
    """End the engine's processes: nobody uses it any more. `reason` goes into the decision log. `force`: its whole
    group is killed at once."""

    engine_id: str
    cause: StopCause
    reason: str
    force: bool = False


class Sleep(msgspec.Struct, frozen=True):
    """Have the idle engine move its weights to host memory and drop its cache; answered by Asleep."""

    engine_id: str
    cause: StopCause
    reason: str


class Wake(msgspec.Struct, frozen=True):
    """Have the engine take its memory back, which is promised; answered by EngineReady, or ProbeAnswered with an
    error."""

    engine_id: str
    reason: str


class Probe(msgspec.Struct, frozen=True):
    """Ask the idle engine the fixed question; answered by ProbeAnswered."""

    engine_id: str


class WakeAt(msgspec.Struct, frozen=True):
    """Send a `Tick` at this moment (monotonic seconds); a later WakeAt replaces an earlier one."""

    at_s: float


Command = Admit | Refuse | Credit | Revoke | Load | Stop | Sleep | Wake | Probe | WakeAt
