"""CPU of the scheduler's core: the hot pair, and events with many models and many waiting tickets.

    python -m loadtests.bench_core

Prints; asserts nothing. Times are the best of several runs: noise only ever adds.
"""

from __future__ import annotations

import random
import time
from collections import deque

from scheduler.commands import Admit, Load, Stop
from scheduler.core import Core
from scheduler.events import Arrived, Cancelled, EngineReady, EngineStopped, Event, Finished, Tick
from scheduler.model import DeviceSpec, ModelSpec, SchedulerSettings, Ticket

GiB = 1 << 30
PAIRS = 100_000
EVENTS = 20_000
WAITING = 10_000
RUNS = 3
STEP_S = 0.001  # of the clock between two events


def core_with(models: int) -> Core:
    specs = [
        ModelSpec(f"m{i}", (5 + i % 8 * 4) * GiB, "gpu", max_sequences=64, max_queue=1 << 20, load_estimate_s=3.0)
        for i in range(models)
    ]
    settings = SchedulerSettings(max_waiting=1 << 20, pressure_threshold=1.0, max_wait_s=1e9)
    return Core([DeviceSpec("gpu0", "gpu", 144 * GiB)], specs, settings)


def hot_pair() -> float:
    """Seconds of one arrival that is admitted at once and its finish, other requests in flight."""
    core = core_with(1)
    (load,) = (c for c in core.step(Arrived(Ticket(0, "m0")), 0.0) if isinstance(c, Load))
    core.step(EngineReady(load.engine_id, "m0", "gpu0", 3.0), 3.0)
    tickets = [Ticket(i, "m0") for i in range(1, PAIRS + 1)]
    arrive, finish, now = core.arrive, core.finish, 4.0
    begun = time.perf_counter()
    for ticket in tickets:
        arrive(ticket, now)
        finish(ticket.id, now)
    return (time.perf_counter() - begun) / PAIRS


class Life:
    """Arrivals, ends, cancels, loads and stops, with some ten thousand waiting all the time."""

    def __init__(self, models: int) -> None:
        self.core = core_with(models)
        self.rng = random.Random(1)
        self.models = models
        self.now = 0.0
        self.tickets = 0
        self.running: deque[int] = deque()
        self.engines: deque[tuple[float, Event]] = deque()

    def feed(self, event: Event) -> None:
        for command in self.core.step(event, self.now):
            match command:
                case Admit(ticket_id):
                    self.running.append(ticket_id)
                case Load(engine_id, model, device):
                    self.engines.append((self.now + 3.0, EngineReady(engine_id, model, device, 3.0)))
                case Stop(engine_id):
                    self.engines.append((self.now, EngineStopped(engine_id)))

    def arrive(self) -> None:
        self.tickets += 1
        self.feed(Arrived(Ticket(self.tickets, f"m{self.rng.randrange(self.models)}")))

    def fill(self) -> None:
        while sum(self.core.waiting_by_class()) < WAITING:
            for _ in range(200):
                self.now += STEP_S
                self.arrive()

    def step(self) -> None:
        self.now += STEP_S
        if self.engines and self.engines[0][0] <= self.now:
            self.feed(self.engines.popleft()[1])
            return
        turn = self.rng.random()
        if turn < 0.45:
            self.arrive()
        elif turn < 0.85 and self.running:
            self.feed(Finished(self.running.popleft()))
        elif turn < 0.99:
            self.feed(Cancelled(self.rng.randrange(1, self.tickets + 1)))
        else:
            self.feed(Tick())


def events_a_second(models: int) -> tuple[float, int]:
    life = Life(models)
    life.fill()
    begun = time.perf_counter()
    for _ in range(EVENTS):
        life.step()
    return EVENTS / (time.perf_counter() - begun), sum(life.core.waiting_by_class())


def main() -> None:
    print(f"arrive admitted at once + finish: {min(hot_pair() for _ in range(RUNS)) * 1e6:.2f} us")
    for models in (100, 1_000):
        rate, waiting = max(events_a_second(models) for _ in range(RUNS))
        print(f"{models} models, {waiting} waiting: {rate:,.0f} events/s")


if __name__ == "__main__":
    main()
