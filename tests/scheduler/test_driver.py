"""The asyncio shell: leases, cancellation, engines that fail or die, and no lease lost on any way out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any
from unittest.mock import Mock

import msgspec
import pytest

from scheduler import lifecycle
from scheduler.core import Core
from scheduler.devices.base import Reading
from scheduler.driver import Launch, Refused, Scheduler
from scheduler.engines.base import EngineExit, Progress
from scheduler.events import ConfigChanged, EngineReady, MemoryMeasured
from scheduler.model import DeviceSpec, ModelSpec, RefusalCode, Residency, SchedulerSettings, Ticket
from tests.fakes import until
from tests.scheduler.devices.test_reader import NumberedDevice

MiB = 1 << 20


class Handle(msgspec.Struct):
    base_url: str


class FakeEngines:
    """Engines without processes: a start waits for `let[engine_id]`, which holds None or the error to raise."""

    def __init__(self) -> None:
        self.on_exit: Callable[[str, str, Sequence[str]], None] = lambda *_: None
        self.started: list[str] = []
        self.stopped: list[str] = []
        self.let: dict[str, asyncio.Future[None]] = {}
        self.progress: dict[str, Callable[[Progress], None]] = {}
        self.at_once = True

    async def start(
        self, engine_id: str, model: str, kind: object, device_env: Mapping[str, str], **how: Any
    ) -> Handle:
        self.started.append(engine_id)
        self.progress[engine_id] = how["on_progress"]
        self.let[engine_id] = asyncio.get_running_loop().create_future()
        if self.at_once:
            self.let[engine_id].set_result(None)
        await self.let[engine_id]
        return Handle(f"http://{engine_id}")

    async def stop(self, engine_id: str, timeout_s: float) -> None:
        self.stopped.append(engine_id)

    async def gone(self, engine_id: str, within_s: float) -> bool:
        return engine_id not in self.let

    def pids(self, engine_id: str) -> list[int]:
        return []

    def launcher_pids(self) -> list[int]:
        return []


class FakeDevice:
    spec = DeviceSpec("ram", "host", 1000 * MiB)

    def measure(self, engines: Mapping[str, Sequence[int]], overhead: Sequence[int]) -> Reading:
        return Reading(1000 * MiB, 0, 0, dict.fromkeys(engines, 500 * MiB))

    def engine_env(self) -> dict[str, str]:
        return {}


@pytest.fixture
async def rig() -> AsyncIterator[tuple[Scheduler, FakeEngines]]:
    engines = FakeEngines()
    models = [ModelSpec(name, 700 * MiB, "host", max_sequences=2) for name in "ab"]
    core = Core([FakeDevice.spec], models, SchedulerSettings())
    launch = Launch(kind=None, start_timeout_s=1.0, stop_timeout_s=1.0)  # type: ignore[arg-type]
    scheduler = Scheduler(core, [FakeDevice()], engines, {"a": launch, "b": launch})
    yield scheduler, engines
    core.check()


Rig = tuple[Scheduler, FakeEngines]


@asynccontextmanager
async def reading(*devices: NumberedDevice, limit_s: float) -> AsyncIterator[Scheduler]:
    """A scheduler whose model "a" runs on both devices and "b" on the first, all of which are read all the time."""
    launch = Launch(kind=None, start_timeout_s=1.0, stop_timeout_s=1.0)  # type: ignore[arg-type]
    models = [ModelSpec("a", 500, "nvidia", devices_needed=2), ModelSpec("b", 500, devices[0].spec.name)]
    core = Core([device.spec for device in devices], models, SchedulerSettings())
    launches = {"a": launch, "b": launch}
    try:
        yield Scheduler(core, devices, FakeEngines(), launches, measure_interval_s=0.001, reading_limit_s=limit_s)
    finally:
        for device in devices:
            device.lets.set()
    core.check()


async def serve(scheduler: Scheduler, model: str) -> str:
    """One whole request; returns the URL it was sent to."""
    with scheduler.lease(Ticket(scheduler.new_ticket_id(), model)) as waiting:
        return (await waiting.granted()).base_url


async def settle() -> None:
    """Lets everything that can run without time passing run."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_request_loads_its_model_and_the_next_one_finds_it_there(rig: Rig) -> None:
    scheduler, engines = rig
    assert await serve(scheduler, "a") == "http://a#1"
    assert await serve(scheduler, "a") == "http://a#1"
    assert engines.started == ["a#1"]


async def test_models_trade_places_and_the_victim_is_stopped_first(rig: Rig) -> None:
    scheduler, engines = rig
    for model in ("a", "b", "a"):
        await serve(scheduler, model)
    assert engines.started == ["a#1", "b#2", "a#3"]
    assert engines.stopped == ["a#1", "b#2"]


async def test_a_client_that_leaves_while_waiting_takes_its_ticket_along(rig: Rig) -> None:
    scheduler, engines = rig
    engines.at_once = False
    gone = asyncio.create_task(serve(scheduler, "a"))
    await settle()
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert not len(scheduler.core.models["a"].queue)
    engines.let["a#1"].set_result(None)
    assert await serve(scheduler, "a") == "http://a#1"


