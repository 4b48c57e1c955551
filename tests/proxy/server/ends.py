"""Ways in which a call ends. What must be so after every one of them is tested over all of them."""

from __future__ import annotations

import asyncio

import aiohttp

from scheduler.model import RefusalCode
from tests.fakes import DONE, chunk, hang, plain, stream, until
from tests.proxy.server.conftest import Proxy


def request(*, streaming: bool) -> bytes:
    """A chat call as it goes over the wire."""
    body = b'{"model":"demo-chat","stream":%s,"messages":[{"role":"user","content":"Hi"}]}'
    body %= b"true" if streaming else b"false"
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


async def connect(proxy: Proxy, *, streaming: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A call on a connection of its own, which the test can close when it likes."""
    reader, writer = await asyncio.open_connection(*proxy.address)
    writer.write(request(streaming=streaming))
    return reader, writer


async def both_kinds_in_flight(proxy: Proxy) -> tuple[aiohttp.ClientResponse, asyncio.Task[aiohttp.ClientResponse]]:
    """A stream that has begun, and a call whose answer has not."""
    proxy.upstream.behave = stream(chunk("Hel"), then=hang)
    streaming = await proxy.chat(stream=True)
    await streaming.content.readuntil(b"\n\n")
    proxy.upstream.behave = hang
    waiting = asyncio.create_task(proxy.chat())
    await until(lambda: len(proxy.upstream.requests) == 2)
    return streaming, waiting


async def answered(proxy: Proxy) -> None:
    assert (await proxy.chat()).status == 200


async def streamed(proxy: Proxy) -> None:
    proxy.upstream.behave = stream()
    assert (await (await proxy.chat(stream=True)).read()).endswith(DONE)


async def left_while_queued(proxy: Proxy) -> None:
    proxy.scheduler.base_url = None
    _, writer = await connect(proxy, streaming=False)
    await proxy.scheduler.submitted.wait()
    writer.close()


async def left_before_the_first_byte(proxy: Proxy) -> None:
    proxy.upstream.behave = hang
    _, writer = await connect(proxy, streaming=False)
    await proxy.upstream.arrived.wait()
    writer.close()


async def left_in_mid_stream(proxy: Proxy) -> None:
    proxy.upstream.behave = stream(chunk("Hel"), then=hang)
    reader, writer = await connect(proxy, streaming=True)
    await reader.readuntil(b"Hel")
    writer.close()


async def refused_by_the_scheduler(proxy: Proxy) -> None:
    proxy.scheduler.refusal = (RefusalCode.QUEUE_FULL, 1.0)
    assert (await proxy.chat()).status == 503


async def failed_upstream(proxy: Proxy) -> None:
    proxy.upstream.behave = plain(b"<html>", status=500)
    assert (await proxy.chat()).status == 502


async def broke_off_in_mid_stream(proxy: Proxy) -> None:
    proxy.upstream.behave = stream(chunk("Hel"))
    assert b"error" in await (await proxy.chat(stream=True)).read()
