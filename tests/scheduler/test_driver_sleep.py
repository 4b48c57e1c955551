"""The driver carries out sleep, wake and probe; leaks and corrupted wakes are injected, and every one is caught."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from scheduler.core import Core
from scheduler.devices.base import Reading
from scheduler.driver import Launch, Scheduler
from scheduler.engines.base import EngineExit
from scheduler.engines.sleeping import Said, SleepError
from scheduler.footprints import Footprints
from scheduler.learned import Learned
from scheduler.model import DeviceSpec, ModelSpec, Residency, SchedulerSettings, Ticket
from tests.fakes import until

MiB = 1 << 20


class Handle(msgspec.Struct):
    base_url: str


class Card:
    """A GPU of 1000 MiB, and engines that need no process. With `leaks` they say that they sleep and hold what they
    held, with `corrupts` they wake and say something else, with `stubborn` they refuse to sleep."""

    spec = DeviceSpec("gpu0", "nvidia", 1000 * MiB, frees_late=True)

    def __init__(self) -> None:
        self.on_exit: Callable[[str, str, Sequence[str]], None] = lambda *_: None
        self.held: dict[str, int] = {}
        self.leaks, self.corrupts, self.stubborn = False, False, False
        self.slept: set[str] = set()
        self.calls: list[str] = []
        self.fail: list[EngineExit] = []

    async def start(self, engine_id: str, *_: object, **__: Any) -> Handle:
        self.calls.append(f"start {engine_id}")
        if self.fail:
            raise self.fail.pop()
        self.held[engine_id] = 690 * MiB
        return Handle(f"http://{engine_id}")

    async def stop(self, engine_id: str, timeout_s: float) -> None:
        self.calls.append(f"{'stop' if timeout_s else 'kill'} {engine_id}")
        self.held.pop(engine_id, None)

    async def sleep(self, engine_id: str, _: object) -> None:
        self.calls.append(f"sleep {engine_id}")
        if self.stubborn:
            raise SleepError("/sleep answers 500")
        self.slept.add(engine_id)
        if not self.leaks:
            self.held[engine_id] = 40 * MiB

    async def wake(self, engine_id: str, _: object) -> None:
        self.calls.append(f"wake {engine_id}")
        self.held[engine_id] = 690 * MiB

    async def ask(self, engine_id: str, _: object) -> Said:
        return Said(" Milan" if self.corrupts and engine_id in self.slept else " Rome", -0.5)

    async def gone(self, engine_id: str, within_s: float) -> bool:
        return engine_id not in self.held

    def pids(self, engine_id: str) -> list[int]:
        return [1]

    def launcher_pids(self) -> list[int]:
        return []

    def measure(self, engines: Mapping[str, Sequence[int]], overhead: Sequence[int]) -> Reading:
        held = {engine: self.held[engine] for engine in engines if engine in self.held}
        return Reading(1000 * MiB, sum(self.held.values()), 0, held)

    def engine_env(self) -> dict[str, str]:
        return {}


Rig = tuple[Scheduler, Card]


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    card = Card()
    models = [
        ModelSpec(name, 700 * MiB, "nvidia", sleep_keeps_bytes=50 * MiB, sleep_host_bytes=600 * MiB, revision=name)
        for name in "ab"
    ]
    settings = SchedulerSettings(sleep_memory_bytes=1200 * MiB, fall_limit_s=0.02, pressure_threshold=1.0)
    core = Core([card.spec], models, settings)
    launch = Launch(kind=None, start_timeout_s=1.0, stop_timeout_s=1.0)  # type: ignore[arg-type]
    scheduler = Scheduler(core, [card], card, {"a": launch, "b": launch}, learned=Learned(tmp_path))
    running = asyncio.create_task(scheduler.run())
    yield scheduler, card
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    core.check()


async def serve(scheduler: Scheduler, model: str) -> str:
    with scheduler.lease(Ticket(scheduler.new_ticket_id(), model)) as waiting:
        return (await waiting.granted()).engine_id


async def test_models_trade_places_asleep_and_awake(rig: Rig) -> None:
    scheduler, card = rig
    assert [await serve(scheduler, model) for model in "abab"] == ["a#1", "b#2", "a#1", "b#2"]
    assert card.calls == ["start a#1", "sleep a#1", "start b#2", "sleep b#2", "wake a#1", "sleep a#1", "wake b#2"]
    assert [decision.what for decision in scheduler.decisions if decision.what.startswith(("sleep", "wake"))] == [
        "sleep a#1 (evicted)", "sleep b#2 (evicted)", "wake a#1", "sleep a#1 (evicted)", "wake b#2"
    ]  # fmt: skip


async def test_a_sleep_that_leaks_is_caught_and_ends_in_a_kill(rig: Rig) -> None:
    scheduler, card = rig
    card.leaks = True
    await serve(scheduler, "a")
    assert await serve(scheduler, "b") == "b#2"
    assert card.calls == ["start a#1", "sleep a#1", "sleep a#1", "kill a#1", "start b#2"]
    card.leaks = False
    assert await serve(scheduler, "a") == "a#3"  # and the next request works


async def test_a_corrupted_wake_is_caught_before_anybody_is_let_in(rig: Rig) -> None:
    scheduler, card = rig
    card.corrupts = True
    await serve(scheduler, "a")
    await serve(scheduler, "b")
    assert await serve(scheduler, "a") == "a#3"
    assert card.calls[-3:] == ["wake a#1", "stop a#1", "start a#3"]
    assert any("it said ' Rome' before it slept" in decision.why for decision in scheduler.decisions)


async def test_an_engine_that_will_not_sleep_is_stopped(rig: Rig) -> None:
    scheduler, card = rig
    card.stubborn = True
    await serve(scheduler, "a")
    assert await serve(scheduler, "b") == "b#2"
    assert card.calls == ["start a#1", "sleep a#1", "stop a#1", "start b#2"]


async def test_want_of_memory_at_a_start_is_tried_once_more_and_the_caller_never_knows(rig: Rig) -> None:
    scheduler, card = rig
    card.fail = [EngineExit("CUDA out of memory", [], out_of_memory=True)]
    assert await serve(scheduler, "a") == "a#2"
    assert scheduler.core.models["a"].state is Residency.READY


async def test_what_was_learned_is_written_down(rig: Rig, tmp_path: Path) -> None:
    scheduler, _ = rig
    await serve(scheduler, "a")
    scheduler._measure_soon.set()
    await until((tmp_path / "footprints.json").exists)
    assert Footprints.of(Learned(tmp_path).footprints.load()).p90("a@a", "nvidia") == 690 * MiB


async def test_the_next_run_expects_loads_and_wakes_as_they_were(rig: Rig, tmp_path: Path) -> None:
    scheduler, _ = rig
    for model in "aba":
        await serve(scheduler, model)
    scheduler._measure_soon.set()
    await until((tmp_path / "times.json").exists)
    spec = scheduler.core.models["a"].spec
    assert (spec.load_estimate_s, spec.wake_estimate_s) == (30.0, None)
    expected = Learned(tmp_path).expect(spec)
    assert expected.load_estimate_s < 1.0
    assert expected.wake_estimate_s == scheduler.core.models["a"].wake_s
    assert Learned(tmp_path).expect(scheduler.core.models["b"].spec).wake_estimate_s is None
