"""Would more memory help? The same core on the same trace, on today's machine and on larger ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from scheduler.core import Core
from scheduler.model import DeviceSpec, ModelSpec, SchedulerSettings
from scheduler.simulate.contest import EDGE_S, percentile
from scheduler.simulate.run import Simulation
from scheduler.simulate.traces import Request


class Machine(msgspec.Struct, frozen=True):
    """A machine to try, and what to call it."""

    name: str
    devices: tuple[DeviceSpec, ...]


class Forecast(msgspec.Struct, frozen=True):
    """How a trace went on one machine; seconds. On time is within the patience of the request's class."""

    machine: str
    requests: int
    on_time_share: float
    refused: int
    loads: int
    load_seconds: float
    wait_p50_s: float
    wait_p99_s: float
    wait_worst_s: float


def variants(devices: Sequence[DeviceSpec], more_ram_bytes: int) -> list[Machine]:
    """The machine as it is, with one more of its largest GPU, and with more host memory, as far as it has either."""
    found = [Machine("as it is", tuple(devices))]
    gpus = [device for device in devices if device.kind != "host"]
    if gpus:
        largest = max(gpus, key=lambda device: device.capacity_bytes)
        another = msgspec.structs.replace(largest, name=f"{largest.name}+1")
        found.append(Machine(f"one more {largest.name}", (*devices, another)))
    if any(device.kind == "host" for device in devices):
        grown = tuple(
            msgspec.structs.replace(device, capacity_bytes=device.capacity_bytes + more_ram_bytes)
            if device.kind == "host"
            else device
            for device in devices
        )
        found.append(Machine(f"{more_ram_bytes / 1e9:.0f} GB more RAM", grown))
    return found


def what_if(
    machine: Machine,
    models: Sequence[ModelSpec],
    settings: SchedulerSettings,
    requests: Sequence[Request],
    service_s: Callable[[Request], float],
) -> Forecast:
    """The default policy on this machine; each device loads by its own link."""
    core = Core(machine.devices, models, settings)
    outcome = Simulation(core, service_s, requests, one_link=False).run()
    waits = sorted(outcome.waits_s)
    served = [wait for wait in waits if wait < float("inf")]
    on_time = sum(
        wait <= settings.patience_s[request.latency_class] + EDGE_S
        for request, wait in zip(requests, outcome.waits_s, strict=True)
    )
    return Forecast(
        machine=machine.name,
        requests=len(waits),
        on_time_share=on_time / len(waits),
        refused=len(waits) - len(served),
        loads=outcome.loads,
        load_seconds=outcome.load_seconds,
        wait_p50_s=percentile(served, 0.5) if served else 0.0,
        wait_p99_s=percentile(served, 0.99) if served else 0.0,
        wait_worst_s=served[-1] if served else 0.0,
    )
