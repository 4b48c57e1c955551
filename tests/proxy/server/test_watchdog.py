from __future__ import annotations

import asyncio

import pytest

from proxy.server import watchdog
from proxy.server.watchdog import Watch, Watchdog


class Slow(Exception):
    pass


class Late(Exception):
    pass


async def test_a_wait_over_its_limit_ends_with_that_limits_error() -> None:
    async def work() -> None:
        with Watchdog(10, Late) as watch:
            watch.limit(0.01, Slow)
            await asyncio.Event().wait()

    with pytest.raises(Slow):
        await work()
    await asyncio.sleep(0)  # nothing of the cancellation is left over


async def test_moving_the_limit_keeps_the_task_alive() -> None:
    with Watchdog(10, Late) as watch:
        for _ in range(5):
            watch.limit(0.4, Slow)  # a busy machine may wake us 0.3 s late
            await asyncio.sleep(0.1)


async def test_a_shorter_limit_after_a_longer_one_holds() -> None:
    async def work() -> None:
        with Watchdog(10, Late) as watch:
            watch.limit(5, Late)
            watch.limit(0.01, Slow)
            await asyncio.Event().wait()

    with pytest.raises(Slow):
        await work()


async def test_the_total_limit_cannot_be_moved() -> None:
    async def work() -> None:
        with Watchdog(0.03, Late) as watch:
            while True:
                watch.limit(5, Slow)
                await asyncio.sleep(0.01)

    with pytest.raises(Late):
        await work()


async def test_a_lifted_limit_does_not_fire() -> None:
    with Watchdog(10, Late) as watch:
        watch.limit(0.01, Slow)
        watch.lift()
        await asyncio.sleep(0.03)


async def test_a_cancellation_from_outside_stays_one() -> None:
    async def work() -> None:
        with Watchdog(10, Late) as watch:
            watch.limit(5, Slow)
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancellation_that_comes_with_the_limit_wins() -> None:
    async def work() -> None:
        with Watchdog(10, Late) as watch:
            watch.limit(0, Slow)
            loop = asyncio.get_running_loop()
            task = asyncio.current_task()
            assert task is not None
            loop.call_later(0, task.cancel)
            await asyncio.Event().wait()

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(work())


async def test_an_error_inside_is_not_replaced() -> None:
    async def work() -> None:
        with Watchdog(10, Late) as watch:
            watch.limit(5, Slow)
            raise KeyError

    with pytest.raises(KeyError):
        await work()


async def test_it_can_be_entered_again_after_it_fired() -> None:
    watch = Watchdog(0.05, Late)
    with pytest.raises(Late), watch:
        await asyncio.Event().wait()
    with watch:
        watch.limit(1, Slow)
        await asyncio.sleep(0.01)


async def test_a_short_request_arms_one_timer_whatever_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    armed: list[float] = []
    arm = Watchdog._arm
    monkeypatch.setattr(Watchdog, "_arm", lambda self, when: (armed.append(when), arm(self, when)))
    with Watchdog(3600, Late) as watch:
        for seconds in (300, 120, 60):
            watch.limit(seconds, Slow)
    assert len(armed) == 1


async def test_a_limit_beyond_the_first_look_still_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "FIRST_LOOK_S", 0.005)

    async def work() -> None:
        with Watchdog(10, Late) as watch:
            watch.limit(0.02, Slow)
            await asyncio.Event().wait()

    with pytest.raises(Slow):
        await work()


def lazy(total_s: float = 10.0) -> Watchdog:
    return Watchdog(total_s, Late, lazy=True)


async def test_a_request_that_ends_before_the_round_arms_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    armed: list[float] = []
    monkeypatch.setattr(Watchdog, "_arm", lambda self, when: armed.append(when))
    with lazy() as watch:
        watch.limit(60, Slow)
    watch.arm()  # the round, too late for it
    assert armed == []


async def test_after_the_round_the_limits_hold_to_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "ROUND_S", 0.005)
    monkeypatch.setattr(watchdog, "FIRST_LOOK_S", 0.02)
    watched = Watch(asyncio.get_running_loop())

    async def work() -> None:
        one = lazy()
        watched.add(one)
        try:
            with one:
                one.limit(0.03, Slow)
                await asyncio.Event().wait()
        finally:
            watched.discard(one)

    for _ in range(2):  # and again after nobody was there
        with pytest.raises(Slow):
            await work()
        await asyncio.sleep(0.02)


async def test_a_short_limit_does_not_wait_for_the_round() -> None:
    with pytest.raises(Slow), lazy() as watch:
        watch.limit(0.01, Slow)
        await asyncio.Event().wait()
    with pytest.raises(Late), lazy(0.01):
        await asyncio.Event().wait()


async def test_all_that_are_watched_can_be_ended_at_once() -> None:
    watched = Watch(asyncio.get_running_loop())

    async def work() -> None:
        one = lazy()
        watched.add(one)
        with one:
            await asyncio.Event().wait()

    tasks = [asyncio.create_task(work()) for _ in range(3)]
    await asyncio.sleep(0)
    watched.expire(Slow)
    assert [type(error) for error in await asyncio.gather(*tasks, return_exceptions=True)] == [Slow] * 3