async def test_a_grant_that_reaches_a_task_cancelled_in_the_same_turn_is_given_back(rig: Rig) -> None:
    scheduler, _ = rig
    await serve(scheduler, "a")
    holders = [scheduler.lease(Ticket(scheduler.new_ticket_id(), "a")) for _ in range(2)]
    victim = asyncio.create_task(serve(scheduler, "a"))
    await settle()
    holders[0].close()  # grants the victim ...
    victim.cancel()  # ... which is cancelled before it runs
    with pytest.raises(asyncio.CancelledError):
        await victim
    holders[1].close()
    assert scheduler.core.models["a"].engine.in_flight == 0
    assert await serve(scheduler, "a") == "http://a#1"


async def test_closing_twice_gives_back_once(rig: Rig) -> None:
    scheduler, _ = rig
    await serve(scheduler, "a")
    waiting = scheduler.lease(Ticket(scheduler.new_ticket_id(), "a"))
    other = scheduler.lease(Ticket(scheduler.new_ticket_id(), "a"))
    waiting.close()
    waiting.close()
    assert scheduler.core.models["a"].engine.in_flight == 1
    other.close()


async def test_a_start_that_fails_tells_who_waits_why(rig: Rig) -> None:
    scheduler, engines = rig
    engines.at_once = False
    request = asyncio.create_task(serve(scheduler, "a"))
    await settle()
    engines.let["a#1"].set_exception(EngineExit("no such folder", ["last words"]))
    with pytest.raises(Refused, match="a could not be loaded: no such folder") as refused:
        await request
    assert refused.value.code is RefusalCode.LOAD_FAILED
    assert refused.value.retry_after_s == pytest.approx(5.0, abs=0.5)
    engines.at_once = True
    assert await serve(scheduler, "b") == "http://b#2"


async def test_a_bug_in_a_start_is_a_failure_not_a_hang(rig: Rig) -> None:
    scheduler, engines = rig
    engines.at_once = False
    request = asyncio.create_task(serve(scheduler, "a"))
    await settle()
    engines.let["a#1"].set_exception(ZeroDivisionError("oops"))
    with pytest.raises(Refused, match="ZeroDivisionError: oops"):
        await request


@pytest.mark.parametrize("error", [OSError("the driver does not answer"), ValueError("nobody thought of this")])
async def test_a_device_that_cannot_be_read_costs_no_request_and_is_told_of_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    scheduler, engines = rig
    with monkeypatch.context() as broken:
        broken.setattr(FakeDevice, "measure", Mock(side_effect=error))
        for model in ("a", "b", "a"):
            await serve(scheduler, model)
    assert engines.started == ["a#1", "b#2", "a#3"]
    assert [record.getMessage() for record in caplog.records] == [
        f"device ram cannot be read, and what was read last is believed: {type(error).__name__}: {error}"
    ]
    await serve(scheduler, "b")
    assert scheduler.core.devices["ram"].holding("b#4").measured == 500 * MiB  # type: ignore[union-attr]


async def test_an_engine_is_ready_and_serves_though_a_reading_of_its_device_hangs() -> None:
    host, gpu = NumberedDevice("ram"), NumberedDevice("gpu0")
    async with reading(host, gpu, limit_s=0.01) as scheduler:
        gpu.lets.clear()
        assert await serve(scheduler, "a") == "http://a#1"
        assert await serve(scheduler, "a") == "http://a#1"
        assert await serve(scheduler, "b") == "http://b#2"


async def test_other_devices_go_on_being_read_while_one_hangs_and_the_end_does_not_wait_for_it() -> None:
    host, gpu = NumberedDevice("ram"), NumberedDevice("gpu0")
    gpu.lets.clear()
    async with reading(host, gpu, limit_s=3600.0) as scheduler:
        running = asyncio.create_task(scheduler.run())
        await until(lambda: host.begun > 3)
        assert gpu.begun == 1
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert await serve(scheduler, "b") == "http://b#1"


async def test_an_engine_that_dies_is_replaced_for_the_next_request(rig: Rig) -> None:
    scheduler, engines = rig
    await serve(scheduler, "a")
    engines.on_exit("a#1", "killed by signal 9", ())
    assert scheduler.core.models["a"].state is Residency.COLD
    assert await serve(scheduler, "a") == "http://a#2"


async def test_an_operators_unload_breaks_off_a_start(rig: Rig) -> None:
    scheduler, engines = rig
    engines.at_once = False
    loading = asyncio.create_task(anext(scheduler.load("a")))
    await settle()
    await loading
    states = [state async for state, _, _ in scheduler.unload("a")]
    assert states[-1] is Residency.COLD
    assert engines.stopped == ["a#1"]
    assert engines.let["a#1"].cancelled()
    engines.at_once = True
    assert await serve(scheduler, "a") == "http://a#2"


