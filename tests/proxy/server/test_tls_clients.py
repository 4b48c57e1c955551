"""Clients over TLS: the fast lane speaks it itself, and goes on speaking it for those that aiohttp answers."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from proxy.config import TimeoutsConfig
from proxy.observe import lines
from proxy.server import fast as fast_module
from proxy.server.http import Limits
from tests.certificates import Pair, make_pair
from tests.fakes import FakeUpstream, chunk, hang, plain, stream, until
from tests.patience import PATIENCE_S
from tests.proxy.server.conftest import Proxy
from tests.proxy.server.test_fast_lane import CALLS, CHAT, answer_to, call, handed_over, next_answer, normal, request

__all__ = ["handed_over"]  # a fixture
pytestmark = pytest.mark.native

HEALTH = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"
Wire = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("listener"))


@pytest.fixture
def trust(pair: Pair) -> ssl.SSLContext:
    """The clients'."""
    return ssl.create_default_context(cafile=str(pair.cert))


@pytest.fixture
async def bare_and_sealed(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Proxy, Proxy]]:
    """The fast lane without TLS and with it."""
    monkeypatch.setattr(lines, "FLUSH_S", 0.001)
    async with FakeUpstream() as upstream, FakeUpstream() as remote:
        bare = Proxy(upstream, remote, tmp_path / "bare.log", fast=True)
        sealed = Proxy(upstream, remote, tmp_path / "sealed.log", fast=True, tls=pair.context())
        await bare.start()
        await sealed.start()
        yield bare, sealed
        await bare.stop()
        await sealed.stop()
        assert sealed.scheduler.all_returned_once


@pytest.fixture
async def proxy(bare_and_sealed: tuple[Proxy, Proxy]) -> Proxy:
    """The one with TLS."""
    return bare_and_sealed[1]


@pytest.fixture
async def wire(proxy: Proxy, trust: ssl.SSLContext) -> AsyncIterator[Wire]:
    """A client's connection that takes no more than it is asked to."""
    reader, writer = await asyncio.open_connection(*proxy.address, ssl=trust, limit=1024)
    yield reader, writer
    writer.close()


async def ask(proxy: Proxy, trust: ssl.SSLContext, data: bytes) -> bytes:
    """One answer on a new connection, which is ended as TLS demands."""
    reader, writer = await asyncio.open_connection(*proxy.address, ssl=trust)
    answer = await next_answer(reader, writer, data)
    writer.close()
    await writer.wait_closed()
    return answer


@pytest.mark.parametrize("name", CALLS)
async def test_a_call_is_answered_as_without_tls(
    bare_and_sealed: tuple[Proxy, Proxy], trust: ssl.SSLContext, name: str
) -> None:
    bare, sealed = bare_and_sealed
    behave, data = CALLS[name]
    bare.upstream.behave = bare.remote.behave = behave
    expected = normal(await answer_to(bare, data))
    found = normal(await ask(sealed, trust, data))
    if name == "a stream of comments":
        expected, found = (expected[0][:1], expected[1]), (found[0][:1], found[1])
    assert found == expected
    await sealed.settled()
    (line,) = await sealed.lines()
    assert line["remote"] == "127.0.0.1"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_calls_over_either_tls_stay_in_the_fast_lane(
    proxy: Proxy, trust: ssl.SSLContext, handed_over: list[bytes], version: ssl.TLSVersion
) -> None:
    trust.minimum_version = trust.maximum_version = version
    reader, writer = await asyncio.open_connection(*proxy.address, ssl=trust)
    for name in ("a chat", "a remote stream", "embeddings", "a large answer", "a stream", "a chat"):
        proxy.upstream.behave = proxy.remote.behave = CALLS[name][0]
        assert (await next_answer(reader, writer, CALLS[name][1])).startswith(b"HTTP/1.1 200 ")
    writer.close()
    assert handed_over == []


async def test_a_connection_goes_on_with_aiohttp_and_its_tls_stays_here(proxy: Proxy, wire: Wire) -> None:
    reader, writer = wire
    for data in (request(call()), HEALTH, request(call()), HEALTH, request(call("none"))):
        answer = await next_answer(reader, writer, data)
        assert answer.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 404 "))
    await proxy.settled()
    assert {line["remote"] for line in await proxy.lines()} == {"127.0.0.1"}


