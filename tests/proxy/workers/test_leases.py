"""A worker's leases and the proxy's desk for it, joined by a wire in the test's hand that carries bytes."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

import msgspec
import pytest

from proxy.workers.desk import Desk
from proxy.workers.leases import RemoteLeases, RemoteWaiting
from proxy.workers.messages import FromWorker, Report, ToWorker
from scheduler.commands import Credit, Revoke
from scheduler.core import Core
from scheduler.driver import Launch, Refused, Scheduler
from scheduler.model import ModelSpec, RefusalCode, SchedulerSettings, Ticket
from tests.fakes import until
from tests.scheduler.test_driver import FakeDevice, FakeEngines, MiB, settle

Answer = TypeVar("Answer")
from_worker = msgspec.msgpack.Decoder(FromWorker)
to_worker = msgspec.msgpack.Decoder(ToWorker)


class Office:
    """A scheduler and its workers. Messages wait until the test delivers them, in order on each wire."""

    def __init__(self, workers: int = 2, **spec: int) -> None:
        self.engines = FakeEngines()
        models = [ModelSpec(name, 700 * MiB, "host", **{"max_sequences": 8, **spec}) for name in "ab"]
        self.core = Core([FakeDevice.spec], models, SchedulerSettings())
        launch = Launch(kind=None, start_timeout_s=1.0, stop_timeout_s=1.0)
        self.scheduler = Scheduler(self.core, [FakeDevice()], self.engines, {"a": launch, "b": launch})
        self.scheduler.on_credit = self._on_credit
        self.born = 0
        self.now = 0.0
        self.workers: list[Worker] = []
        for _ in range(workers):
            self.workers.append(self.start())
            self.workers[-1].desk.open()

    def start(self) -> Worker:
        self.born += 1
        return Worker(self, self.born)

    def _on_credit(self, command: Credit | Revoke) -> None:
        for worker in self.workers:
            if isinstance(command, Revoke):
                worker.desk.recall(command.engine_id)
            elif worker.desk.holder == command.holder:
                worker.desk.lend(command)

    def kill(self, at: int) -> None:
        worker = self.workers[at]
        self.workers[at] = self.start()
        worker.desk.close()
        self.workers[at].desk.open()

    async def calm(self) -> None:
        """Deliver until nobody has anything to say."""
        for _ in range(50):
            await settle()
            for worker in self.workers:
                worker.leases.report()
            if not sum(worker.deliver() for worker in self.workers):
                return
        raise AssertionError("they never stop talking")

    async def until(self, coming: Awaitable[Answer]) -> Answer:
        """Deliver until it is there. An engine's memory is read in a thread, so there is something to wait for."""
        task = asyncio.ensure_future(coming)
        while not task.done():
            await self.calm()
            await asyncio.sleep(0.001)
        return await task

    def check(self) -> None:
        """When calm: what the core has lent is what the workers have."""
        self.core.check()
        for model in self.core.models.values():
            if model.engine is not None:
                for holder, share in model.engine.credits:
                    (worker,) = [each for each in self.workers if each.desk.holder == holder]
                    assert (share.sequences, share.in_use) == worker.holds(model.engine.id)


class Worker:
    def __init__(self, office: Office, holder: int) -> None:
        self.said: deque[bytes] = deque()
        self.told: deque[bytes] = deque()
        encode = msgspec.msgpack.encode
        self.sent: list[object] = []

        def say(message: object) -> None:
            self.sent.append(message)
            self.said.append(encode(message))

        self.leases = RemoteLeases(holder, say, lambda: office.now)
        self.desk = Desk(holder, office.scheduler, lambda message: self.told.append(encode(message)))

    def ticket(self, model: str = "a", tokens: int = 1) -> Ticket:
        return Ticket(self.leases.new_ticket_id(), model, weight_tokens=tokens)

    def deliver(self) -> int:
        """Everything that waits on both wires; how much that was."""
        count = len(self.said) + len(self.told)
        while self.told:
            self.leases.hear(to_worker.decode(self.told.popleft()))
        while self.said:
            self.desk.hear(from_worker.decode(self.said.popleft()))
        return count

    def holds(self, engine_id: str) -> tuple[int, int]:
        """Sequences on credit, and how many of them are in use."""
        credit = self.leases._engines.get(engine_id)
        return (credit.sequences + credit.in_use, credit.in_use) if credit is not None else (0, 0)


