"""What strangers and mistakes send: an envelope of the path's dialect, and the next request works."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from typing import Any

import msgspec
import pytest

from proxy.config import LimitsConfig, TimeoutsConfig
from proxy.dialects.call import Task
from proxy.dialects.endpoints import ENDPOINTS
from tests.proxy.server.conftest import Proxy

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
GOOD = b'{"model":"demo-chat","messages":[{"role":"user","content":"Hi"}]}'


def openai_error(body: bytes) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert "Traceback" not in error["message"]
    return error


BAD_BODIES = {
    "not JSON": (b"hello", None, "not JSON"),
    "nothing": (b"", None, "not JSON"),
    "a list": (b"[1]", None, "must be a JSON object"),
    "trailing bytes": (GOOD + b"x", None, "not JSON"),
    "not a number": (b'{"model":"demo-chat","messages":[],"temperature":NaN}', None, "not JSON"),
    "a NUL byte": (b'{"model":"demo-chat","messages":["\x00"]}', None, "not JSON"),
    "bad UTF-8": (b'{"model":"demo-chat","messages":["\xff\xfe"]}', None, "not UTF-8"),
    "a cut UTF-8 character": (b'{"model":"demo-chat","messages":["\xe2\x82"]}', None, "not UTF-8"),
    "deep nesting": (b'{"model":"demo-chat","messages":' + b"[" * 300 + b"]" * 300 + b"}", None, "deeper than 256"),
    "very deep nesting": (b'{"messages":' + b"[" * 200_000, None, "deeper than 256"),
    "deep nesting in an unknown field": (b'{"messages":[],"x":' + b'{"a":' * 5000 + b"1", None, "deeper than 256"),
    "model of a wrong type": (b'{"model":3,"messages":[]}', "model", "expected str"),
    "messages of a wrong type": (b'{"model":"demo-chat","messages":"Hi"}', "messages", "expected array"),
    "no messages": (b'{"model":"demo-chat"}', "messages", "Missing required field"),
    "no model": (b'{"messages":[]}', "model", "Missing required field"),
    "stream of a wrong type": (b'{"model":"demo-chat","messages":[],"stream":"yes"}', "stream", "expected bool"),
    "negative max_tokens": (b'{"model":"demo-chat","messages":[],"max_tokens":-1}', "max_tokens", ">= 1"),
    "zero max_tokens": (b'{"model":"demo-chat","messages":[],"max_tokens":0}', "max_tokens", ">= 1"),
    "a float max_tokens": (b'{"model":"demo-chat","messages":[],"max_tokens":1.5}', "max_tokens", "expected int"),
    "no choices wanted": (b'{"model":"demo-chat","messages":[],"n":0}', "n", ">= 1"),
    "a nested wrong type": (
        b'{"model":"demo-chat","messages":[],"stream":true,"stream_options":{"include_usage":1}}',
        "stream_options.include_usage",
        "expected bool",
    ),
    "two models": (b'{"model":"demo-chat","messages":[],"model":"both"}', "model", "given twice"),
    "two models, one escaped": (b'{"model":"far","messages":[],"mod\\u0065l":"demo-chat"}', "model", "given twice"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
async def test_a_bad_body_is_a_400_that_names_the_field(proxy: Proxy, name: str) -> None:
    body, param, words = BAD_BODIES[name]
    response = await proxy.session.post(CHAT, data=body, headers=JSON)
    assert response.status == 400
    error = openai_error(await response.read())
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert words in error["message"]
    assert response.headers["x-should-retry"] == "false"
    assert proxy.scheduler.waiting == []
    await proxy.still_works()


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": []}, "messages"),
        ("/v1/completions", {"max_tokens": 5}, "prompt"),
        ("/v1/responses", {"max_output_tokens": 5}, "input"),
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"messages": []}, "input"),
        ("/v1/rerank", {"query": "a"}, "documents"),
        ("/v1/score", {"text_2": ["a"]}, "text_1"),
        ("/v1/messages", {"messages": [], "max_tokens": 5}, None),
    ],
)
async def test_a_call_with_nothing_in_it_loads_no_model(
    proxy: Proxy, path: str, body: dict[str, Any], param: str | None
) -> None:
    model = "demo-embed" if ENDPOINTS[path].task is Task.EMBED else "demo-chat"
    response = await proxy.session.post(path, json={"model": model, **body})
    assert response.status == 400
    error = (await response.json())["error"]
    assert (error["type"], error.get("param")) == ("invalid_request_error", param)
    assert "is missing or empty" in error["message"]
    assert proxy.scheduler.waiting == []
    assert proxy.scheduler.tickets == []
    await proxy.still_works()


async def test_an_unknown_model_is_a_404_that_names_the_nearest(proxy: Proxy) -> None:
    response = await proxy.chat(model="demo-chta")
    assert response.status == 404
    error = openai_error(await response.read())
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "Did you mean demo-chat" in error["message"]
    await proxy.still_works()


async def test_a_huge_model_name_costs_nothing_and_is_not_repeated(proxy: Proxy) -> None:
    response = await proxy.chat(model="x" * 1_000_000)
    assert response.status == 404
    assert len(await response.read()) < 500


async def test_a_chat_with_an_embedding_model_is_refused_before_anything_loads(proxy: Proxy) -> None:
    response = await proxy.chat(model="demo-embed")
    assert response.status == 400
    error = openai_error(await response.read())
    assert error["param"] == "model"
    assert "demo-embed" in error["message"]
    assert "embed" in error["message"]
    assert proxy.scheduler.waiting == []
    await proxy.still_works()


async def test_ten_thousand_messages_are_fine(proxy: Proxy) -> None:
    messages = [{"role": "user", "content": f"message {at}"} for at in range(10_000)]
    response = await proxy.chat(messages=messages)
    assert response.status == 200
    assert len(proxy.upstream.last_body["messages"]) == 10_000
    await proxy.still_works()


async def test_a_declared_large_body_is_refused_unread(proxy: Proxy) -> None:
    status, body = await proxy.raw(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: 999999999999\r\n\r\n"
    )
    assert status == 413
    assert "max_body" in openai_error(body)["message"]
    await proxy.still_works()


async def test_an_undeclared_large_body_is_refused_once_it_is_too_large(proxy: Proxy) -> None:
    proxy.configure(limits=LimitsConfig(max_body="1KiB"))

    async def endless() -> Any:
        while True:
            yield b" " * 4096

    response = await proxy.session.post(CHAT, data=endless(), headers=JSON)
    assert response.status == 413
    openai_error(await response.read())
    proxy.configure()
    await proxy.still_works()


async def test_a_compressed_body_counts_as_what_it_becomes(proxy: Proxy) -> None:
    proxy.configure(limits=LimitsConfig(max_body="64KiB"))
    bomb = zlib.compress(b" " * 10_000_000)
    response = await proxy.session.post(CHAT, data=bomb, headers={**JSON, "content-encoding": "deflate"})
    assert response.status == 413
    proxy.configure()
    await proxy.still_works()


async def test_a_compressed_body_is_understood(proxy: Proxy) -> None:
    response = await proxy.session.post(CHAT, data=gzip.compress(GOOD), headers={**JSON, "content-encoding": "gzip"})
    assert response.status == 200
    assert proxy.upstream.requests[0][2] == GOOD
    assert "content-encoding" not in proxy.upstream.requests[0][1]


async def test_a_body_that_is_not_in_its_coding_is_the_clients_fault_alone(
    proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    response = await proxy.session.post(CHAT, data=b"not gzip", headers={**JSON, "content-encoding": "gzip"})
    assert (response.status, response.headers["connection"]) == (400, "close")
    error = openai_error(await response.read())
    assert error["message"] == "The body cannot be read: Can not decode content-encoding: gzip."
    await proxy.still_works()
    assert not caplog.records, "a client can fill the log with tracebacks"


async def test_a_body_that_nobody_reads_is_not_looked_into(proxy: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    response = await proxy.session.post("/nowhere", data=b"not gzip", headers={**JSON, "content-encoding": "gzip"})
    assert response.status == 404
    await proxy.settled()
    await asyncio.sleep(0.01)  # until what is left of the request was dropped
    assert not caplog.records, "a client can fill the log with tracebacks"


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/v1/chat/completions/", "Did you mean /v1/chat/completions?"),
        ("/chat/completions", "Did you mean /v1/chat/completions?"),
        ("/v1/v1/messages", "Did you mean /v1/messages?"),
        ("/models", "Did you mean /v1/models?"),
        ("/metrics", "Operators' pages are on another port, [server] admin_listen."),
        ("/admin/api/status", "Operators' pages are on another port, [server] admin_listen."),
        ("/v1/images/generations", "Models are called at /v1/chat/completions, "),
        ("/v1/chat/" + "completions" * 100, "Models are called at /v1/chat/completions, "),
    ],
)
async def test_a_path_that_is_none_names_the_one_that_was_meant(proxy: Proxy, path: str, says: str) -> None:
    response = await proxy.session.post(path, data=GOOD, headers=JSON)
    assert response.status == 404
    assert f"There is no path {path[:200]} here. {says}" in openai_error(await response.read())["message"]


async def test_messages_without_max_tokens_cost_no_load(proxy: Proxy) -> None:
    response = await proxy.session.post("/v1/messages", json={"model": "demo-chat", "messages": []})
    assert response.status == 400
    assert (await response.json())["error"]["message"] == "Missing required field 'max_tokens'."
    assert not proxy.upstream.requests


@pytest.mark.parametrize("headers", [{"content-type": "text/plain"}, {"content-type": "multipart/form-data"}, {}])
async def test_what_is_not_declared_as_json_is_a_415(proxy: Proxy, headers: dict[str, str]) -> None:
    response = await proxy.session.post(CHAT, data=GOOD, headers=headers, skip_auto_headers=["content-type"])
    assert response.status == 415
    openai_error(await response.read())
    await proxy.still_works()


async def test_an_unknown_coding_is_a_415(proxy: Proxy) -> None:
    response = await proxy.session.post(CHAT, data=GOOD, headers={**JSON, "content-encoding": "snappy"})
    assert response.status == 415
    openai_error(await response.read())


@pytest.mark.parametrize(
    "head",
    [
        b"x-long: " + b"a" * 200_000 + b"\r\n",
        b"".join(b"x-%d: %s\r\n" % (at, b"a" * 2000) for at in range(100)),
        b"".join(b"x-%d: 1\r\n" % at for at in range(5000)),
    ],
    ids=["one huge header", "many large headers", "too many headers"],
)
async def test_huge_headers_are_a_431_or_400_in_an_envelope(proxy: Proxy, head: bytes) -> None:
    status, body = await proxy.raw(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n" + head + b"\r\n")
    assert status in (400, 431)
    openai_error(body)
    await proxy.still_works()


async def test_a_reload_allows_larger_headers_on_connections_that_come_after_it(proxy: Proxy) -> None:
    proxy.configure(limits=LimitsConfig(max_header="256KiB"))
    head = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nx-long: " + b"a" * 200_000 + b"\r\n\r\n"
    assert (await proxy.raw(head))[0] == 200
    proxy.configure()
    await proxy.still_works()


async def test_a_huge_request_line_is_a_431(proxy: Proxy) -> None:
    status, body = await proxy.raw(b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert status == 431
    openai_error(body)
    await proxy.still_works()


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello over TLS\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\n"
        b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
        b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nna me: x\r\n\r\n",
    ],
    ids=["TLS", "bad version", "two lengths", "length and chunks", "odd coding", "space in a name"],
)
async def test_what_is_not_http_is_a_400_in_an_envelope(proxy: Proxy, data: bytes) -> None:
    status, body = await proxy.raw(data)
    assert status == 400
    openai_error(body)
    await proxy.still_works()


async def test_a_body_that_does_not_arrive_is_a_408(proxy: Proxy) -> None:
    proxy.configure(timeouts=TimeoutsConfig(read_body_s=0.05))
    status, body = await proxy.raw(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: 100\r\n\r\nhalf"
    )
    assert status == 408
    openai_error(body)
    proxy.configure()
    await proxy.still_works()


async def test_a_body_with_expect_is_asked_for(proxy: Proxy) -> None:
    reader, writer = await asyncio.open_connection(*proxy.address)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
        b"content-type: application/json\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(GOOD)
    )
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(GOOD)
    assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
    writer.close()
    await proxy.settled()


async def test_unknown_paths_and_methods_wear_the_envelope_of_their_dialect(proxy: Proxy) -> None:
    response = await proxy.session.get("/v1/nothing")
    assert response.status == 404
    openai_error(await response.read())
    response = await proxy.session.get(CHAT)
    assert (response.status, response.headers["allow"]) == (405, "POST, OPTIONS")
    openai_error(await response.read())
    response = await proxy.session.delete("/v1/messages")
    assert response.status == 405
    body = await response.json()
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert body["request_id"] == response.headers["x-request-id"]


async def test_an_anthropic_path_answers_in_anthropics_envelope(proxy: Proxy) -> None:
    response = await proxy.session.post("/v1/messages", data=b"{", headers=JSON)
    assert response.status == 400
    body = await response.json()
    assert body.keys() == {"type", "error", "request_id"}
    assert body["error"].keys() == {"type", "message"}
    response = await proxy.session.post("/v1/messages", json={"model": "nope", "messages": [], "max_tokens": 5})
    assert (response.status, (await response.json())["error"]["type"]) == (404, "not_found_error")


async def test_options_and_head_are_sane(proxy: Proxy) -> None:
    response = await proxy.session.options(CHAT)
    assert (response.status, response.headers["allow"]) == (204, "POST, OPTIONS")
    assert "access-control-allow-origin" not in response.headers
    response = await proxy.session.head("/v1/models")
    assert response.status == 200
    assert await response.read() == b""
    response = await proxy.session.head(CHAT)
    assert response.status == 405
    await proxy.still_works()


@pytest.mark.parametrize("name", ["", "slow", "3"])
async def test_a_class_that_is_none_is_refused_by_name(proxy: Proxy, name: str) -> None:
    response = await proxy.session.post(CHAT, data=GOOD, headers={**JSON, "x-vramp-class": name})
    assert response.status == 400
    assert openai_error(await response.read())["param"] == "x-vramp-class"


@pytest.mark.parametrize("value", ["soon", "-5", "0", "nan", "inf"])
async def test_a_deadline_that_is_none_is_refused(proxy: Proxy, value: str) -> None:
    response = await proxy.session.post(CHAT, data=GOOD, headers={**JSON, "x-vramp-deadline-ms": value})
    assert response.status == 400
    assert openai_error(await response.read())["param"] == "x-vramp-deadline-ms"


async def test_keys_are_asked_for_when_there_are_any(proxy: Proxy) -> None:
    proxy.configure(keys=("right", "other"))
    for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": "wrong"}, {"authorization": "Basic cmlnaHQ="}):
        response = await proxy.session.post(CHAT, data=GOOD, headers={**JSON, **headers})
        assert response.status == 401
        error = openai_error(await response.read())
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        assert "wrong" not in error["message"]
        assert response.headers["www-authenticate"] == "Bearer"
    for headers in ({"authorization": "Bearer right"}, {"x-api-key": "right"}, {"api-key": "right"}):
        response = await proxy.session.post(CHAT, data=GOOD, headers={**JSON, **headers})
        assert response.status == 200
    assert proxy.scheduler.tickets[-1].tenant == "tenant-0"
    assert (await proxy.session.get("/v1/models")).status == 401
    assert (await proxy.session.get("/healthz")).status == 200


async def test_a_stranger_with_a_large_body_is_refused_before_it_is_read(proxy: Proxy) -> None:
    proxy.configure(keys=("right",))
    status, body = await proxy.raw(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: 1000000\r\n\r\n"
    )
    assert status == 401
    openai_error(body)


async def test_a_bug_of_ours_is_a_500_without_a_traceback(proxy: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    proxy.handler.configure(msgspec.structs.replace(proxy.state, providers={}))
    response = await proxy.chat()
    assert response.status == 500
    assert openai_error(await response.read())["code"] == "internal"
    assert response.headers["x-request-id"] in caplog.text
    caplog.clear()
    proxy.handler.configure(proxy.state)
    await proxy.still_works()
