"""Would more memory help? The same core on the same trace, on today's machine and on larger ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from scheduler.core import Core
from scheduler.model import DeviceSpec, ModelSpec, SchedulerSettings
from scheduler.simulate.contest import EDGE_S, percentile
from scheduler.simulate.run import Simulation
from scheduler.simulate.traces import Request

HOST = "host"  # the kind of device that is host memory


class Machine(msgspec.Struct, frozen=True):
    """A machine to try, and what to call it. `sleep_memory_bytes` of its host memory is for engines that sleep."""

    name: str
    devices: tuple[DeviceSpec, ...]
    sleep_memory_bytes: int = 0


class Forecast(msgspec.Struct, frozen=True):
    """How a trace went on one machine; seconds. On time is within the patience of the request's class."""

    machine: str
    requests: int
    on_time_share: float
    refused: int
    loads: int
    load_seconds: float
    wakes: int
    wake_seconds: float
    wait_p50_s: float
    wait_p99_s: float
    wait_worst_s: float


def variants(now: Machine, models: Sequence[ModelSpec], more_ram_bytes: int) -> list[Machine]:
    """The machine as it is, with one more of its largest GPU, and with more host memory for whoever can use it: engines
    that compute there, and engines that sleep there."""
    found = [now]
    gpus = [device for device in now.devices if device.kind != HOST]
    if gpus:
        largest = max(gpus, key=lambda device: device.capacity_bytes)
        another = msgspec.structs.replace(largest, name=f"{largest.name}+1")
        found.append(Machine(f"one more {largest.name}", (*now.devices, another), now.sleep_memory_bytes))
    more = more_ram(more_ram_bytes)
    hosts = {HOST} | {device.name for device in now.devices if device.kind == HOST}
    if any(model.device in hosts for model in models):
        grown = tuple(_grown(device, more_ram_bytes) if device.kind == HOST else device for device in now.devices)
        found.append(Machine(f"{more} for engines", grown, now.sleep_memory_bytes))
    if any(model.sleep_keeps_bytes is not None for model in models):
        found.append(Machine(f"{more} to sleep in", now.devices, now.sleep_memory_bytes + more_ram_bytes))
    return found


def more_ram(by: int) -> str:
    """What so many bytes more of it are called."""
    return f"{by / 1e9:.0f} GB more RAM"


def _grown(device: DeviceSpec, by: int) -> DeviceSpec:
    return msgspec.structs.replace(device, capacity_bytes=device.capacity_bytes + by)


def what_if(
    machine: Machine,
    models: Sequence[ModelSpec],
    settings: SchedulerSettings,
    requests: Sequence[Request],
    service_s: Callable[[Request], float],
) -> Forecast:
    """The default policy on this machine; each device loads by its own link."""
    settings = msgspec.structs.replace(settings, sleep_memory_bytes=machine.sleep_memory_bytes)
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
        wakes=outcome.wakes,
        wake_seconds=outcome.wake_seconds,
        wait_p50_s=percentile(served, 0.5) if served else 0.0,
        wait_p99_s=percentile(served, 0.99) if served else 0.0,
        wait_worst_s=served[-1] if served else 0.0,
    )
