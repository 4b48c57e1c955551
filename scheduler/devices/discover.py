"""Which devices there are, in the order in which they are shown."""

from __future__ import annotations

from collections.abc import Mapping

from scheduler.devices.base import Device
from scheduler.devices.host import HostDevice
from scheduler.devices.nvml import nvidia_devices
from scheduler.devices.simulated import SimulatedDevice


def discover(
    *,
    host_budget_bytes: int | None = None,
    use_host: bool = True,
    use_nvidia: bool = True,
    gpu_reserve_bytes: int = 0,
    simulated: Mapping[str, int] | None = None,
) -> list[Device]:
    """GPUs, host memory, simulated devices (name to bytes). Milliseconds; a missing driver is no error."""
    devices: list[Device] = []
    if use_nvidia:
        devices.extend(nvidia_devices(gpu_reserve_bytes))
    if use_host:
        devices.append(HostDevice(host_budget_bytes))
    devices.extend(SimulatedDevice(name, size) for name, size in (simulated or {}).items())
    return devices
