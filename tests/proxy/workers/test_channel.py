"""The socket between proxy and worker: whole messages in order, one write a turn, and an end that is noticed once."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import msgspec
import pytest

from proxy.workers.channel import Channel
from tests.fakes import until


class Word(msgspec.Struct, frozen=True, tag=True, array_like=True):
    text: str


class Number(msgspec.Struct, frozen=True, tag=True, array_like=True):
    value: int


class End:
    def __init__(self) -> None:
        self.heard: list[object] = []
        self.lost = 0
        self.channel: Channel[Word | Number] = Channel(Word | Number, self.heard.append, self._on_lost)

    def _on_lost(self) -> None:
        self.lost += 1


@pytest.fixture
async def ends() -> AsyncIterator[tuple[End, End]]:
    one, other = End(), End()
    for end, sock in zip((one, other), socket.socketpair(), strict=True):
        await end.channel.open(sock)
    yield one, other
    for end in (one, other):
        end.channel.close()
    await asyncio.sleep(0)


async def test_messages_of_any_size_arrive_whole_and_in_order(ends: tuple[End, End]) -> None:
    one, other = ends
    sent: list[Word | Number] = [Word("x" * 300_000), Number(1), *(Number(n) for n in range(50)), Word("")]
    for at, message in enumerate(sent):
        one.channel.send(message)
        if at % 7 == 0:
            await asyncio.sleep(0)
    other.channel.send(Word("the other way"))
    await until(lambda: len(other.heard) == len(sent) and len(one.heard) == 1)
    assert other.heard == sent
    assert one.heard == [Word("the other way")]


async def test_what_is_said_in_one_turn_is_one_frame() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    end = End()
    await end.channel.open(ours)
    for n in range(3):
        end.channel.send(Number(n))
    await asyncio.sleep(0)
    frame = theirs.recv(4096)
    assert int.from_bytes(frame[:4], "big") == len(frame) - 4
    assert msgspec.msgpack.decode(frame[4:]) == [["Number", 0], ["Number", 1], ["Number", 2]]
    end.channel.close()
    theirs.close()


async def test_a_frame_in_pieces_is_heard_when_it_is_whole() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    end = End()
    await end.channel.open(ours)
    body = msgspec.msgpack.encode([Word("hello"), Number(7)])
    for byte in len(body).to_bytes(4, "big") + body:
        assert end.heard == []
        theirs.send(bytes((byte,)))
        await asyncio.sleep(0)
    await until(lambda: end.heard == [Word("hello"), Number(7)])
    end.channel.close()
    theirs.close()


async def test_the_other_end_s_going_is_told_once_and_later_words_go_nowhere(ends: tuple[End, End]) -> None:
    one, other = ends
    one.channel.send(Word("last"))
    one.channel.close()
    await until(lambda: other.lost == 1)
    assert other.heard == [Word("last")]
    assert one.lost == 0, "who closes knows it"
    other.channel.send(Number(1))
    await asyncio.sleep(0)
    assert other.lost == 1


async def test_a_peer_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.workers.channel.MOST_UNSENT", 1 << 20)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    end = End()
    await end.channel.open(ours)
    end.channel.send(Word("x" * (4 << 20)))
    await until(lambda: end.lost == 1)
    theirs.close()


async def test_a_message_that_cannot_be_dealt_with_costs_nothing_but_itself(
    ends: tuple[End, End], caplog: pytest.LogCaptureFixture
) -> None:
    one, other = ends
    heard = other.heard.append

    def hear(message: Word | Number) -> None:
        if message == Number(2):
            raise LookupError("a bug")
        heard(message)

    other.channel._hear = hear
    for n in (1, 2, 3):
        one.channel.send(Number(n))
    await until(lambda: len(other.heard) == 2)
    assert other.heard == [Number(1), Number(3)]
    assert "Number" in caplog.text
