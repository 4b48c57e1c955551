"""NVIDIA GPUs through NVML. No CUDA context is made: that would take memory on every GPU it looks at.

    foreign = used - what our processes hold

NVML lists processes with the pids of the namespace it runs in, and in containers (or under WSL) it may give no memory
per process, or no process at all. An engine that cannot be seen (or has not come as far as the GPU) is left out of
the reading, so that the ledger goes by its prediction; foreign memory cannot be told from its, and stays what it was
when last it could.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

from scheduler.devices.base import Reading
from scheduler.model import DeviceSpec

log = logging.getLogger("vramp.scheduler")


class NvmlDevice:
    """One GPU. `nvml` is the pynvml module, initialised."""

    def __init__(self, nvml: ModuleType, index: int, reserve_bytes: int = 0) -> None:
        self._nvml = nvml
        self._handle: Any = nvml.nvmlDeviceGetHandleByIndex(index)
        self._uuid = _text(nvml.nvmlDeviceGetUUID(self._handle))
        self._total = int(nvml.nvmlDeviceGetMemoryInfo(self._handle).total)
        self._foreign = 0
        self._spec = DeviceSpec(f"gpu{index}", "nvidia", self._total, reserve_bytes, frees_late=True)

    @property
    def spec(self) -> DeviceSpec:
        """What the ledger is opened with."""
        return self._spec

    def measure(self, engines: Mapping[str, Sequence[int]], overhead: Sequence[int]) -> Reading:
        """About a millisecond. Raises OSError when the driver does not answer.

        Launchers hold nothing here: one that had initialised CUDA would refuse to fork.
        """
        try:
            used = int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
            by_pid = self._processes()
        except self._nvml.NVMLError as error:
            raise OSError(f"{self._spec.name}: {error}") from error
        held = {
            name: sum(by_pid.get(pid, 0) or 0 for pid in pids)
            for name, pids in engines.items()
            if any(pid in by_pid for pid in pids) and not any(by_pid.get(pid, 0) is None for pid in pids)
        }
        if all(name in held for name, pids in engines.items() if pids):
            self._foreign = max(0, used - sum(held.values()))
        return Reading(self._total, used, self._foreign, held)

    def _processes(self) -> dict[int, int | None]:
        """Bytes by pid; None where the driver does not say."""
        by_pid: dict[int, int | None] = {}
        for listed in (
            self._nvml.nvmlDeviceGetComputeRunningProcesses,
            self._nvml.nvmlDeviceGetGraphicsRunningProcesses,
        ):
            try:
                processes = listed(self._handle)
            except self._nvml.NVMLError_NotSupported:
                continue
            by_pid.update((process.pid, process.usedGpuMemory) for process in processes)
        return by_pid

    def engine_env(self) -> dict[str, str]:
        """By UUID: an index means another GPU as soon as CUDA_DEVICE_ORDER or a visible set changes."""
        return {"CUDA_VISIBLE_DEVICES": self._uuid}


def nvidia_devices(reserve_bytes: int, nvml: ModuleType | None = None) -> list[NvmlDevice]:
    """All GPUs that can be used; none without a driver. Some milliseconds, more when the driver must wake up."""
    nvml = nvml or _pynvml()
    if nvml is None:
        return []
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        log.debug("no NVIDIA GPUs: %s", error)
        return []
    return list(_usable(nvml, reserve_bytes))


def _pynvml() -> ModuleType | None:
    try:
        import pynvml  # noqa: PLC0415  not paid for where nobody looks for GPUs
    except ImportError:
        return None
    return pynvml


def _usable(nvml: ModuleType, reserve_bytes: int) -> Iterable[NvmlDevice]:
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            yield NvmlDevice(nvml, index, reserve_bytes)
        except nvml.NVMLError as error:  # one that has fallen off the bus must not cost the others
            log.warning("GPU %d cannot be used: %s", index, error)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value  # bytes before nvidia-ml-py 11.5
