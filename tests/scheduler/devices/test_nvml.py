"""NVIDIA devices on a driver of ours: what is said, what is not, and what breaks."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from scheduler.devices.nvml import NvmlDevice, nvidia_devices

GIB = 1 << 30


class FakeNvml(ModuleType):
    """pynvml with GPUs of 24 GiB; `processes` is {pid: bytes or None}."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):  # noqa: N801  its name in pynvml
        pass

    def __init__(self, gpus: int = 1, used: int = 0, processes: dict[int, int | None] | None = None) -> None:
        super().__init__("pynvml")
        self.gpus, self.used, self.processes = gpus, used, processes or {}
        self.broken: set[int] = set()
        self.driver = True

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.driver:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return self.gpus

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if index in self.broken:
            raise self.NVMLError("GPU is lost")
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return f"GPU-{handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        if handle in self.broken:
            raise self.NVMLError("GPU is lost")
        return SimpleNamespace(total=24 * GIB, used=self.used, free=24 * GIB - self.used)

    def nvmlDeviceGetComputeRunningProcesses(self, _: int) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in self.processes.items()]

    def nvmlDeviceGetGraphicsRunningProcesses(self, _: int) -> list[Any]:  # noqa: N802
        raise self.NVMLError_NotSupported("Not Supported")


def test_an_engine_holds_what_its_processes_hold_and_the_rest_is_foreign() -> None:
    nvml = FakeNvml(used=10 * GIB, processes={11: 4 * GIB, 12: 2 * GIB, 99: 3 * GIB})
    reading = NvmlDevice(nvml, 0).measure({"a#1": [10, 11], "b#1": [12]}, [])
    assert reading.engines == {"a#1": 4 * GIB, "b#1": 2 * GIB}
    assert (reading.total_bytes, reading.used_bytes, reading.foreign_bytes) == (24 * GIB, 10 * GIB, 4 * GIB)


@pytest.mark.parametrize("said", [{11: None}, {}, {4711: 6 * GIB}])
def test_an_engine_that_the_driver_says_nothing_of_keeps_its_prediction_and_is_not_foreign(
    said: dict[int, int | None],
) -> None:
    nvml = FakeNvml(used=2 * GIB)
    device = NvmlDevice(nvml, 0)
    assert device.measure({}, []).foreign_bytes == 2 * GIB
    nvml.used, nvml.processes = 8 * GIB, said
    reading = device.measure({"a#1": [11]}, [])
    assert reading.engines == {}
    assert (reading.used_bytes, reading.foreign_bytes) == (8 * GIB, 2 * GIB)


def test_foreign_memory_is_told_again_once_the_engine_shows() -> None:
    nvml = FakeNvml(used=8 * GIB)
    device = NvmlDevice(nvml, 0)
    device.measure({"a#1": [11]}, [])
    nvml.processes = {11: 5 * GIB}
    assert device.measure({"a#1": [11]}, []).foreign_bytes == 3 * GIB


def test_an_engine_without_a_process_hides_nobody() -> None:
    assert NvmlDevice(FakeNvml(used=GIB), 0).measure({"a#1": []}, []).foreign_bytes == GIB


def test_a_driver_that_stops_answering_is_an_os_error() -> None:
    nvml = FakeNvml()
    device = NvmlDevice(nvml, 0)
    nvml.broken.add(0)
    with pytest.raises(OSError, match="gpu0: GPU is lost"):
        device.measure({}, [])


def test_engines_are_tied_to_a_gpu_by_uuid() -> None:
    assert NvmlDevice(FakeNvml(gpus=2), 1).engine_env() == {"CUDA_VISIBLE_DEVICES": "GPU-1"}


def test_every_gpu_is_a_device_with_its_reserve() -> None:
    specs = [device.spec for device in nvidia_devices(GIB, FakeNvml(gpus=2))]
    assert [(spec.name, spec.kind, spec.capacity_bytes, spec.reserve_bytes) for spec in specs] == [
        ("gpu0", "nvidia", 24 * GIB, GIB),
        ("gpu1", "nvidia", 24 * GIB, GIB),
    ]


def test_a_lost_gpu_does_not_cost_the_others() -> None:
    nvml = FakeNvml(gpus=3)
    nvml.broken.add(1)
    assert [device.spec.name for device in nvidia_devices(0, nvml)] == ["gpu0", "gpu2"]


def test_without_a_driver_there_is_no_gpu() -> None:
    nvml = FakeNvml()
    nvml.driver = False
    assert nvidia_devices(0, nvml) == []


def test_without_the_library_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert nvidia_devices(0) == []