async def test_an_operators_load_follows_the_start(rig: Rig) -> None:
    scheduler, engines = rig
    engines.at_once = False
    seen: list[tuple[Residency, float, str]] = []

    async def follow() -> None:
        seen.extend([state async for state in scheduler.load("a")])

    task = asyncio.create_task(follow())
    await settle()
    engines.progress["a#1"](Progress(0.5, "loading weights"))
    await settle()
    engines.let["a#1"].set_result(None)
    await task
    assert (Residency.LOADING, 0.5, "loading weights") in seen
    assert seen[-1] == (Residency.READY, 1.0, "")


async def test_a_load_that_cannot_fit_says_so_at_once(rig: Rig) -> None:
    scheduler, engines = rig
    scheduler.dispatch(ConfigChanged((ModelSpec("a", 5000 * MiB, "host"),), SchedulerSettings()))
    ((state, _, note),) = [each async for each in scheduler.load("a")]
    assert state is Residency.FAILED
    assert "a needs 4.88 GiB and ram can give at most 1000 MiB" in note
    assert engines.started == []


async def test_a_load_that_has_become_impossible_while_it_waited_fails_with_the_reason(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "IMPOSSIBLE_S", 0.0)
    scheduler, engines = rig
    strangers = MemoryMeasured("ram", 0, 0, foreign_bytes=1000 * MiB, engines={})
    scheduler.dispatch(strangers)
    load = scheduler.load("a")
    assert await anext(load) == (Residency.COLD, 0.0, "")
    scheduler.dispatch(ConfigChanged((ModelSpec("a", 5000 * MiB, "host"),), SchedulerSettings()))
    scheduler.dispatch(strangers)
    ((state, _, note),) = [each async for each in load]
    assert state is Residency.FAILED
    assert "a needs 4.88 GiB and ram can give at most 1000 MiB" in note
    scheduler.dispatch(ConfigChanged((ModelSpec("a", 700 * MiB, "host"),), SchedulerSettings()))
    scheduler.dispatch(MemoryMeasured("ram", 0, 0, foreign_bytes=0, engines={}))
    assert engines.started == []
    assert await serve(scheduler, "a") == "http://a#1"


async def test_a_load_that_waits_ends_when_another_operator_wants_the_model_gone(rig: Rig) -> None:
    scheduler, _ = rig
    scheduler.dispatch(MemoryMeasured("ram", 0, 0, foreign_bytes=1000 * MiB, engines={}))
    load = scheduler.load("a")
    await anext(load)
    assert [state async for state, _, _ in scheduler.unload("a")] == [Residency.COLD]
    assert [each async for each in load] == [(Residency.FAILED, 0.0, "an operator asked for its unload")]
    scheduler.dispatch(MemoryMeasured("ram", 0, 0, foreign_bytes=0, engines={}))
    again = [each async for each in scheduler.load("a")]
    assert again[-1] == (Residency.READY, 1.0, "")
    assert Residency.FAILED not in [state for state, _, _ in again]


async def test_an_operator_who_reads_slowly_sees_how_the_load_ended(rig: Rig) -> None:
    scheduler, _ = rig
    load = scheduler.load("a")
    assert (await anext(load))[0] is Residency.LOADING
    await until(lambda: scheduler.core.models["a"].state is Residency.READY)
    assert [each async for each in load] == [(Residency.READY, 1.0, "")]


async def test_an_adopted_engine_serves_without_a_start(rig: Rig) -> None:
    scheduler, engines = rig
    scheduler.adopt(EngineReady("a#9", "a", "ram", 0.0, adopted=True), "http://a#9")
    assert await serve(scheduler, "a") == "http://a#9"
    assert engines.started == []


async def test_the_waits_on_a_lease_tell_loading_from_queueing(rig: Rig) -> None:
    scheduler, engines = rig
    engines.at_once = False
    clock = asyncio.get_running_loop().time
    began_s = clock()
    waiting = scheduler.lease(Ticket(scheduler.new_ticket_id(), "a"))
    await settle()
    assert (await waiting.describe()).startswith("loading a, 0%")
    await asyncio.sleep(0.01)
    engines.let["a#1"].set_result(None)
    lease = await waiting.granted()
    assert 0.009 <= lease.load_s <= clock() - began_s - lease.queue_s
    with scheduler.lease(Ticket(scheduler.new_ticket_id(), "a")) as second:
        assert (await second.granted()).load_s == 0.0
    waiting.close()


async def test_decisions_are_kept_with_their_reasons(rig: Rig) -> None:
    scheduler, _ = rig
    await serve(scheduler, "a")
    await serve(scheduler, "b")
    said = [(decision.what, decision.why) for decision in scheduler.decisions]
    assert said[0] == ("load a on ram", "1 waiting; needs 700 MiB of 1000 MiB free")
    assert any(what == "stop a#1 (evicted)" and "evicted for b, which needs 700 MiB" in why for what, why in said)
