"""The relay, where it was built; `Relay` is None where not. Theory: `ext/_relay.pyx`. Interface: `ext/_relay.pyi`."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ext._relay import Client, Exchange, Limits, Owner, Pool, Relay
else:
    from ext import backend

    _chosen = backend.module("relay")
    Relay = _chosen.Relay
    Pool = getattr(_chosen, "Pool", None)
    Limits = getattr(_chosen, "Limits", None)
    Client = Exchange = Owner = object

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


__all__ = ["TICK_S", "Client", "Exchange", "Failure", "Limits", "Owner", "Pool", "Relay"]
