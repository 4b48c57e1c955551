"""What a device is to the scheduler: a capacity, and a reading that tells who holds what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from scheduler.model import DeviceSpec


class Reading(msgspec.Struct, frozen=True):
    """One look at a device, in bytes. `engines` by engine id; `overhead_bytes` is ours but no engine's (launchers)."""

    total_bytes: int
    used_bytes: int
    foreign_bytes: int
    engines: dict[str, int]
    overhead_bytes: int = 0


class Device(Protocol):
    """Memory that engines share. `measure` may take milliseconds, or hang: `scheduler.devices.reader` calls it."""

    @property
    def spec(self) -> DeviceSpec:
        """What the ledger is opened with."""
        ...

    def measure(self, engines: Mapping[str, Sequence[int]], overhead: Sequence[int]) -> Reading:
        """Read the device. `engines` maps engine ids to the pids of their process groups, `overhead` lists
        our own helper processes (warm launchers). A pid that has gone meanwhile counts nothing."""
        ...

    def engine_env(self) -> dict[str, str]:
        """Environment that ties an engine to this device, e.g. CUDA_VISIBLE_DEVICES."""
        ...
