from __future__ import annotations

from scheduler.devices.discover import discover
from scheduler.devices.simulated import SimulatedDevice

MIB = 1 << 20


def test_devices_come_as_asked_for() -> None:
    devices = discover(host_budget_bytes=64 * MIB, use_nvidia=False, simulated={"sim0": 8 * MIB, "sim1": 4 * MIB})
    assert [(device.spec.name, device.spec.kind, device.spec.capacity_bytes) for device in devices] == [
        ("host", "host", 64 * MIB),
        ("sim0", "simulated", 8 * MIB),
        ("sim1", "simulated", 4 * MIB),
    ]


def test_nothing_asked_for_is_nothing() -> None:
    assert discover(use_host=False, use_nvidia=False) == []


def test_a_simulated_device_holds_what_its_running_engines_declared() -> None:
    device = SimulatedDevice("sim0", 100, {"a#1": 30, "b#1": 20}.get)
    reading = device.measure({"a#1": [1], "b#1": [], "c#1": [2]}, [])
    assert (reading.total_bytes, reading.used_bytes, reading.foreign_bytes) == (100, 30, 0)
    assert reading.engines == {"a#1": 30}


def test_a_simulated_device_that_knows_no_declarations_leaves_the_ledger_its_predictions() -> None:
    assert SimulatedDevice("sim0", 100).measure({"a#1": [1]}, []).engines == {}
