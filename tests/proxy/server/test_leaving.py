"""A client that leaves, or takes nothing, ends its own request everywhere: here, in the queue, upstream."""

from __future__ import annotations

import asyncio
import socket

import pytest
from aiohttp import web

from proxy.config import TimeoutsConfig
from tests.fakes import chunk, hang, stream, until
from tests.patience import PATIENCE_S
from tests.proxy.server.conftest import Proxy
from tests.proxy.server.ends import connect, request


@pytest.mark.parametrize("streaming", [False, True])
async def test_leaving_before_the_first_byte_cancels_upstream(proxy: Proxy, streaming: bool) -> None:
    proxy.upstream.behave = hang
    _, writer = await connect(proxy, streaming=streaming)
    await proxy.upstream.arrived.wait()
    writer.close()
    await asyncio.wait_for(proxy.upstream.aborted.wait(), PATIENCE_S)
    await proxy.settled()
    assert proxy.scheduler.all_returned_once
    line = (await proxy.lines())[-1]
    assert (line["status"], line["error"]) == (499, "client_left")
    await proxy.still_works()


async def test_leaving_in_mid_stream_cancels_upstream(proxy: Proxy) -> None:
    proxy.upstream.behave = stream(chunk("Hel"), then=hang)
    reader, writer = await connect(proxy, streaming=True)
    await reader.readuntil(b"Hel")
    writer.close()
    await asyncio.wait_for(proxy.upstream.aborted.wait(), PATIENCE_S)
    await proxy.settled()
    assert proxy.scheduler.all_returned_once
    assert (await proxy.lines())[-1]["status"] == 499
    await proxy.still_works()


@pytest.mark.parametrize("streaming", [False, True])
async def test_leaving_while_waiting_withdraws_the_ticket(proxy: Proxy, streaming: bool) -> None:
    proxy.scheduler.base_url = None
    _, writer = await connect(proxy, streaming=streaming)
    await proxy.scheduler.submitted.wait()
    writer.close()
    await proxy.settled()
    assert proxy.scheduler.all_returned_once
    assert proxy.upstream.requests == []
    await proxy.still_works()


async def test_leaving_a_remote_call_cancels_it_too(proxy: Proxy) -> None:
    proxy.remote.behave = hang
    asking = asyncio.create_task(proxy.chat(model="far"))
    await proxy.remote.arrived.wait()
    asking.cancel()
    await asyncio.wait_for(proxy.remote.aborted.wait(), PATIENCE_S)
    await proxy.settled()
    await proxy.still_works()


async def test_an_upload_cut_short_leaves_nothing_behind(proxy: Proxy) -> None:
    _, writer = await asyncio.open_connection(*proxy.address)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: 100\r\n\r\nhalf"
    )
    await writer.drain()
    await until(lambda: proxy.handler.in_flight > 0)
    writer.close()
    await proxy.settled()
    await proxy.still_works()


class Flood:
    """An upstream that sends for ever and counts what was taken from it."""

    def __init__(self) -> None:
        self.sent = 0
        self.last_progress = 0.0

    async def __call__(self, request: web.BaseRequest, _: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        event = chunk("x" * 16_000)
        while True:
            await response.write(event)
            self.sent += len(event)
            self.last_progress = asyncio.get_running_loop().time()


async def asked_with_a_small_buffer(proxy: Proxy) -> socket.socket:
    """A call whose answer soon has nowhere to go."""
    client, loop = socket.socket(), asyncio.get_running_loop()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    await loop.sock_connect(client, proxy.address)
    await loop.sock_sendall(client, request(streaming=True))
    return client


async def test_a_client_that_never_reads_is_closed_and_its_upstream_cancelled(proxy: Proxy) -> None:
    proxy.configure(timeouts=TimeoutsConfig(write_stall_s=0.2))
    flood = Flood()
    proxy.upstream.behave = flood
    with await asked_with_a_small_buffer(proxy):
        await asyncio.wait_for(proxy.upstream.aborted.wait(), PATIENCE_S)
        await proxy.settled()
    line = (await proxy.lines())[-1]
    assert (line["status"], line["error"]) == (499, "client_stalled")
    # Two loopback socket pairs, whose buffers grow to some MB, and ours; without a bound it would be hundreds by then.
    assert flood.sent < 32 << 20
    proxy.configure()
    await proxy.still_works()


async def test_a_slow_client_slows_only_its_own_stream(proxy: Proxy) -> None:
    flood = Flood()
    proxy.upstream.behave = flood
    with await asked_with_a_small_buffer(proxy) as client:
        await proxy.upstream.arrived.wait()
        await until_still(flood)
        stalled_at = flood.sent
        await proxy.still_works()  # another client is served at full speed meanwhile
        assert flood.sent == stalled_at
        taken = 0
        while flood.sent == stalled_at:  # taking some lets some more come
            taken += len(await asyncio.get_running_loop().sock_recv(client, 1 << 20))
        assert taken < 16 << 20
    await proxy.settled()


async def until_still(flood: Flood) -> None:
    loop = asyncio.get_running_loop()
    await until(lambda: flood.sent > 0 and loop.time() - flood.last_progress >= 0.15)
