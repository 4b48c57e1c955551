"""The keeper's loop and channels, without processes."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator

import pytest

from scheduler.engines.keeper_loop import PACKET_LIMIT, Channel, Loop, Message


class Pair:
    """A channel and the other side's socket."""

    def __init__(self) -> None:
        self.loop = Loop()
        ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.theirs.setblocking(False)
        self.heard: list[Message] = []
        self.said: list[str] = []
        self.channel = Channel(self.loop, ours, self.hear, self.said.append)

    def hear(self, message: Message) -> None:
        self.heard.append(message)
        message["op"]  # as the real ones do: KeyError for nonsense

    def read(self) -> Message | None:
        try:
            message: Message = json.loads(self.theirs.recv(1 << 20))
        except BlockingIOError:
            return None
        return message


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.channel.close()
    made.theirs.close()
    made.loop.close()


def test_who_does_not_read_delays_nobody_and_loses_nothing(pair: Pair) -> None:
    for number in range(2000):
        pair.channel.send({"op": "exited", "n": number, "meta": "x" * 500})
    read: list[int] = []
    while len(read) < 2000:
        while (message := pair.read()) is not None:
            read.append(message["n"])
        if len(read) < 2000:
            pair.loop.turn()
    assert read == list(range(2000))


@pytest.mark.parametrize("packet", [b"{", b"\xff", b"7", b"[]", b"{}", b"null"])
def test_nonsense_is_refused_and_what_follows_is_heard(pair: Pair, packet: bytes) -> None:
    pair.theirs.send(packet)
    pair.theirs.send(b'{"op": "list"}')
    pair.loop.turn()
    pair.loop.turn()
    assert pair.heard[-1] == {"op": "list"}
    assert len(pair.said) == 1


def test_an_answer_that_is_too_long_is_answered_as_failed(pair: Pair) -> None:
    pair.channel.send({"op": "listed", "id": "7", "engines": "x" * PACKET_LIMIT})
    assert pair.read() == {"op": "failed", "id": "7", "reason": "the answer is too long"}


def test_the_longest_answer_is_one_packet(pair: Pair) -> None:
    frame = len(json.dumps({"op": "listed", "x": ""}))
    pair.channel.send({"op": "listed", "x": "x" * (PACKET_LIMIT - frame)})
    message = pair.read()
    assert message is not None
    assert len(message["x"]) == PACKET_LIMIT - frame


def test_what_was_sent_before_the_end_is_still_heard(pair: Pair) -> None:
    pair.theirs.send(b'{"op": "forked"}')
    pair.theirs.close()
    pair.channel.drain()
    assert pair.heard == [{"op": "forked"}]
    assert not pair.channel.is_open
    pair.channel.send({"op": "fork"})
    pair.channel.close()


def test_timers_run_in_the_order_of_their_times(pair: Pair) -> None:
    ran: list[int] = []
    pair.loop.after(0.002, lambda: ran.append(2))
    pair.loop.after(0.0, lambda: ran.append(1))
    while len(ran) < 2:
        pair.loop.turn()
    assert ran == [1, 2]


def test_a_signal_is_handled_in_the_loop_and_not_before(pair: Pair) -> None:
    came: list[int] = []
    before = signal.getsignal(signal.SIGUSR1)
    try:
        pair.loop.on_signals({signal.SIGUSR1: lambda: came.append(1)})
        os.kill(os.getpid(), signal.SIGUSR1)
        assert came == []
        pair.loop.turn()
        assert came == [1]
    finally:
        signal.signal(signal.SIGUSR1, before)
