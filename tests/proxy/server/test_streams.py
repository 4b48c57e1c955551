"""Streams: the bytes, their ends, and what is said when an end comes too early."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from proxy.config import TimeoutsConfig
from tests.fakes import DONE, STREAM, USAGE_CHUNK, chunk, die, hang, plain, stream
from tests.patience import PATIENCE_S
from tests.proxy.server.conftest import Proxy


def last_event(body: bytes) -> bytes:
    return body.removesuffix(b"\n\n").rpartition(b"\n\n")[2]


def error_of(event: bytes) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(event.removeprefix(b"data: "))["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 1000])
async def test_a_stream_split_anywhere_comes_back_byte_for_byte(proxy: Proxy, size: int) -> None:
    whole = chunk("Grüße, 世界 🙂") + b": a comment\n\n" + chunk("\u2028") + STREAM
    proxy.upstream.behave = stream(*(whole[at : at + size] for at in range(0, len(whole), size)))
    response = await proxy.chat(stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert await response.read() == whole


async def test_usage_is_counted_whether_the_client_asked_for_it_or_not(proxy: Proxy) -> None:
    proxy.upstream.behave = stream()
    for options in ({}, {"stream_options": {"include_usage": True}}, {"stream_options": {"include_usage": False}}):
        response = await proxy.chat(stream=True, **options)
        body = await response.read()
        assert (USAGE_CHUNK in body) == bool(options.get("stream_options", {}).get("include_usage"))
        assert proxy.upstream.last_body["stream_options"]["include_usage"] is True
    await proxy.settled()
    for line in await proxy.lines():
        assert (line["prompt_tokens"], line["output_tokens"], line["finish_reason"]) == (7, 2, "stop")


async def test_an_upstream_that_dies_in_mid_stream_ends_in_an_error_event(proxy: Proxy) -> None:
    proxy.upstream.behave = stream(chunk("Hel"), b'data: {"half', then=die)
    response = await proxy.chat(stream=True)
    assert response.status == 200
    body = await response.read()
    assert body.startswith(chunk("Hel"))
    assert b"half" not in body
    assert DONE not in body
    assert error_of(last_event(body))["code"] == "upstream_error"
    await proxy.settled()
    line = (await proxy.lines())[-1]
    assert (line["status"], line["error"]) == (200, "upstream_error")
    await proxy.still_works()


async def test_a_regular_end_without_a_reason_is_an_error_event_too(proxy: Proxy) -> None:
    proxy.upstream.behave = stream(chunk("Hel"))
    body = await (await proxy.chat(stream=True)).read()
    assert error_of(last_event(body))["code"] == "upstream_error"
    await proxy.still_works()


async def test_an_end_with_a_reason_but_without_done_is_passed_as_it_is(proxy: Proxy) -> None:
    proxy.upstream.behave = stream(chunk("Hel"), chunk(None, "stop"))
    assert await (await proxy.chat(stream=True)).read() == chunk("Hel") + chunk(None, "stop")


async def test_an_error_in_the_stream_passes_untouched_and_counts(proxy: Proxy) -> None:
    whole = chunk("Hel") + b'data: {"error": {"message": "EngineCore died", "code": 500}}\n\n' + DONE
    proxy.upstream.behave = stream(whole)
    assert await (await proxy.chat(stream=True)).read() == whole
    await proxy.settled()
    assert (await proxy.lines())[-1]["error"] == "upstream_error_event"
    assert proxy.metrics.registry.get_sample_value("vramp_stream_errors_total", {"model": "demo-chat"}) == 1


async def test_silence_in_mid_stream_ends_in_an_error_event(proxy: Proxy) -> None:
    proxy.configure(timeouts=TimeoutsConfig(idle_s=0.1))

    async def silence(request: web.BaseRequest) -> None:
        await hang(request)

    proxy.upstream.behave = stream(chunk("Hel"), then=silence)
    body = await (await proxy.chat(stream=True)).read()
    assert error_of(last_event(body))["code"] == "upstream_idle"
    await asyncio.wait_for(proxy.upstream.aborted.wait(), PATIENCE_S)
    await proxy.still_works()


@pytest.mark.parametrize("streaming", [False, True])
async def test_an_upstream_that_never_begins_is_a_504(proxy: Proxy, streaming: bool) -> None:
    proxy.configure(timeouts=TimeoutsConfig(first_byte_s=0.1))
    proxy.upstream.behave = hang
    response = await proxy.chat(stream=streaming)
    assert response.status == 504
    assert "first_byte_s" in (await response.json())["error"]["message"]
    await asyncio.wait_for(proxy.upstream.aborted.wait(), PATIENCE_S)
    await proxy.still_works()


async def test_the_total_limit_ends_what_no_other_limit_does(proxy: Proxy) -> None:
    proxy.configure(timeouts=TimeoutsConfig(total_s=0.2))

    async def drip(request: web.BaseRequest, _: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        while True:
            await response.write(chunk("x"))
            await asyncio.sleep(0.01)

    proxy.upstream.behave = drip
    body = await (await proxy.chat(stream=True)).read()
    assert "total_s" in error_of(last_event(body))["message"]
    await asyncio.wait_for(proxy.upstream.aborted.wait(), PATIENCE_S)
    await proxy.still_works()


async def test_a_messages_stream_dies_in_anthropics_words(proxy: Proxy) -> None:
    start = b'event: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":3}}}\n\n'
    proxy.upstream.behave = stream(start, then=die)
    response = await proxy.session.post(
        "/v1/messages", json={"model": "demo-chat", "max_tokens": 5, "messages": ["Hi"], "stream": True}
    )
    name, data = last_event(await response.read()).split(b"\n")
    assert name == b"event: error"
    assert json.loads(data.removeprefix(b"data: "))["error"]["type"] == "api_error"


async def test_a_messages_stream_is_whole_at_its_stop_reason(proxy: Proxy) -> None:
    whole = (
        b'event: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":3}}}\n\n'
        b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},'
        b'"usage":{"output_tokens":5}}\n\n'
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    )
    proxy.upstream.behave = stream(whole)
    response = await proxy.session.post(
        "/v1/messages", json={"model": "demo-chat", "max_tokens": 5, "messages": ["Hi"], "stream": True}
    )
    assert await response.read() == whole
    assert "stream_options" not in proxy.upstream.last_body
    await proxy.settled()
    line = (await proxy.lines())[-1]
    assert (line["prompt_tokens"], line["output_tokens"]) == (3, 5)


async def test_a_responses_stream_ends_with_its_usage_or_dies_in_its_own_words(proxy: Proxy) -> None:
    delta = b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"Hi"}\n\n'
    end = (
        b'event: response.completed\ndata: {"type":"response.completed","response":'
        b'{"usage":{"input_tokens":3,"output_tokens":4}}}\n\n'
    )
    proxy.upstream.behave = stream(delta, end)
    call = {"model": "demo-chat", "input": "Hi", "stream": True}
    assert await (await proxy.session.post("/v1/responses", json=call)).read() == delta + end
    proxy.upstream.behave = stream(delta, then=die)
    name, data = last_event(await (await proxy.session.post("/v1/responses", json=call)).read()).split(b"\n")
    assert name == b"event: error"
    assert json.loads(data.removeprefix(b"data: "))["type"] == "error"


async def test_a_large_plain_answer_is_streamed_and_its_usage_found(proxy: Proxy) -> None:
    vectors = b'{"data":[' + b"0.123456," * 400_000 + b'0],"usage":{"prompt_tokens":11,"total_tokens":11}}'
    proxy.upstream.behave = plain(vectors)
    response = await proxy.session.post("/v1/embeddings", json={"model": "demo-embed", "input": "Hi"})
    assert await response.read() == vectors
    assert response.headers["content-length"] == str(len(vectors))
    await proxy.settled()
    assert (await proxy.lines())[-1]["prompt_tokens"] == 11


async def test_a_large_plain_answer_that_breaks_off_does_not_look_whole(proxy: Proxy) -> None:
    async def broken(request: web.BaseRequest, _: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "application/json"})
        await response.prepare(request)
        await response.write(b"[" + b"1," * 1_000_000)
        await die(request)
        return response

    proxy.upstream.behave = broken
    response = await proxy.session.post("/v1/embeddings", json={"model": "demo-embed", "input": "Hi"})
    with pytest.raises(Exception, match=r"(?i)payload|disconnected|reset"):
        await response.read()
    await proxy.settled()
    await proxy.still_works()


async def test_a_small_plain_answer_that_breaks_off_is_a_502(proxy: Proxy) -> None:
    async def broken(request: web.BaseRequest, _: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "application/json", "content-length": "100"})
        await response.prepare(request)
        await response.write(b'{"half')
        await die(request)
        return response

    proxy.upstream.behave = broken
    response = await proxy.chat()
    assert response.status == 502
    assert (await response.json())["error"]["code"] == "upstream_error"
    await proxy.still_works()
