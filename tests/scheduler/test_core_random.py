"""A long random life: arrivals, cancels, deaths, foreign memory, late and doubled news. Nothing lost, nothing hangs."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from scheduler.commands import Admit, Command, Load, Probe, Refuse, Sleep, Stop, Wake, WakeAt
from scheduler.core import Core
from scheduler.events import (
    Arrived,
    Asleep,
    Cancelled,
    EngineFailed,
    EngineReady,
    EngineStopped,
    Event,
    Finished,
    HandOverAsked,
    HandOverOff,
    LoadAsked,
    LoadProgress,
    MemoryMeasured,
    ProbeAnswered,
    Tick,
    UnloadAsked,
)
from scheduler.model import DeviceSpec, LatencyClass, ModelSpec, SchedulerSettings, Ticket

MiB = 1 << 20
KEEPS = 20 * MiB  # of a sleeper, on its device


class Chaos:
    """Plays the engines, the clients and the machine at random; keeps its own books and compares."""

    def __init__(self, seed: int, *, anticipate: bool = True) -> None:
        self.rng = random.Random(seed)
        models = [
            ModelSpec(
                f"m{i}",
                self.rng.choice((200, 400, 700, 900)) * MiB,
                self.rng.choice(("host", "host", "nvidia")),
                max_sequences=self.rng.choice((1, 2, 8)),
                kv_tokens=self.rng.choice((50, 1000)),
                pinned=i == 0,
                ttl_s=self.rng.choice((None, 20.0)),
                max_queue=20,
                sleep_keeps_bytes=self.rng.choice((None, KEEPS)),
                sleep_host_bytes=300 * MiB,
            )
            for i in range(8)
        ]
        devices = [
            DeviceSpec("ram", "host", 1500 * MiB),
            *(DeviceSpec(f"gpu{i}", "nvidia", 1000 * MiB) for i in range(2)),
        ]
        settings = SchedulerSettings(
            pressure_threshold=0.9, max_wait_s=120.0, sleep_memory_bytes=700 * MiB, anticipate=anticipate
        )
        self.core = Core(devices, models, settings)
        self.now = 0.0
        self.names = [m.name for m in models]
        self.waiting: set[int] = set()
        self.running: set[int] = set()
        self.answered = 0
        self.tickets = 0
        self.loading: dict[str, Load] = {}
        self.alive: dict[str, Load] = {}
        self.stopping: list[str] = []
        self.dozing: dict[str, Load] = {}  # falling asleep, or asleep
        self.news: list[Asleep | EngineReady | ProbeAnswered] = []  # what engines are about to say of sleep

    def feed(self, event: Event) -> None:
        for command in self.core.step(event, self.now):
            self._obey(command)

    def _obey(self, command: Command) -> None:
        match command:
            case Admit(ticket_id, engine_id):
                assert engine_id in self.alive, "admitted to an engine that is not there"
                self.waiting.remove(ticket_id)
                self.running.add(ticket_id)
            case Refuse(ticket_id, _, reason):
                assert reason
                self.waiting.remove(ticket_id)
                self.answered += 1
            case Load(engine_id, _, device):
                assert not any(load.device == device for load in self.loading.values()), "two starts on one device"
                self.loading[engine_id] = command
            case Stop(engine_id):
                self._lost(engine_id)
                self.stopping.append(engine_id)
            case Sleep(engine_id):
                # a second time, of one that says that it sleeps and keeps its memory
                self.dozing[engine_id] = self.alive.pop(engine_id, None) or self.dozing[engine_id]
                self.news.append(Asleep(engine_id, "busy" if self.rng.random() < 0.05 else ""))
            case Wake(engine_id):
                load = self.dozing[engine_id]
                self.news.append(EngineReady(engine_id, load.model, load.device, 0.3))
            case Probe(engine_id):
                wrong = self.rng.random() < 0.05
                self.news.append(ProbeAnswered(engine_id, " Milan" if wrong else " Rome", -0.5))
            case WakeAt():
                pass

    def _lost(self, engine_id: str) -> None:
        for kept in (self.loading, self.alive, self.dozing):
            kept.pop(engine_id, None)

    def play(self) -> None:
        self.now += self.rng.choice((0.0, 0.01, 0.5, 3.0)) if self.rng.random() < 0.999 else 1000.0
        moves: list[tuple[int, Callable[[], None]]] = [
            (40, self.arrive), (30, self.finish), (6, self.cancel), (12, self.ready), (12, self.stopped),
            (2, self.fail), (3, self.measure), (5, self.tick), (1, self.operate), (2, self.noise),
            (1, self.pause), (1, self.lull), (20, self.say),
        ]  # fmt: skip
        (move,) = self.rng.choices([m for _, m in moves], [w for w, _ in moves])
        move()

    def arrive(self) -> None:
        self.tickets += 1
        deadline = self.now + self.rng.uniform(-1, 60) if self.rng.random() < 0.1 else None
        session = self.rng.choice(("", "loop", "agent"))
        ticket = Ticket(
            self.tickets,
            self.names[1] if session == "loop" and self.rng.random() < 0.8 else self.rng.choice(self.names),
            self.rng.choice(list(LatencyClass)),
            weight_tokens=self.rng.choice((1, 30, 5000)),
            deadline_s=deadline,
            session=session,
        )
        self.waiting.add(ticket.id)
        self.feed(Arrived(ticket))

    def finish(self) -> None:
        if self.running:
            ticket = self.rng.choice(sorted(self.running))
            self.running.remove(ticket)
            self.answered += 1
            self.feed(Finished(ticket))

    def lull(self) -> None:
        """Nobody comes for a while: the engines obey, requests end, and there is time to think ahead."""
        for _ in range(self.rng.choice((5, 40))):
            self.now += 0.5
            for move in (self.finish, self.ready, self.stopped, self.say, self.tick):
                move()

    def cancel(self) -> None:
        if self.waiting:
            ticket = self.rng.choice(sorted(self.waiting))
            self.waiting.remove(ticket)
            self.answered += 1
            self.feed(Cancelled(ticket))

    def ready(self) -> None:
        if self.loading:
            engine_id = self.rng.choice(sorted(self.loading))
            load = self.loading.pop(engine_id)
            self.alive[engine_id] = load
            self.feed(EngineReady(engine_id, load.model, load.device, 3.0))

    def stopped(self) -> None:
        if self.stopping:
            self.feed(EngineStopped(self.stopping.pop(self.rng.randrange(len(self.stopping)))))

    def say(self) -> None:
        """An engine says that it sleeps, that it is awake, or what it was asked; late, where it has gone since."""
        if self.news:
            event = self.news.pop(self.rng.randrange(len(self.news)))
            if isinstance(event, EngineReady) and event.engine_id in self.dozing:
                self.alive[event.engine_id] = self.dozing.pop(event.engine_id)
            self.feed(event)

    def fail(self) -> None:
        engines = sorted(self.loading | self.alive | self.dozing)
        if engines:
            engine_id = self.rng.choice(engines)
            self._lost(engine_id)
            self.feed(EngineFailed(engine_id, "killed"))

    def measure(self) -> None:
        device = self.rng.choice(("ram", "gpu0", "gpu1"))
        engines = {e: self.rng.randrange(1, 1000) * MiB for e, load in self.alive.items() if load.device == device}
        # one sleeper in ten keeps what it held
        asleep = (e for e, load in self.dozing.items() if load.device == device)
        engines |= {e: KEEPS if self.rng.random() < 0.9 else 500 * MiB for e in asleep}
        self.feed(MemoryMeasured(device, 0, 0, self.rng.choice((0, 0, 100, 800)) * MiB, engines, 10 * MiB))

    def tick(self) -> None:
        self.feed(Tick())

    def operate(self) -> None:
        self.feed(self.rng.choice((LoadAsked, UnloadAsked))(self.rng.choice(self.names)))

    def pause(self) -> None:
        """A hand-over is asked for, and called off some time later."""
        self.feed(self.rng.choice((HandOverAsked, HandOverOff, HandOverOff))())

    def noise(self) -> None:
        self.feed(
            self.rng.choice(
                (
                    Finished(10**9),
                    Cancelled(10**9),
                    EngineStopped("x#1"),
                    EngineFailed("x#1", ""),
                    LoadProgress("x#1", 0.5, ""),
                )
            )
        )

    def calm_down(self) -> None:
        """Engines obey, clients finish, strangers leave: everybody who waits must be answered."""
        self.feed(HandOverOff())
        for device in ("ram", "gpu0", "gpu1"):
            self.feed(MemoryMeasured(device, 0, 0, 0, {}))
        for _ in range(2000):
            if not (self.waiting or self.running):
                return
            self.now += 1.0
            self.tick()
            self.ready()
            self.stopped()
            self.say()
            self.finish()
        raise AssertionError(f"still waiting after a long calm: {self.waiting}, {self.core.models}")


@pytest.mark.parametrize("anticipate", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_nothing_is_lost_whatever_happens(seed: int, anticipate: bool) -> None:
    chaos = Chaos(seed, anticipate=anticipate)
    for _ in range(1500):
        chaos.play()
        chaos.core.check()
    chaos.calm_down()
    assert chaos.answered == chaos.tickets
