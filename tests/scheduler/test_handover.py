"""From one scheduler to the next: what is begun no more, what is taken over, and that no lease or waiter is lost."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from scheduler.commands import Command, Credit, Revoke
from scheduler.core import Core
from scheduler.driver import Launch, Refused, Scheduler
from scheduler.events import (
    Asleep,
    CreditReported,
    EngineReady,
    Finished,
    HandOverAsked,
    HandOverOff,
    HolderCame,
    HolderGone,
    ProbeAnswered,
    UnloadAsked,
)
from scheduler.handover import CHUNK, Guests, HandedEngine, Leaver, hand_over
from scheduler.model import ModelSpec, Residency, SchedulerSettings, Ticket
from tests.scheduler.conftest import MakeWorld, MiB, World, kinds, spec
from tests.scheduler.test_driver import FakeDevice, FakeEngines, settle
from tests.scheduler.test_sleep import Card


def adopted(model: str, *in_flight: Ticket, **how: Any) -> EngineReady:
    return EngineReady(f"{model}#9", model, "ram", 0.0, adopted=True, in_flight=in_flight, **how)


# ---- the core: nothing more is begun


def test_what_is_under_way_ends_and_nothing_more_is_begun(world: MakeWorld) -> None:
    w = world(a=700, b=700, c=700)
    first, (load,) = w.arrive("a")
    assert w.step(HandOverAsked()) == []
    assert not w.core.books.settled
    waits, commands = w.arrive("b")
    assert commands == []
    assert kinds(w.ready(load)) == [f"admit {first}"]
    assert w.core.books.settled
    assert kinds(w.arrive("a")[1]) == ["admit 3"]
    assert kinds(w.step(HandOverOff())) == ["load b"]
    w.cancel(waits)


def test_a_victim_that_drains_serves_on(world: MakeWorld) -> None:
    w = world(memory=1000, a=700, b=700)
    held, (load,) = w.arrive("a")
    w.ready(load)
    w.arrive("b")
    assert w.core.models["a"].state is Residency.DRAINING
    more, _ = w.arrive("a")
    assert kinds(w.step(HandOverAsked())) == [f"admit {more}"]
    assert [kinds(w.finish(each)) for each in (held, more)] == [[], []]
    assert kinds(w.step(HandOverOff())) == ["stop a"]


def test_neither_time_nor_an_operator_stops_an_engine_then(world: MakeWorld) -> None:
    w = world(a=spec("a", 700, ttl_s=10.0), b=700)
    for model in ("a", "b"):
        w.resident(model)
    w.step(HandOverAsked())
    assert w.tick(60.0) == []
    assert w.step(UnloadAsked("b")) == []
    assert w.core.books.settled
    assert kinds(w.step(HandOverOff())) == ["stop b"]
    assert kinds(w.tick(61.5)) == ["stop a"]


# ---- the core: what is taken over


def test_an_engine_with_requests_of_the_proxy_before_is_busy_until_they_end(world: MakeWorld) -> None:
    w = world(memory=1000, a=spec("a", 700, max_sequences=2), b=700)
    theirs = Ticket(101, "a", weight_tokens=5)
    assert w.step(adopted("a", theirs)) == []
    assert (w.core.models["a"].in_flight, w.core.models["a"].engine.capacity.free_sequences) == (1, 1)  # type: ignore[union-attr]
    _, commands = w.arrive("b")
    assert commands == [], "it cannot be stopped yet"
    assert kinds(w.step(Finished(101))) == ["stop a"]


def test_more_requests_than_an_engine_has_room_for_are_still_counted(world: MakeWorld) -> None:
    w = world(a=spec("a", 700, max_sequences=1, kv_tokens=10))
    w.step(adopted("a", *(Ticket(number, "a", weight_tokens=9) for number in (101, 102, 103))))
    waits, commands = w.arrive("a")
    assert commands == []
    assert [kinds(w.step(Finished(number))) for number in (101, 102, 103)] == [[], [], [f"admit {waits}"]]


def test_a_sleeper_is_taken_over_asleep_and_wakes_without_a_load() -> None:
    before, after = Card(a={}, b={}), Card(a={}, b={})
    engine = before.load("a")
    _, commands = before.arrive("b")
    assert kinds(commands) == ["sleep a"]
    before.held[engine] = 50
    before.step(Asleep(engine))
    before.read()
    state = before.core.models["a"].engine
    assert state is not None
    assert (before.core.models["a"].state, state.says) == (Residency.ASLEEP, ProbeAnswered(engine, " Rome", -0.5))
    event = EngineReady(engine, "a", "gpu0", 0.0, adopted=True, asleep=True, says=state.says)
    assert after.step(event) == []
    assert after.core.models["a"].state is Residency.ASLEEP
    after.held[engine] = 50
    after.read()
    ticket, commands = after.arrive("a")
    assert kinds(commands) == ["wake a"]
    assert kinds(after.step(EngineReady(engine, "a", "gpu0", 1.0))) == ["probe a"]
    assert kinds(after.step(ProbeAnswered(engine, " Rome", -0.5))) == [f"admit {ticket}"]


def test_a_sleeper_for_which_there_is_no_memory_any_more_is_stopped() -> None:
    world: World = Card(SchedulerSettings(sleep_memory_bytes=0), a={})
    assert kinds(world.step(EngineReady("a#9", "a", "gpu0", 0.0, adopted=True, asleep=True))) == ["stop a"]


# ---- two schedulers


class Bus:
    """What the keeper does: packets in order, each as JSON. `deliver` carries all that is under way."""

    def __init__(self) -> None:
        self.packets: deque[tuple[str, str]] = deque()
        self.to_leaver: Callable[[dict[str, Any]], None] = lambda _: None
        self.to_guests: Callable[[dict[str, Any]], None] = lambda _: None
        self.longest = 0

    def from_leaver(self, body: dict[str, Any]) -> None:
        self._send("to_guests", body)

    def from_guests(self, body: dict[str, Any]) -> None:
        self._send("to_leaver", body)

    def _send(self, whom: str, body: dict[str, Any]) -> None:
        packet = json.dumps(body)
        self.longest = max(self.longest, len(packet))
        self.packets.append((whom, packet))

    def deliver_one(self) -> None:
        whom, packet = self.packets.popleft()
        getattr(self, whom)(json.loads(packet))

    async def deliver(self) -> None:
        await settle()
        while self.packets:
            self.deliver_one()
            await settle()


class Side:
    """A scheduler over engines without processes."""

    def __init__(self, sequences: int = 2) -> None:
        self.engines = FakeEngines()
        models = [ModelSpec(name, 700 * MiB, "host", max_sequences=sequences) for name in "ab"]
        self.core = Core([FakeDevice.spec], models, SchedulerSettings())
        launch = Launch(kind=None, start_timeout_s=1.0, stop_timeout_s=1.0)  # type: ignore[arg-type]
        self.scheduler = Scheduler(self.core, [FakeDevice()], self.engines, {"a": launch, "b": launch})

    def ask(self, model: str = "a", **how: Any) -> Any:
        return self.scheduler.lease(Ticket(self.scheduler.new_ticket_id(), model, **how))

    def take_over(self, bus: Bus) -> Guests:
        guests = Guests(bus.from_guests)
        bus.to_guests = guests.hear
        return guests

    def serve(self, guests: Guests, engine_id: str = "a#1") -> None:
        in_flight = guests.on(engine_id, self.scheduler)
        event = EngineReady(engine_id, "a", "ram", 0.0, adopted=True, in_flight=in_flight)
        self.scheduler.adopt(event, f"http://{engine_id}")
        guests.serve(self.scheduler)
        self.core.check()


class Pair:
    """An old scheduler with two requests in flight and one that waits, and a new one."""

    def __init__(self) -> None:
        self.bus = Bus()
        self.old, self.new = Side(), Side()
        self.leaver = Leaver(self.bus.from_leaver)
        self.bus.to_leaver = self.leaver.hear

    async def begin(self) -> Pair:
        self.running = [self.old.ask(tenant="x"), self.old.ask()]
        for each in self.running:
            await each.granted()
        self.waits = self.old.ask()
        await self.old.scheduler.settled()
        return self

    async def hand_over(self) -> list[HandedEngine]:
        handed = hand_over(self.old.scheduler, self.leaver)
        self.guests = self.new.take_over(self.bus)
        await self.bus.deliver()
        self.new.serve(self.guests)
        return handed

    @property
    def in_flight(self) -> int:
        return self.new.core.models["a"].in_flight


@pytest.fixture
async def pair() -> Pair:
    return await Pair().begin()


async def test_leases_are_held_there_and_whoever_waits_waits_there(pair: Pair) -> None:
    assert await pair.hand_over() == [HandedEngine("a#1")]
    assert (pair.in_flight, len(pair.new.core.models["a"].queue)) == (2, 1)
    pair.running[0].used(7, 9)
    pair.running[0].close()
    await pair.bus.deliver()
    assert (await pair.waits.granted()).base_url == "http://a#1"
    assert pair.in_flight == 2
    for each in (pair.running[1], pair.waits):
        each.close()
        each.close()
    await pair.bus.deliver()
    assert pair.in_flight == 0
    assert pair.new.engines.started == []


async def test_a_request_that_still_comes_to_the_old_one_gets_its_lease_from_the_new_one(pair: Pair) -> None:
    await pair.hand_over()
    assert pair.old.scheduler.lease_now(Ticket(99, "a")) is None
    assert "new version" in await pair.waits.describe()
    for each in (*pair.running, pair.waits):
        each.close()
    late = pair.old.ask()
    await pair.bus.deliver()
    assert (await late.granted()).engine_id == "a#1"
    late.close()
    unknown = pair.old.ask("no-such-model")
    await pair.bus.deliver()
    with pytest.raises(Refused, match="no local model named"):
        await unknown.granted()
    unknown.close()
    await pair.bus.deliver()
    assert pair.in_flight == 0


async def test_a_caller_that_leaves_while_its_lease_is_on_the_way_gives_it_back(pair: Pair) -> None:
    await pair.hand_over()
    pair.running[0].close()
    await settle()
    pair.bus.deliver_one()
    await settle()  # the grant is under way now
    pair.waits.close()
    await pair.bus.deliver()
    assert pair.in_flight == 1
    with pair.new.ask() as next_one:
        assert await next_one.granted()


async def test_what_a_lease_gives_back_before_the_new_one_serves_is_not_held_there(pair: Pair) -> None:
    hand_over(pair.old.scheduler, pair.leaver)
    guests = pair.new.take_over(pair.bus)
    await pair.bus.deliver()
    pair.running[0].close()
    pair.waits.close()
    await pair.bus.deliver()
    pair.new.serve(guests)
    assert (pair.in_flight, len(pair.new.core.models["a"].queue)) == (1, 0)


async def test_the_end_of_the_old_one_is_the_end_of_all_that_it_had(pair: Pair) -> None:
    await pair.hand_over()
    left = asyncio.create_task(pair.guests.left("a#1"))
    await settle()
    assert not left.done()
    pair.guests.gone()
    await left
    assert (pair.in_flight, len(pair.new.core.models["a"].queue)) == (0, 0)
    with pair.new.ask() as mine:
        assert await mine.granted()


async def test_a_second_successor_is_told_everything_as_it_is_then(pair: Pair) -> None:
    await pair.hand_over()
    pair.running[0].close()
    await pair.bus.deliver()
    assert pair.waits.done
    pair.new = Side()  # the first has died
    last = pair.old.ask()
    pair.bus.packets.clear()
    guests = pair.new.take_over(pair.bus)
    pair.leaver.tell()
    await pair.bus.deliver()
    pair.new.serve(guests)
    assert (pair.in_flight, len(pair.new.core.models["a"].queue)) == (2, 1)
    pair.running[1].close()
    await pair.bus.deliver()
    assert (await last.granted()).engine_id == "a#1"


async def test_credit_that_is_out_counts_as_leases_until_it_is_returned_or_its_holder_has_gone() -> None:
    pair = Pair()
    pair.old, pair.new = Side(sequences=8), Side(sequences=8)
    with pair.old.ask() as first:
        await first.granted()
    told: list[Command] = []
    pair.old.scheduler.on_credit = told.append
    for holder in (1, 2):
        pair.old.scheduler.dispatch(HolderCame(holder))
    assert [(each.holder, each.sequences) for each in told if isinstance(each, Credit)] == [(1, 4), (1, 1), (2, 1)]
    await pair.old.scheduler.settled()
    await pair.hand_over()
    assert told[-1] == Revoke("a#1")
    assert pair.in_flight == 5 + 1
    pair.old.scheduler.dispatch(CreditReported(1, "a#1", (("t", ""),), 1, sequences=4))
    await pair.bus.deliver()
    assert pair.in_flight == 1 + 1
    pair.old.scheduler.dispatch(HolderGone(2))
    await pair.bus.deliver()
    assert pair.in_flight == 1
    pair.old.scheduler.dispatch(CreditReported(1, "a#1", (), 0, sequences=1))
    await pair.bus.deliver()
    assert pair.in_flight == 0


async def test_a_hand_over_that_is_called_off_leaves_everything_as_it_was() -> None:
    side = Side()
    side.engines.at_once = False
    first = side.ask()
    await settle()
    settled = asyncio.create_task(side.scheduler.settled())
    await settle()
    assert not settled.done(), "a load is under way"
    other = side.ask("b")
    settled.cancel()
    side.scheduler.go_on()
    side.engines.let["a#1"].set_result(None)
    assert await first.granted()
    first.close()
    await settle()
    assert side.engines.started == ["a#1", "b#2"]
    other.close()


async def test_ten_thousand_leases_fit_into_the_keepers_packets() -> None:
    bus = Bus()
    leaver = Leaver(bus.from_leaver)
    name = "m" * 60
    held = [(Ticket(number, name, tenant="ä" * 100, weight_tokens=1 << 40), f"{name}#12") for number in range(10_000)]
    leaver.begin(held, [])
    assert len(bus.packets) == 10_000 // CHUNK
    assert bus.longest < 1 << 17
    guests = Guests(bus.from_guests)
    bus.to_guests = guests.hear
    await bus.deliver()
    mine = guests.on(f"{name}#12", Side().scheduler)
    assert [msgspec.structs.replace(each, id=0) for each in mine[:1]] == [msgspec.structs.replace(held[0][0], id=0)]
    assert len({each.id for each in mine}) == 10_000
