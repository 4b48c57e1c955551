"""Which machines are tried beside the one that is there."""

from __future__ import annotations

from scheduler.model import DeviceSpec, ModelSpec
from scheduler.simulate.whatif import Machine, variants

GB = 10**9
GPU = DeviceSpec("gpu0", "nvidia", 24 * GB)
RAM = DeviceSpec("ram", "host", 16 * GB)
ON_CPU = ModelSpec("small", 4 * GB, "host")
SLEEPS = ModelSpec("large", 20 * GB, "nvidia", sleep_keeps_bytes=GB, sleep_host_bytes=16 * GB)
STAYS = ModelSpec("plain", 20 * GB, "nvidia")


def tried(*models: ModelSpec, sleep_memory: int = 0) -> dict[str, Machine]:
    now = Machine("as it is", (GPU, RAM), sleep_memory)
    return {machine.name: machine for machine in variants(now, models, 32 * GB)}


def test_one_more_of_the_largest_gpu_keeps_what_there_is() -> None:
    more = tried(STAYS, sleep_memory=5 * GB)["one more gpu0"]
    assert more.devices == (GPU, RAM, DeviceSpec("gpu0+1", "nvidia", 24 * GB))
    assert more.sleep_memory_bytes == 5 * GB


def test_more_ram_goes_to_whoever_can_use_it() -> None:
    assert not any("RAM" in name for name in tried(STAYS))
    for_engines = tried(ON_CPU, STAYS)["32 GB more RAM for engines"]
    assert [device.capacity_bytes for device in for_engines.devices] == [24 * GB, 48 * GB]
    both = tried(ON_CPU, SLEEPS, sleep_memory=8 * GB)
    assert both["32 GB more RAM for engines"].sleep_memory_bytes == 8 * GB
    assert both["32 GB more RAM to sleep in"] == Machine("32 GB more RAM to sleep in", (GPU, RAM), 40 * GB)


def test_a_model_bound_to_the_host_device_by_name_computes_there_too() -> None:
    assert "32 GB more RAM for engines" in tried(ModelSpec("bound", 4 * GB, "ram"))
