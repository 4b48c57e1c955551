"""The listener as operators see it: models, health, drain, reload, log, metrics."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest
from prometheus_client import generate_latest

from tests.fakes import DONE, chunk, stream, until
from tests.proxy.server.conftest import Proxy
from tests.proxy.server.ends import both_kinds_in_flight


async def test_models_are_listed_in_openais_shape_with_our_profile(proxy: Proxy) -> None:
    body = await (await proxy.session.get("/v1/models")).json()
    assert body["object"] == "list"
    assert [each["id"] for each in body["data"]] == ["demo-chat", "demo-embed", "both", "far"]
    both = body["data"][2]
    assert both["object"] == "model"
    assert isinstance(both["created"], int)
    assert both["vramp"]["deployments"] == [
        {"name": "both", "backend": "local/engines", "state": "ready"},
        {"name": "both@cloud", "backend": "remote/cloud", "state": "ready"},
    ]
    assert await (await proxy.session.get("/v1/models/both")).json() == both


async def test_an_unlisted_model_is_a_404(proxy: Proxy) -> None:
    response = await proxy.session.get("/v1/models/org%2Fnope")
    assert response.status == 404
    assert (await response.json())["error"]["code"] == "model_not_found"


async def test_health_stays_and_readiness_goes_while_draining(proxy: Proxy) -> None:
    assert (await proxy.session.get("/healthz")).status == 200
    assert (await proxy.session.get("/readyz")).status == 200
    assert await proxy.server.drain(1.0)
    assert (await proxy.session.get("/healthz")).status == 200
    assert (await proxy.session.get("/readyz")).status == 503


async def test_a_drain_finishes_streams_and_refuses_new_calls(proxy: Proxy) -> None:
    go = asyncio.Event()

    async def wait(_: object) -> None:
        await go.wait()

    proxy.upstream.behave = stream(chunk("Hel"), chunk(None, "stop") + DONE, then=wait)
    response = await proxy.chat(stream=True)
    await response.content.readuntil(b"\n\n")
    drained = asyncio.create_task(proxy.server.drain(2.0))
    await asyncio.sleep(0)
    refused = await proxy.chat()
    assert refused.status == 503
    assert refused.headers["x-should-retry"] == "true"
    assert (await refused.json())["error"]["code"] == "stopping"
    assert refused.headers["connection"] == "close"
    assert not drained.done()
    go.set()
    assert (await response.read()).endswith(DONE)
    assert await drained


async def test_a_drain_that_takes_too_long_says_so_and_close_tells_the_rest(proxy: Proxy) -> None:
    streaming, waiting = await both_kinds_in_flight(proxy)
    assert not await proxy.server.drain(0.05)
    closing = asyncio.create_task(proxy.server.close())
    assert b'"code":"stopping"' in await streaming.read()
    response = await waiting
    assert (response.status, (await response.json())["error"]["code"]) == (503, "stopping")
    await closing
    await until(lambda: proxy.upstream.aborts == 2)
    assert proxy.scheduler.all_returned_once


async def test_a_server_that_leaves_answers_on_open_connections_once_more_and_accepts_no_others(proxy: Proxy) -> None:
    assert (await proxy.chat()).headers.get("connection") != "close"
    proxy.server.stop_accepting()
    async with await proxy.chat() as last:
        assert (last.status, last.headers["connection"]) == (200, "close")
    with pytest.raises(aiohttp.ClientConnectorError):
        async with aiohttp.ClientSession(proxy.url) as session:
            await session.get("/healthz")


async def test_a_reload_holds_from_the_next_request_on(proxy: Proxy) -> None:
    proxy.upstream.behave = stream(chunk("Hel"), then=lambda _: asyncio.sleep(0.05))
    old = await proxy.chat(stream=True)
    proxy.configure(models=proxy.config().models[1:])
    assert (await proxy.chat()).status == 404
    assert (await old.read()).startswith(chunk("Hel"))
    proxy.configure()
    await proxy.still_works()


async def test_every_request_has_one_line_and_one_count(proxy: Proxy) -> None:
    await proxy.chat()
    await proxy.chat(model="nope")
    await proxy.session.get("/nowhere")
    await proxy.raw(b"nonsense\r\n\r\n")
    await proxy.settled()
    lines = await proxy.lines()
    assert [line["status"] for line in lines] == [200, 404, 404, 400]
    assert lines[0] | {"model": "demo-chat", "backend": "local/engines", "tenant": "local", "attempts": 1} == lines[0]
    assert (lines[0]["prompt_tokens"], lines[0]["output_tokens"]) == (7, 2)
    assert lines[1]["error"] == "model_not_found"
    value = proxy.metrics.registry.get_sample_value
    chat = {"model": "demo-chat", "backend": "local/engines", "class": "standard", "status_class": "2xx"}
    assert value("vramp_requests_total", chat) == 1
    other = {"model": "other", "backend": "none", "class": "none", "status_class": "4xx"}
    assert value("vramp_requests_total", other) == 3
    assert value("vramp_tokens_total", {"model": "demo-chat", "type": "output"}) == 2
    assert value("vramp_requests_in_flight") == 0
    assert b"nope" not in generate_latest(proxy.metrics.registry)


async def test_pipelined_requests_are_answered_in_order(proxy: Proxy) -> None:
    reader, writer = await asyncio.open_connection(*proxy.address)
    writer.write(
        b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"
        b"GET /nowhere HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    )
    answers = await reader.read()
    assert answers.index(b" 200 ") < answers.index(b" 404 ")
    writer.close()


@pytest.mark.parametrize("kept", [b"", b"connection: keep-alive\r\n"])
async def test_a_stream_to_an_http_1_0_client_ends_with_its_connection(proxy: Proxy, kept: bytes) -> None:
    proxy.upstream.behave = stream()
    body = b'{"model":"demo-chat","messages":[1],"stream":true}'
    reader, writer = await asyncio.open_connection(*proxy.address)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.0\r\ncontent-type: application/json\r\n%b"
        b"content-length: %d\r\n\r\n" % (kept, len(body)) + body
    )
    answer = await reader.read()
    assert answer.endswith(DONE)
    assert b"chunked" not in answer.lower()
    writer.close()


async def test_an_http_1_0_client_may_keep_its_connection(proxy: Proxy) -> None:
    reader, writer = await asyncio.open_connection(*proxy.address)
    for _ in range(2):
        writer.write(b"GET /healthz HTTP/1.0\r\nconnection: keep-alive\r\n\r\n")
        assert b"\r\nConnection: keep-alive\r\n" in await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(3) == b"ok\n"
    writer.write(b"GET /healthz HTTP/1.0\r\n\r\n")
    assert (await reader.read()).endswith(b"\r\n\r\nok\n")
    writer.close()
