"""A scheduler's core with a clock in the test's hand: every step is checked for what must always hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from scheduler.commands import Admit, Command, Load, Probe, Refuse, Sleep, Stop, Wake, WakeAt
from scheduler.core import Core
from scheduler.events import (
    Arrived,
    Cancelled,
    EngineFailed,
    EngineReady,
    EngineStopped,
    Event,
    Finished,
    MemoryMeasured,
    Tick,
)
from scheduler.model import DeviceSpec, LatencyClass, ModelSpec, SchedulerSettings, Ticket

MiB = 1 << 20


class World:
    """Feeds events, keeps the time, and forgets WakeAt unless asked: tests read as *given these events, exactly these
    commands*."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.now = 0.0
        self.wake_at: float | None = None
        self._tickets = 0

    def step(self, event: Event) -> list[Command]:
        commands = self.core.step(event, self.now)
        self.core.check()
        return self._without_wakes(commands)

    def _without_wakes(self, commands: list[Command]) -> list[Command]:
        for command in commands:
            if isinstance(command, WakeAt):
                self.wake_at = command.at_s
        return [command for command in commands if not isinstance(command, WakeAt)]

    def at(self, now: float) -> World:
        self.now = now
        return self

    def arrive(
        self,
        model: str,
        latency_class: LatencyClass = LatencyClass.STANDARD,
        *,
        tokens: int = 1,
        deadline_s: float | None = None,
    ) -> tuple[int, list[Command]]:
        self._tickets += 1
        ticket = Ticket(self._tickets, model, latency_class, weight_tokens=tokens, deadline_s=deadline_s)
        return ticket.id, self.step(Arrived(ticket))

    def cancel(self, ticket_id: int) -> list[Command]:
        return self.step(Cancelled(ticket_id))

    def finish(self, ticket_id: int) -> list[Command]:
        return self.step(Finished(ticket_id))

    def tick(self, now: float) -> list[Command]:
        return self.at(now).step(Tick())

    def ready(self, load: Command, seconds: float = 3.0) -> list[Command]:
        assert isinstance(load, Load), load
        self.now += seconds
        return self.step(EngineReady(load.engine_id, load.model, load.device, seconds))

    def failed(self, engine_id: str, reason: str = "it broke") -> list[Command]:
        return self.step(EngineFailed(engine_id, reason))

    def stopped(self, stop: Command) -> list[Command]:
        assert isinstance(stop, Stop), stop
        return self.step(EngineStopped(stop.engine_id))

    def measured(self, foreign: int = 0, engines: dict[str, int] | None = None, device: str = "ram") -> list[Command]:
        return self.step(MemoryMeasured(device, 0, 0, foreign, engines or {}))

    def resident(self, model: str) -> str:
        """Bring a model in through the front door and leave it idle; returns its engine's id."""
        ticket, (load,) = self.arrive(model)
        (admit,) = self.ready(load)
        assert isinstance(admit, Admit)
        self.finish(ticket)
        return admit.engine_id


MakeWorld = Callable[..., World]


@pytest.fixture
def world() -> Iterator[MakeWorld]:
    """world(a=700, b=700, memory=1500) makes a core over models of so many MiB on one device of so many."""
    made: list[World] = []

    def make(memory: int = 1500, settings: SchedulerSettings | None = None, **models: int | ModelSpec) -> World:
        specs = [spec(name, size) if isinstance(size, int) else size for name, size in models.items()]
        made.append(World(Core([DeviceSpec("ram", "host", memory * MiB)], specs, settings)))
        return made[-1]

    yield make
    for each in made:
        each.core.check()


def spec(name: str, mib: int, **settings: object) -> ModelSpec:
    return ModelSpec(name, mib * MiB, "host", **settings)  # type: ignore[arg-type]


def kinds(commands: list[Command]) -> list[str]:
    """Command types and whom they concern, for short assertions."""
    out = []
    for command in commands:
        match command:
            case Admit(ticket_id):
                out.append(f"admit {ticket_id}")
            case Refuse(ticket_id, code):
                out.append(f"refuse {ticket_id} {code}")
            case Load(_, model):
                out.append(f"load {model}")
            case Stop(engine_id, force=force):
                out.append(f"{'kill' if force else 'stop'} {engine_id.partition('#')[0]}")
            case Sleep(engine_id) | Wake(engine_id) | Probe(engine_id):
                out.append(f"{type(command).__name__.lower()} {engine_id.partition('#')[0]}")
            case _:
                out.append(repr(command))
    return out