async def one(office: Office, worker: Worker, model: str = "a") -> str:
    """A whole request that may wait; where it was sent."""
    with worker.leases.lease(worker.ticket(model)) as waiting:
        lease = await office.until(waiting.granted())
        waiting.used(3, 4)
    await office.calm()
    return lease.base_url


@pytest.fixture
async def office() -> AsyncIterator[Office]:
    made = Office()
    yield made
    await made.calm()
    made.check()


async def test_the_first_request_asks_and_the_next_ones_are_let_in_on_credit(office: Office) -> None:
    worker = office.workers[0]
    assert await one(office, worker) == "http://a#1"
    assert await one(office, worker) == "http://a#1"  # asked while nobody waited: with credit
    worker.sent.clear()
    ticket = worker.ticket()
    lease = worker.leases.lease_now(ticket)
    assert lease is not None
    assert lease.base_url == "http://a#1"
    worker.leases.give_back(ticket.id, 3, 4)
    assert worker.sent == [], "nothing is said at once"
    worker.leases.report()
    (report,) = worker.sent
    assert isinstance(report, Report)
    assert (report.begun, report.in_use, len(report.served)) == ((("", ""),), 0, 1)


async def test_where_credit_does_not_reach_nothing_has_happened(office: Office) -> None:
    worker = office.workers[0]
    assert worker.leases.lease_now(worker.ticket()) is None
    await one(office, worker)
    await one(office, worker)
    assert worker.leases.lease_now(worker.ticket(tokens=1 << 40)) is None
    assert worker.leases.lease_now(worker.ticket("b")) is None


async def test_a_busy_worker_gets_more_with_its_reports(office: Office) -> None:
    worker = office.workers[0]
    await one(office, worker)
    await one(office, worker)
    had, _ = worker.holds("a#1")
    tickets = [worker.ticket() for _ in range(had)]
    assert all(worker.leases.lease_now(ticket) for ticket in tickets)
    assert worker.leases.lease_now(worker.ticket()) is None
    await office.calm()
    assert worker.holds("a#1")[0] > had
    for ticket in tickets:
        worker.leases.give_back(ticket.id)


async def test_one_worker_s_unused_credit_goes_to_who_waits_at_another(office: Office) -> None:
    first, second = office.workers
    await one(office, first)
    await one(office, first)
    spare = first.holds("a#1")[0]
    assert spare
    waiting = [second.leases.lease(second.ticket()) for _ in range(8)]
    assert [(await office.until(each.granted())).engine_id for each in waiting] == ["a#1"] * 8
    assert first.holds("a#1") == (0, 0)
    for each in waiting:
        each.__exit__(None, None, None)
    await office.calm()
    assert await one(office, first) == "http://a#1"


async def test_models_trade_places_although_credit_is_out(office: Office) -> None:
    worker = office.workers[0]
    for model in ("a", "a", "b", "b", "a"):
        await one(office, worker, model)
    assert office.engines.started == ["a#1", "b#2", "a#3"]
    assert office.engines.stopped == ["a#1", "b#2"]


async def test_a_refusal_reaches_the_worker_with_its_reason(office: Office) -> None:
    worker = office.workers[0]
    with worker.leases.lease(worker.ticket("no such model")) as waiting, pytest.raises(Refused) as refused:
        await office.until(waiting.granted())
    assert refused.value.code is RefusalCode.UNKNOWN_MODEL
    assert "no such model" in refused.value.reason
    assert await one(office, worker) == "http://a#1"


