import asyncio
import random

import pytest

from ext.errors import NeverFits
from scheduler.semaphore import Semaphore


async def settle() -> None:
    """Let every task run as far as it can."""
    for _ in range(10):
        await asyncio.sleep(0)


async def proves_usable(semaphore: Semaphore, tokens: int) -> None:
    """The next request works, with all of the capacity."""
    async with semaphore.lease(tokens):
        assert semaphore.stats().held == 1
    assert semaphore.stats().held == semaphore.stats().waiting == 0
    assert not semaphore._waiters
    assert not semaphore._granted


class Caller:
    """A task that takes a lease, says so, and keeps it until told."""

    def __init__(self, semaphore: Semaphore, tokens: int, **options: object) -> None:
        self.held, self.leave = False, asyncio.Event()
        self.task = asyncio.ensure_future(self._run(semaphore, tokens, options))

    async def _run(self, semaphore, tokens, options):
        async with semaphore.lease(tokens, **options):
            self.held = True
            await self.leave.wait()
        self.held = False


async def test_a_waiter_gets_its_lease_when_another_leaves():
    semaphore = Semaphore(10)
    first, second = Caller(semaphore, 8), Caller(semaphore, 5)
    await settle()
    assert (first.held, second.held) == (True, False)
    first.leave.set()
    await settle()
    assert second.held
    second.leave.set()
    await second.task
    await proves_usable(semaphore, 10)


async def test_an_error_inside_the_block_gives_the_lease_back():
    semaphore = Semaphore(10)
    with pytest.raises(ZeroDivisionError):
        async with semaphore.lease(10):
            raise ZeroDivisionError
    await proves_usable(semaphore, 10)


async def test_a_cancelled_holder_gives_its_lease_to_the_next():
    semaphore = Semaphore(10)
    first, second = Caller(semaphore, 10), Caller(semaphore, 10)
    await settle()
    first.task.cancel()
    await settle()
    assert second.held
    second.leave.set()
    await second.task
    await proves_usable(semaphore, 10)


async def test_a_cancelled_large_head_wakes_the_small_one_behind_it():
    semaphore = Semaphore(10)
    holder, large, small = Caller(semaphore, 5), Caller(semaphore, 9), Caller(semaphore, 3)
    await settle()
    assert not small.held
    large.task.cancel()
    await settle()
    assert small.held
    for caller in (holder, small):
        caller.leave.set()
        await caller.task
    await proves_usable(semaphore, 10)


async def test_a_grant_to_a_task_cancelled_in_the_same_turn_is_given_back():
    semaphore = Semaphore(10)
    for cancel_first in (True, False):
        holder, waiter, last = Caller(semaphore, 10), Caller(semaphore, 10), Caller(semaphore, 10)
        await settle()
        # The release and the cancellation both happen before the waiter's task can run.
        if cancel_first:
            waiter.task.cancel()
        semaphore._wake(semaphore._core.resize(20)[0])
        waiter.task.cancel()
        await settle()
        assert waiter.task.cancelled()
        assert last.held
        semaphore.resize(10)
        for caller in (holder, last):
            caller.leave.set()
            await caller.task
        await proves_usable(semaphore, 10)


async def test_a_wait_that_takes_too_long_raises_and_leaves_the_line():
    semaphore = Semaphore(10)
    holder = Caller(semaphore, 10)
    await settle()
    with pytest.raises(TimeoutError):
        async with semaphore.lease(1, timeout_s=0):
            raise AssertionError
    holder.leave.set()
    await holder.task
    await proves_usable(semaphore, 10)


async def test_a_shrink_refuses_the_waiter_that_can_never_fit_and_no_other():
    semaphore = Semaphore(10)
    holder, large, small, leaving = (Caller(semaphore, tokens) for tokens in (6, 9, 5, 9))
    await settle()
    leaving.task.cancel()  # cancelled and refused in one turn
    semaphore.resize(7)
    await settle()
    with pytest.raises(NeverFits, match="shrank to 7"):
        await large.task
    assert leaving.task.cancelled()
    holder.leave.set()
    await settle()
    assert small.held
    small.leave.set()
    await small.task
    await proves_usable(semaphore, 7)


async def test_a_weight_above_capacity_is_refused_at_once():
    semaphore = Semaphore(10, 2)
    for weight in [(11, 1), (1, 3)]:
        with pytest.raises(NeverFits):
            async with semaphore.lease(*weight):
                raise AssertionError
    await proves_usable(semaphore, 10)


async def test_urgent_classes_go_first():
    semaphore = Semaphore(1, classes=2)
    holder = Caller(semaphore, 1)
    await settle()
    batch, urgent = Caller(semaphore, 1, priority=1), Caller(semaphore, 1, priority=0)
    await settle()
    holder.leave.set()
    await settle()
    assert (urgent.held, batch.held) == (True, False)
    for caller in (urgent, batch):
        caller.leave.set()
        await caller.task
    await proves_usable(semaphore, 1)


@pytest.mark.parametrize("seed", range(20))
async def test_random_cancellations_never_lose_or_invent_weight(seed):
    rng = random.Random(seed)
    semaphore = Semaphore(20, 6, classes=2)
    callers: list[Caller] = []
    for _ in range(200):
        action = rng.random()
        if action < 0.4 or not callers:
            callers.append(Caller(semaphore, rng.randint(0, 12), priority=rng.randrange(2)))
        elif action < 0.7:
            rng.choice(callers).task.cancel()
        elif action < 0.9:
            rng.choice(callers).leave.set()
        else:
            semaphore.resize(rng.randint(12, 25), rng.randint(1, 8))
        if rng.random() < 0.4:
            await asyncio.sleep(0)
        assert semaphore.stats().held >= sum(caller.held for caller in callers if not caller.task.done())
    semaphore.resize(20, 6)
    for caller in callers:
        caller.leave.set()
    await asyncio.gather(*(caller.task for caller in callers), return_exceptions=True)
    await proves_usable(semaphore, 20)
