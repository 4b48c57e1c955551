"""A thousand random lives of a machine: starts, stops, sleeps, leaks, strangers. No promise is more than there is."""

from __future__ import annotations

import random

import pytest

from scheduler.commands import Admit, Command, Load, Probe, Refuse, Sleep, Stop, Wake, WakeAt
from scheduler.core import Core
from scheduler.events import (
    Arrived,
    Asleep,
    EngineFailed,
    EngineReady,
    EngineStopped,
    Event,
    Finished,
    MemoryMeasured,
    ProbeAnswered,
    Tick,
)
from scheduler.model import DeviceSpec, ModelSpec, Residency, SchedulerSettings, Ticket
from scheduler.policies.slack import Slack

SEQUENCES, BATCHES = 1000, 20
EVENTS = 120
SIZE = 1000
SETTINGS = SchedulerSettings(sleep_memory_bytes=900, pressure_threshold=1.0, anticipate=True)


class Machine:
    """Two GPUs in bytes of its own, engines that obey at random, and what they truly hold."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.devices = [DeviceSpec(f"gpu{n}", "nvidia", SIZE, 50, frees_late=True) for n in range(2)]
        self.specs = {
            f"m{n}": ModelSpec(
                f"m{n}",
                self.rng.choice((200, 400, 700)),
                "nvidia",
                devices_needed=2 if n == 0 else 1,
                sleep_keeps_bytes=None if n == 5 else 30,
                sleep_host_bytes=300,
                revision=f"m{n}",
                stated=True,
            )
            for n in range(6)
        }
        self.core = Core(self.devices, self.specs.values(), SETTINGS, ordering=Slack())
        for model in self.core.models.values():
            model.demand.count = self.rng.choice((0, 50))  # asked for until just now, and so worth a guess
        self.now = 0.0
        self.held: dict[str, dict[str, int]] = {}  # by engine, by device
        self.lost = dict.fromkeys((each.name for each in self.devices), 0)
        self.strangers = dict.fromkeys(self.lost, 0)
        self.answers: list[Event] = []
        self.loads: dict[str, Load] = {}
        self.running: list[int] = []
        self.corrupted: set[str] = set()
        self.slipped: list[str] = []  # corrupted engines that were let serve
        self.caught = 0
        self.tickets = 0
        self.known: dict[str, int] = dict.fromkeys(self.lost, 0)

    def feed(self, event: Event) -> None:
        before = {ledger.spec.name: ledger.free for ledger in self.core.devices.values()}
        commands = self.core.step(event, self.now)
        self.core.check()
        for command in commands:
            self.obey(command, before)
        for model in self.core.models.values():
            if model.state is Residency.READY and model.engine is not None and model.engine.id in self.corrupted:
                self.slipped.append(model.engine.id)
        assert self.core.books.sleep_memory.held <= SETTINGS.sleep_memory_bytes

    def obey(self, command: Command, before: dict[str, int]) -> None:
        match command:
            case Load(engine_id, name_of_model, device, _, partners):
                for name in (device, *partners):
                    # promised, known foreign and reserved: all of it fits, at the moment of the promise
                    ledger = self.core.devices[name]
                    assert ledger.held + self.known[name] + 50 <= SIZE, (
                        f"{name_of_model} was promised what is not there"
                    )
                    assert ledger.starting == engine_id
                self.loads[engine_id] = command
                self.answers.append(EngineReady(engine_id, name_of_model, device, 1.0, partners=partners))
            case Wake(engine_id):
                load = self.loads[engine_id]
                for name in (load.device, *load.partners):
                    assert self.core.devices[name].held + self.known[name] + 50 <= SIZE
                self.answers.append(EngineReady(engine_id, load.model, load.device, 0.1))
            case Probe(engine_id):
                model = self.core.books.by_engine(engine_id)
                if model is not None and model.state is Residency.WAKING and self.rng.random() < 0.5:
                    self.corrupted.add(engine_id)
                token = self.rng.choice(" xyz") if engine_id in self.corrupted else " Rome"
                self.answers.append(ProbeAnswered(engine_id, token, -0.5))
            case Sleep(engine_id):
                self.answers.append(Asleep(engine_id, "busy" if self.rng.random() < 0.1 else ""))
            case Stop(engine_id):
                self.caught += engine_id in self.corrupted
                self.answers.append(EngineStopped(engine_id))
            case Admit(ticket_id):
                self.running.append(ticket_id)
            case Refuse() | WakeAt():
                pass

    def answer(self) -> None:
        if not self.answers:
            return
        event = self.answers.pop(self.rng.randrange(len(self.answers)))
        engine_id = event.engine_id  # type: ignore[union-attr]
        if isinstance(event, EngineReady):
            load = self.loads[engine_id]
            size = int(self.specs[event.model].memory_bytes * self.rng.uniform(0.7, 1.0))
            if self.core.books.by_engine(engine_id) is not None:
                self.held[engine_id] = dict.fromkeys((load.device, *load.partners), size)
        elif isinstance(event, Asleep) and not event.error and engine_id in self.held:
            if self.rng.random() < 0.7:  # else it leaks: it says that it sleeps, and holds what it held
                self.held[engine_id] = dict.fromkeys(self.held[engine_id], 30)
        elif isinstance(event, EngineStopped):
            for name, size in self.held.pop(engine_id, {}).items():
                self.lost[name] += size if self.rng.random() < 0.15 else 0
        self.feed(event)

    def read(self) -> None:
        for name in self.lost:
            engines = {engine: sizes[name] for engine, sizes in self.held.items() if name in sizes}
            foreign = self.lost[name] + self.strangers[name]
            self.known[name] = foreign
            self.feed(MemoryMeasured(name, SIZE, sum(engines.values()) + foreign, foreign, engines))

    def play(self) -> None:
        self.now += self.rng.choice((0.0, 0.1, 1.0, 6.0))
        move = self.rng.random()
        if move < 0.15:
            self.tickets += 1
            self.feed(Arrived(Ticket(self.tickets, self.rng.choice(sorted(self.specs)))))
        elif move < 0.45:
            self.answer()
        elif move < 0.7 and self.running:
            self.feed(Finished(self.running.pop(self.rng.randrange(len(self.running)))))
        elif move < 0.92:
            self.read()
        elif move < 0.94:
            name = self.rng.choice(sorted(self.lost))
            self.strangers[name] = self.rng.choice((0, 0, 100, 500))
            self.lost[name] = self.lost[name] if self.rng.random() < 0.5 else 0
        elif move < 0.95 and self.held:
            engine_id = self.rng.choice(sorted(self.held))
            del self.held[engine_id]
            self.feed(EngineFailed(engine_id, "killed"))
        else:
            self.feed(Tick())


@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_lives_promise_no_more_than_there_is_and_let_no_corrupted_engine_serve(batch: int) -> None:
    caught = 0
    for seed in range(batch, SEQUENCES, BATCHES):
        machine = Machine(seed)
        for _ in range(EVENTS):
            machine.play()
        assert machine.slipped == []
        caught += machine.caught
    assert caught > 0