async def test_a_bug_in_the_scheduler_fails_one_request(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = office.workers[0]
    with monkeypatch.context() as patched:
        patched.setattr(office.core, "arrive", lambda *_: 1 / 0)
        with worker.leases.lease(worker.ticket()) as waiting, pytest.raises(Refused):
            await office.until(waiting.granted())
    assert await one(office, worker) == "http://a#1"


async def test_who_leaves_while_waiting_or_as_the_grant_arrives_leaves_nothing_behind(office: Office) -> None:
    office.engines.at_once = False
    worker = office.workers[0]
    leaves, crosses, stays = (worker.leases.lease(worker.ticket()) for _ in range(3))
    await office.calm()
    leaves.__exit__(None, None, None)
    await office.calm()
    office.engines.let["a#1"].set_result(None)
    await until(lambda: bool(worker.told))
    crosses.__exit__(None, None, None)  # its grant is on the wire
    assert (await office.until(stays.granted())).engine_id == "a#1"
    assert office.core.models["a"].in_flight == 1
    stays.__exit__(None, None, None)
    assert await one(office, worker) == "http://a#1"


async def test_who_waits_is_told_what_for(office: Office) -> None:
    office.engines.at_once = False
    worker = office.workers[0]
    with worker.leases.lease(worker.ticket()) as waiting:
        await office.calm()
        assert (await office.until(waiting.describe())).startswith("loading a, 0%")
        office.engines.let["a#1"].set_result(None)
        await office.until(waiting.granted())


async def test_a_worker_asks_whether_the_engine_that_broke_off_has_died(office: Office) -> None:
    worker = office.workers[0]
    await one(office, worker)
    assert not await office.until(worker.leases.lost("a#1"))
    assert await office.until(worker.leases.lost("a#0"))


async def test_a_worker_that_dies_loses_only_what_is_its_own(office: Office) -> None:
    dies, lives = office.workers
    await one(office, dies)
    await one(office, dies)
    assert dies.leases.lease_now(dies.ticket())
    large = dies.leases.lease(dies.ticket(tokens=1 << 29))  # more than credit covers
    other = lives.leases.lease(lives.ticket())
    assert (await office.until(other.granted())).engine_id == "a#1"
    await office.until(large.granted())
    await office.calm()
    assert office.core.models["a"].in_flight == 3
    dies.leases.lease(dies.ticket("b"))
    await office.calm()
    assert len(office.core.tickets.waiting) == 1
    office.kill(0)
    await office.calm()
    assert office.core.models["a"].in_flight == 1
    assert not office.core.tickets.waiting
    other.__exit__(None, None, None)
    assert await one(office, office.workers[0]) == "http://a#1"


@pytest.mark.parametrize("seed", range(8))
async def test_nothing_is_lost_whatever_the_workers_and_the_wires_do(seed: int) -> None:
    rng = random.Random(seed)
    office = Office(3, max_sequences=rng.choice((1, 3, 8, 30)), kv_tokens=rng.choice((20, 1 << 30)))
    on_credit: dict[int, tuple[Worker, int]] = {}
    asked: dict[int, tuple[Worker, RemoteWaiting]] = {}

    def arrive() -> None:
        worker = rng.choice(office.workers)
        ticket = worker.ticket(rng.choice("aab"), rng.choice((1, 5, 50)))
        if rng.random() < 0.7 and worker.leases.lease_now(ticket):
            on_credit[ticket.id] = worker, ticket.id
        else:
            asked[ticket.id] = worker, worker.leases.lease(ticket)

    def end() -> None:
        if on_credit and rng.random() < 0.5:
            worker, ticket_id = on_credit.pop(rng.choice(list(on_credit)))
            worker.leases.give_back(ticket_id, 1, rng.randrange(9))
        elif asked:
            _, waiting = asked.pop(rng.choice(list(asked)))
            waiting.__exit__(None, None, None)

    def speak() -> None:
        worker = rng.choice(office.workers)
        if worker.told and rng.random() < 0.5:
            worker.leases.hear(to_worker.decode(worker.told.popleft()))
        elif worker.said:
            worker.desk.hear(from_worker.decode(worker.said.popleft()))
        else:
            worker.leases.report()

    def die() -> None:
        at = rng.randrange(3)
        dead = office.workers[at]
        office.kill(at)
        for held in (on_credit, asked):
            for ticket_id in [each for each, (worker, _) in held.items() if worker is dead]:
                del held[ticket_id]

    for _ in range(600):
        office.now += rng.choice((0.0, 0.01, 1.0))
        rng.choices((arrive, end, speak, die), (30, 30, 60, 1))[0]()
        office.core.check()
        if rng.random() < 0.1:
            await asyncio.sleep(0)
    for worker, ticket_id in on_credit.values():
        worker.leases.give_back(ticket_id)
    for _, waiting in asked.values():
        waiting.__exit__(None, None, None)
    await office.calm()
    office.check()
    assert not office.core.tickets.waiting
    assert not office.core.tickets.admitted
    assert not any(model.in_flight for model in office.core.models.values())
    assert (await one(office, office.workers[0])).startswith("http://a#")
