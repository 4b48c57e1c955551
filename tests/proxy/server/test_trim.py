from __future__ import annotations

import asyncio
import sys

import pytest

from proxy.server import trim
from proxy.server.trim import CROWD, LOOKS, Trimmer, malloc_trim
from tests.fakes import until


class World:
    def __init__(self) -> None:
        self.in_flight = 0
        self.given = 0
        self.trimmer = Trimmer(lambda: self.in_flight, self.give_back)

    def give_back(self) -> None:
        self.given += 1

    def see(self, *crowds: int) -> int:
        for self.in_flight in crowds:
            self.trimmer.look()
        return self.given


def test_memory_goes_back_when_a_crowd_has_gone_and_for_a_minute_after() -> None:
    world = World()
    assert world.see(0, CROWD, 10 * CROWD, 9 * CROWD, 3 * CROWD) == 0
    assert world.see(1) == 1
    assert world.see(*[0] * 100) == LOOKS


def test_a_few_requests_are_no_crowd() -> None:
    assert World().see(CROWD - 1, 0, CROWD - 1, 0) == 0


def test_a_crowd_that_stays_keeps_its_memory() -> None:
    assert World().see(4 * CROWD, 3 * CROWD, 2 * CROWD, 4 * CROWD) == 0


def test_every_crowd_is_followed_by_a_look() -> None:
    world = World()
    world.see(CROWD, *[0] * 100)
    assert world.see(CROWD, *[0] * 100) == 2 * LOOKS


async def test_looking_goes_on_until_it_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trim, "LOOK_S", 0.001)
    world = World()
    world.in_flight = CROWD
    world.trimmer.start()
    world.in_flight = 0
    await until(lambda: world.given >= 2)
    world.trimmer.stop()
    seen = world.given
    await asyncio.sleep(0.01)
    assert world.given == seen
    world.trimmer.stop()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_the_systems_allocator_can_be_asked() -> None:
    give_back = malloc_trim()
    assert give_back is None or give_back() in (0, 1)
