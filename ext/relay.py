"""The relay, where it was built; `Relay` is None where not. Theory: `ext/_relay.pyx`. Interface: `ext/_relay.pyi`."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ext._gate import Form, Gate
    from ext._relay import Client, Exchange, Flow, Lease, Limits, Owner, Pool, Relay
else:
    from ext import backend

    _chosen = backend.module("relay")
    Relay = _chosen.Relay
    Pool = getattr(_chosen, "Pool", None)
    Limits = getattr(_chosen, "Limits", None)
    Flow = getattr(_chosen, "Flow", None)
    if Relay is not None:
        from ext._gate import Form, Gate
    else:
        Form = Gate = None
    Client = Exchange = Lease = Owner = object

TICK_S = 0.05  # how often `Relay.tick` is to be called, and how late a limit may act


class Failure(IntEnum):
    """How an exchange failed, as `Exchange.failed` is told."""

    LEFT = 1  # the client
    STALLED = 2  # the client takes nothing
    UNREACHABLE = 3
    BROKE = 4
    FIRST_BYTE = 5
    IDLE = 6
    TOTAL = 7
    STOPPING = 8


class Field(IntEnum):
    """What differs between two lines of one form."""

    NOTHING = 0
    AT = 1  # now, in Unix seconds
    AT_MS = 2  # likewise, to the millisecond
    REQUEST_ID = 3
    REMOTE = 4
    FIRST_BYTE = 5  # seconds from the request to its answer's first byte
    DURATION = 6
    BYTES_IN = 7
    BYTES_OUT = 8
    PROMPT_TOKENS = 9
    CACHED_TOKENS = 10
    OUTPUT_TOKENS = 11
    FINISH_REASON = 12


__all__ = [
    "TICK_S",
    "Client",
    "Exchange",
    "Failure",
    "Field",
    "Flow",
    "Form",
    "Gate",
    "Lease",
    "Limits",
    "Owner",
    "Pool",
    "Relay",
]