async def test_large_requests_and_answers_pass_whole_in_either_lane(proxy: Proxy, wire: Wire) -> None:
    async def echo(_: Any, body: bytes) -> web.StreamResponse:
        return web.Response(body=body, content_type="application/json")

    proxy.upstream.behave = echo
    reader, writer = wire
    for size in (10, 16_384, 100_000, 200_000, 700_000, 100_000):  # the last but one is for aiohttp, and all after it
        data = request(call(messages=[{"role": "user", "content": "abcdefghi" * (size // 9)}]))
        answer = await next_answer(reader, writer, data)
        assert answer.endswith(data.partition(b"\r\n\r\n")[2].partition(b'"messages"')[2])


class Cut:
    """A client whose bytes on the wire are cut anywhere."""

    def __init__(self, proxy: Proxy, trust: ssl.SSLContext, piece: int) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = trust.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")
        self.socket = socket.create_connection(proxy.address)
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.piece = piece

    async def answer_to(self, data: bytes, end: bytes) -> bytes:
        """The request goes out together with the last of the handshake."""
        loop, got = asyncio.get_running_loop(), b""
        shaken = False
        while not got.endswith(end):
            try:
                if not shaken:
                    self.tls.do_handshake()
                    shaken = True
                    self.tls.write(data)
                got += self.tls.read(65536)
            except ssl.SSLWantReadError:
                said = self.outgoing.read()
                for at in range(0, len(said), self.piece):
                    await loop.sock_sendall(self.socket, said[at : at + self.piece])
                    await asyncio.sleep(0)
                self.incoming.write(await loop.sock_recv(self.socket, self.piece))
        self.socket.close()
        return got


@pytest.mark.parametrize("piece", [1, 3, 50, 1 << 20])
async def test_any_cut_of_the_wire_gives_one_request(
    proxy: Proxy, trust: ssl.SSLContext, handed_over: list[bytes], piece: int
) -> None:
    got = await Cut(proxy, trust, piece).answer_to(request(call()), b"}")
    assert got.startswith(b"HTTP/1.1 200 ")
    assert handed_over == []
    proxy.upstream.behave = stream()
    got = await Cut(proxy, trust, piece).answer_to(request(call(stream=True)), b"\r\n0\r\n\r\n")
    assert b"[DONE]" in got
    assert (await Cut(proxy, trust, piece).answer_to(HEALTH, b"ok\n")).startswith(b"HTTP/1.1 200 ")


# ---- clients that are slow, or leave


def streaming_call(*, over: bool) -> bytes:
    """A streaming call that the fast lane answers, or does not recognise."""
    return request(call(stream=True), CHAT, *([b"x-vramp-deadline-ms: 60000"] if over else []))


class Flood:
    """An upstream that streams without an end, and knows how much it has got rid of."""

    def __init__(self) -> None:
        self.sent = 0

    async def __call__(self, web_request: web.BaseRequest, _: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(web_request)
        piece = chunk("x" * 50_000)
        while True:
            await response.write(piece)
            self.sent += len(piece)

    async def still(self) -> None:
        """Return when nothing has gone for a while."""
        before = -1
        while before != self.sent or not self.sent:
            before = self.sent
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("over", [False, True])
async def test_a_slow_client_pauses_its_own_upstream_and_nobody_elses(
    proxy: Proxy, trust: ssl.SSLContext, wire: Wire, over: bool
) -> None:
    flood = proxy.upstream.behave = Flood()
    reader, writer = wire
    writer.write(streaming_call(over=over))
    await reader.readuntil(b"\r\n\r\n")
    await flood.still()
    assert flood.sent < 48 << 20
    assert (await ask(proxy, trust, request(call("far")))).startswith(b"HTTP/1.1 200 ")
    before = flood.sent
    await reader.readexactly(8 << 20)
    await until(lambda: flood.sent > before)
    writer.close()
    await asyncio.wait_for(proxy.upstream.aborted.wait(), PATIENCE_S)
    await proxy.settled()
    assert [line["status"] for line in await proxy.lines()] == [200, 499]


@pytest.mark.parametrize("over", [False, True])
async def test_a_client_that_takes_nothing_is_dropped_and_recorded(
    pair: Pair, tmp_path: Path, trust: ssl.SSLContext, over: bool
) -> None:
    async with FakeUpstream() as upstream:
        proxy = Proxy(upstream, upstream, tmp_path / "access.log", fast=True, tls=pair.context())
        proxy.limits = Limits(write_stall_s=0.2)
        await proxy.start()
        proxy.configure(timeouts=TimeoutsConfig(write_stall_s=0.2))
        upstream.behave = Flood()
        _, writer = await asyncio.open_connection(*proxy.address, ssl=trust, limit=1024)
        writer.write(streaming_call(over=over))
        await asyncio.wait_for(upstream.aborted.wait(), PATIENCE_S)
        await proxy.settled()
        assert [line["status"] for line in await proxy.lines()] == [499]
        writer.transport.abort()
        await proxy.stop()


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("orderly", [False, True])
async def test_a_client_that_leaves_ends_the_work_upstream(
    proxy: Proxy, trust: ssl.SSLContext, over: bool, streaming: bool, orderly: bool
) -> None:
    proxy.upstream.behave = stream(chunk("a"), then=hang) if streaming else hang  # type: ignore[arg-type]
    reader, writer = await asyncio.open_connection(*proxy.address, ssl=trust)
    writer.write(streaming_call(over=over))
    await proxy.upstream.arrived.wait()
    if streaming:
        await reader.readuntil(b"\r\n\r\n")
    writer.close() if orderly else writer.transport.abort()
    await asyncio.wait_for(proxy.upstream.aborted.wait(), PATIENCE_S)
    await proxy.settled()
    assert [line["status"] for line in await proxy.lines()] == [499]
    proxy.upstream.behave = plain()
    assert (await ask(proxy, trust, request(call()))).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01", b"SSH-2.0-x\r\n", b"\x16\x03\x01\x00\x05hello"])
async def test_what_comes_to_no_tls_leaves_nothing(
    proxy: Proxy, trust: ssl.SSLContext, handed_over: list[bytes], said: bytes
) -> None:
    reader, writer = await asyncio.open_connection(*proxy.address)
    writer.write(said)
    if len(said) > 3:
        assert b"HTTP" not in await reader.read()
    writer.close()
    assert (await ask(proxy, trust, request(call()))).startswith(b"HTTP/1.1 200 ")
    assert handed_over == []


@pytest.mark.parametrize("said", [HEALTH, request(call()), request(call(content="x" * 300_000))], ids=len)
async def test_plain_http_is_told_to_use_https(proxy: Proxy, trust: ssl.SSLContext, said: bytes) -> None:
    reader, writer = await asyncio.open_connection(*proxy.address)
    writer.write(said)
    head, body = (await reader.readuntil(b"}}")).split(b"\r\n\r\n")
    assert b" 400 " in head.partition(b"\r\n")[0]
    assert json.loads(body)["error"]["code"] == "https_required"
    assert "use https://" in json.loads(body)["error"]["message"]
    assert (proxy.upstream.requests, proxy.scheduler.tickets) == ([], [])
    writer.close()
    assert (await ask(proxy, trust, request(call()))).startswith(b"HTTP/1.1 200 ")
    await proxy.settled()
    assert [line["status"] for line in await proxy.lines()] == [400, 200]


async def test_a_handshake_that_takes_too_long_is_ended(
    pair: Pair, trust: ssl.SSLContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_module, "HANDSHAKE_S", 0.5)
    async with FakeUpstream() as upstream:
        proxy = Proxy(upstream, upstream, tmp_path / "access.log", fast=True, tls=pair.context())
        await proxy.start()
        reader, writer = await asyncio.open_connection(*proxy.address)
        writer.write(b"\x16\x03\x01")
        assert await reader.read() == b""
        writer.close()
        reader, writer = await asyncio.open_connection(*proxy.address, ssl=trust)
        await asyncio.sleep(0.8)  # a client that has shaken hands may wait with its first request
        assert (await next_answer(reader, writer, request(call()))).startswith(b"HTTP/1.1 200 ")
        writer.close()
        await proxy.stop()


async def test_a_stop_lets_last_words_through(proxy: Proxy, trust: ssl.SSLContext) -> None:
    proxy.upstream.behave = stream(chunk("a"), then=hang)  # type: ignore[arg-type]
    asking = [asyncio.create_task(ask(proxy, trust, streaming_call(over=over))) for over in (False, True)]
    await until(lambda: len(proxy.upstream.requests) == 2 and proxy.handler.in_flight == 2)
    await asyncio.sleep(0.3)  # their first events have arrived; no counter tells
    await proxy.server.close()
    for answer in await asyncio.gather(*asking):
        assert b"stopping" in answer


async def test_connections_that_come_and_go_leave_nothing(proxy: Proxy, trust: ssl.SSLContext) -> None:
    def held() -> tuple[int, int]:
        gc.collect()
        known = [each for each in gc.get_objects() if type(each) is ssl.SSLObject]  # isinstance loads lazy modules
        return len(os.listdir("/proc/self/fd")), sum(each.server_side for each in known)

    for data in (request(call()), HEALTH):
        await ask(proxy, trust, data)
    before = held()
    for _ in range(15):
        for data in (request(call()), HEALTH):
            await ask(proxy, trust, data)
            reader, writer = await asyncio.open_connection(*proxy.address, ssl=trust)
            await next_answer(reader, writer, data)
            writer.transport.abort()
    await until(lambda: all(now <= then for now, then in zip(held(), before, strict=True)))


async def test_processes_that_share_a_listener_speak_tls_there(
    pair: Pair, trust: ssl.SSLContext, tmp_path: Path
) -> None:
    async with FakeUpstream() as upstream:
        proxy = Proxy(upstream, upstream, tmp_path / "access.log", fast=True, tls=pair.context())
        proxy.limits = Limits(shared=True)
        await proxy.start()
        for data in (request(call()), HEALTH):
            assert (await ask(proxy, trust, data)).startswith(b"HTTP/1.1 200 ")
        await proxy.stop()
