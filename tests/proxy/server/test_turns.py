"""Several processes accept from one socket: each gets its part, and nobody waits for one that hangs."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

import pytest

from proxy.server import turns
from proxy.server.turns import Turns
from tests.fakes import until


class Process:
    """One that accepts, with a copy of the socket as a process of its own has."""

    def __init__(self, listening: socket.socket) -> None:
        self.listening = listening.dup()
        self.listening.setblocking(False)
        self.taken: list[socket.socket] = []
        self.asked: list[int] = []
        self.descriptors_left = True
        self.turns = Turns(self.listening, self.accept)

    def accept(self, most: int) -> int:
        self.asked.append(most)
        if not self.descriptors_left:
            return -1
        before = len(self.taken)
        with suppress(BlockingIOError):
            while len(self.taken) - before < most:
                self.taken.append(self.listening.accept()[0])
        return len(self.taken) - before

    def close(self) -> None:
        self.turns.close()
        for each in (self.listening, *self.taken):
            each.close()


class Clients:
    def __init__(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.open: list[socket.socket] = []

    def connect(self, count: int) -> None:
        self.open += [socket.create_connection(self.listening.getsockname()) for _ in range(count)]


@pytest.fixture
def clients() -> Iterator[Clients]:
    made = Clients()
    yield made
    for each in (made.listening, *made.open):
        each.close()


@pytest.fixture
async def processes(clients: Clients, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[Process]]:
    monkeypatch.setattr(turns, "NO_DESCRIPTORS_S", 0.001)
    made = [Process(clients.listening) for _ in range(2)]
    yield made
    for each in made:
        each.close()


async def test_a_burst_is_divided(processes: list[Process], clients: Clients) -> None:
    clients.connect(40)
    await until(lambda: sum(len(each.taken) for each in processes) == 40)
    assert min(len(each.taken) for each in processes) >= 10


async def test_nobody_waits_for_a_process_that_hangs(processes: list[Process], clients: Clients) -> None:
    processes[0].turns.close()
    for count in (1, 100, 3):
        before = len(processes[1].taken)
        clients.connect(count)
        await until(lambda want=before + count: len(processes[1].taken) == want)  # type: ignore[misc]
    assert not processes[0].taken


async def test_a_flood_is_taken_in_growing_parts_and_a_calm_one_by_one(
    processes: list[Process], clients: Clients
) -> None:
    processes[0].turns.close()
    clients.connect(100)
    await until(lambda: len(processes[1].taken) == 100)
    assert processes[1].asked[:6] == [1, 2, 4, 8, 16, 32]
    await until(lambda: processes[1].asked[6:] == [64, 64])  # the second time nobody was there
    clients.connect(1)
    await until(lambda: len(processes[1].taken) == 101)
    assert processes[1].asked[8] == 1


async def test_without_descriptors_it_is_tried_again(processes: list[Process], clients: Clients) -> None:
    processes[0].turns.close()
    processes[1].descriptors_left = False
    clients.connect(3)
    await until(lambda: len(processes[1].asked) >= 3)
    processes[1].descriptors_left = True
    await until(lambda: len(processes[1].taken) == 3)


async def test_after_its_end_it_takes_nothing_and_others_do(processes: list[Process], clients: Clients) -> None:
    clients.connect(1)
    await until(lambda: sum(len(each.taken) for each in processes) == 1)
    first = next(each for each in processes if each.taken)
    other = next(each for each in processes if not each.taken)
    first.turns.close()  # in its pause
    clients.connect(5)
    await until(lambda: len(other.taken) == 5)
    assert len(first.taken) == 1
