"""Which candidate answers, what the client is told of it, and what other servers' errors become."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from proxy.config import BackendConfig, ModelConfig
from scheduler.model import LatencyClass, RefusalCode
from tests.fakes import STREAM, USAGE_CHUNK, chunk, die, plain, stream
from tests.proxy.server import test_streams
from tests.proxy.server.conftest import Proxy

OVERLOADED = json.dumps({"error": {"message": "full", "type": "server_error", "param": None, "code": None}}).encode()


@pytest.mark.parametrize("status", [429, 502, 503, 504])
@pytest.mark.parametrize("streaming", [False, True])
async def test_an_overloaded_engine_is_answered_for_by_the_next(proxy: Proxy, status: int, streaming: bool) -> None:
    proxy.upstream.behave = plain(OVERLOADED, status)
    proxy.remote.behave = stream() if streaming else plain()
    response = await proxy.chat(model="both", stream=streaming)
    assert response.status == 200
    assert response.headers["x-vramp-backend"] == "remote/cloud"
    assert response.headers["x-vramp-reason"] == "fallback-remote"
    assert response.headers["x-vramp-attempts"] == "2"
    assert proxy.remote.last_body["model"] == "big-one"


@pytest.mark.parametrize("status", [400, 404, 500])
async def test_what_another_would_answer_alike_is_not_tried_again(proxy: Proxy, status: int) -> None:
    proxy.upstream.behave = plain(OVERLOADED, status)
    response = await proxy.chat(model="both")
    assert response.status == status
    assert await response.read() == OVERLOADED
    assert proxy.remote.requests == []


async def test_an_engine_that_is_gone_is_answered_for_by_the_next(proxy: Proxy) -> None:
    proxy.scheduler.base_url = "http://127.0.0.1:1"
    response = await proxy.chat(model="both")
    assert (response.status, response.headers["x-vramp-backend"]) == (200, "remote/cloud")


async def test_a_request_whose_engine_died_is_done_again_on_a_new_one(proxy: Proxy) -> None:
    proxy.scheduler.engine_died = True
    dies, answers = stream(b"data: {", then=die), plain()

    async def behave(request: web.BaseRequest, body: bytes) -> web.StreamResponse:
        return await (dies if len(proxy.upstream.requests) == 1 else answers)(request, body)

    proxy.upstream.behave = behave
    response = await proxy.chat()
    assert (response.status, response.headers["x-vramp-attempts"]) == (200, "2")
    assert proxy.scheduler.all_returned_once


async def test_a_request_that_kills_every_engine_is_not_done_for_ever(proxy: Proxy) -> None:
    proxy.scheduler.engine_died = True
    proxy.upstream.behave = stream(b"data: {", then=die)
    response = await proxy.chat()
    assert response.status == 502
    assert len(proxy.scheduler.tickets) == 2
    await proxy.still_works()


async def test_an_engine_that_dies_before_its_first_event_is_answered_for_by_the_next(proxy: Proxy) -> None:
    proxy.upstream.behave = stream(b": thinking\n\ndata: {", then=die)
    proxy.remote.behave = stream()
    body = await (await proxy.chat(model="both", stream=True)).read()
    if not proxy.fast:  # which holds an upstream's comments back while somebody else may answer
        assert body.startswith(b": thinking\n\n: vramp ")
        assert b"x-vramp-backend=remote/cloud" in body
    assert body.endswith(STREAM.replace(USAGE_CHUNK, b""))


async def test_after_the_first_event_nobody_else_is_asked(proxy: Proxy) -> None:
    proxy.upstream.behave = stream(chunk("Hel"), then=die)
    body = await (await proxy.chat(model="both", stream=True)).read()
    assert test_streams.error_of(test_streams.last_event(body))["code"] == "upstream_error"
    assert proxy.remote.requests == []
    await proxy.still_works()


async def test_when_all_fail_the_last_error_is_told(proxy: Proxy) -> None:
    proxy.scheduler.base_url = "http://127.0.0.1:1"
    proxy.remote.behave = plain(OVERLOADED, 503, **{"retry-after": "7"})
    response = await proxy.chat(model="both")
    assert (response.status, response.headers["retry-after"]) == (503, "7")
    assert await response.read() == OVERLOADED
    await proxy.still_works()


REFUSALS: list[tuple[RefusalCode, int, str]] = [
    (RefusalCode.UNKNOWN_MODEL, 404, "model_not_found"),
    (RefusalCode.NEVER_FITS, 400, "model_never_fits"),
    (RefusalCode.QUEUE_FULL, 503, "queue_full"),
    (RefusalCode.WAITED_TOO_LONG, 503, "waited_too_long"),
    (RefusalCode.DEADLINE, 503, "deadline"),
    (RefusalCode.LOAD_FAILED, 503, "load_failed"),
    (RefusalCode.STOPPING, 503, "stopping"),
]


@pytest.mark.parametrize(("code", "status", "word"), REFUSALS)
async def test_a_refusal_says_whether_to_come_back(proxy: Proxy, code: RefusalCode, status: int, word: str) -> None:
    proxy.scheduler.refusal = (code, 2.5 if status == 503 else None)
    response = await proxy.chat()
    assert response.status == status
    assert (await response.json())["error"]["code"] == word
    if status == 503:
        assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("3", "2500")
        assert response.headers["x-should-retry"] == "true"
    else:
        assert response.headers["x-should-retry"] == "false"
    await proxy.still_works()


async def test_a_missed_deadline_names_what_sets_it(proxy: Proxy) -> None:
    proxy.scheduler.refusal = (RefusalCode.DEADLINE, 2.5)
    message = (await (await proxy.chat()).json())["error"]["message"]
    assert message.endswith(": allow more (x-vramp-deadline-ms, or [classes] deadline_ms).")


@pytest.mark.parametrize("code", [each for each, _, _ in REFUSALS if each is not RefusalCode.STOPPING])
async def test_a_refused_call_goes_to_the_next_candidate(proxy: Proxy, code: RefusalCode) -> None:
    proxy.scheduler.refusal = (code, 1.0)
    assert (await proxy.chat(model="both")).headers["x-vramp-backend"] == "remote/cloud"


async def test_a_stopping_scheduler_sends_nobody_elsewhere(proxy: Proxy) -> None:
    proxy.scheduler.refusal = (RefusalCode.STOPPING, 1.0)
    assert (await proxy.chat(model="both")).status == 503
    assert proxy.remote.requests == []


async def test_anthropic_clients_hear_of_overload_in_their_own_word(proxy: Proxy) -> None:
    proxy.scheduler.refusal = (RefusalCode.QUEUE_FULL, 1.0)
    response = await proxy.session.post("/v1/messages", json={"model": "demo-chat", "max_tokens": 5, "messages": [1]})
    assert (response.status, (await response.json())["error"]["type"]) == (529, "overloaded_error")


UPSTREAM_ERRORS: dict[str, tuple[int, bytes, str, int, str]] = {
    "FastAPI's 422": (422, b'{"detail":[{"loc":["body"]}]}', "application/json", 422, '[{"loc":["body"]}]'),
    "FastAPI's 400": (400, b'{"detail":"bad"}', "application/json", 400, "bad"),
    "a path that the engine lacks": (404, b'{"detail":"Not Found"}', "application/json", 404, "/v1/chat/completions"),
    "HTML": (500, b"<html><h1>Oops</h1></html>", "text/html", 502, "500"),
    "nothing": (500, b"", "text/plain", 502, "500"),
    "HTML 503": (503, b"<html>busy</html>", "text/html", 503, "503"),
    "half an envelope": (400, b'{"error":{"message":"too long","code":400}}', "application/json", 400, "too long"),
    "a bare error": (400, b'{"error":"model is odd"}', "application/json", 400, "model is odd"),
    "garbage": (400, b"\xff\x00{", "application/json", 400, "400"),
    "too much": (400, b'{"error":"' + b"x" * 100_000 + b'"}', "application/json", 400, "400"),
    "deep garbage": (400, b"[" * 20_000, "application/json", 400, "400"),
    "a redirect": (302, b"", "text/html", 502, "302"),
}


@pytest.mark.parametrize("name", UPSTREAM_ERRORS)
async def test_an_upstreams_odd_error_gets_the_envelope(proxy: Proxy, name: str) -> None:
    status, body, content_type, told, words = UPSTREAM_ERRORS[name]
    proxy.upstream.behave = plain(body, status, content_type, location="http://127.0.0.1:1/elsewhere")
    response = await proxy.chat()
    assert response.status == told
    error: dict[str, Any] = (await response.json())["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert "location" not in response.headers
    await proxy.still_works()


async def test_our_bad_key_at_a_remote_is_our_fault(proxy: Proxy) -> None:
    envelope = {"message": "Incorrect API key sk-ours", "type": "x", "param": None, "code": "invalid_api_key"}
    proxy.remote.behave = plain(json.dumps({"error": envelope}).encode(), 401)
    response = await proxy.chat(model="far")
    assert response.status == 502
    body = await response.text()
    assert json.loads(body)["error"]["code"] == "upstream_credentials"
    assert "sk-ours" not in body


async def test_headers_go_through_allow_lists_both_ways(proxy: Proxy) -> None:
    proxy.remote.behave = plain(
        **{"openai-version": "1", "x-ratelimit-remaining-tokens": "5", "set-cookie": "a=b", "server": "x", "via": "y"}
    )
    response = await proxy.session.post(
        "/v1/chat/completions",
        json={"model": "far", "messages": []},
        headers={
            "authorization": "Bearer of-the-client",
            "cookie": "c=d",
            "traceparent": "00-1",
            "x-forwarded-for": "1.2.3.4",
            "openai-organization": "theirs",
            "x-request-id": "mine",
        },
    )
    assert response.headers["openai-version"] == "1"
    assert response.headers["x-ratelimit-remaining-tokens"] == "5"
    assert response.headers["x-request-id"] == "mine"
    assert response.headers["server"] == "vramp"
    assert not {"set-cookie", "via"} & {name.lower() for name in response.headers}
    sent = proxy.remote.requests[0][1]
    assert sent["authorization"] == "Bearer sk-ours"
    assert sent["traceparent"] == "00-1"
    assert not {"cookie", "x-forwarded-for", "openai-organization", "x-request-id"} & sent.keys()


async def test_an_engine_gets_no_key_at_all(proxy: Proxy) -> None:
    await proxy.session.post(
        "/v1/chat/completions", json={"model": "demo-chat", "messages": ["Hi"]}, headers={"authorization": "Bearer x"}
    )
    assert "authorization" not in proxy.upstream.requests[0][1]


@pytest.mark.parametrize("given", ["has space", "x" * 129, "ü", ""])
async def test_an_odd_request_id_is_replaced(proxy: Proxy, given: str) -> None:
    response = await proxy.session.get("/healthz", headers={"x-request-id": given})
    assert response.headers["x-request-id"].startswith("req-")


async def test_the_ticket_says_what_the_scheduler_must_know(proxy: Proxy) -> None:
    before = asyncio.get_running_loop().time()
    await proxy.session.post(
        "/v1/chat/completions",
        json={"model": "demo-chat", "messages": ["x" * 4000], "max_tokens": 100, "n": 3},
        headers={"x-vramp-class": "Fast", "x-vramp-deadline-ms": "1500", "x-vramp-session": "agent 7"},
    )
    ticket = proxy.scheduler.tickets[-1]
    assert ticket.session == "agent 7"
    assert ticket.prefix
    assert (ticket.model, ticket.tenant, ticket.latency_class) == ("demo-chat", "local", LatencyClass.FAST)
    assert 1300 <= ticket.weight_tokens < 1400
    assert ticket.deadline_s is not None
    assert 1.4 < ticket.deadline_s - before < 2.0


async def test_a_clients_priority_may_step_back_but_not_forward(proxy: Proxy) -> None:
    await proxy.chat(priority=-100)
    assert proxy.upstream.last_body["priority"] == 0
    await proxy.chat(priority=5)
    assert proxy.upstream.last_body["priority"] == 5


async def test_an_unspliced_body_arrives_byte_for_byte(proxy: Proxy) -> None:
    body = b' {"messages" : [ {"role":"user","content":"\\u00fc 1e400"} ],\n"top_p":1.0E-1, "model":"demo-chat"}\r\n'
    await proxy.session.post("/v1/chat/completions", data=body, headers={"content-type": "application/json"})
    assert proxy.upstream.requests[0][2] == body


async def test_a_model_of_no_name_is_the_only_one_of_its_task(proxy: Proxy) -> None:
    response = await proxy.session.post("/v1/embeddings", json={"input": "Hi"})
    assert response.status == 200
    assert proxy.upstream.last_body == {"model": "demo-embed", "input": "Hi"}


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/v1/completions", "demo-chat"),
        ("/v1/responses", "demo-chat"),
        ("/v1/rerank", "demo-embed"),
        ("/rerank", "demo-embed"),
        ("/v1/score", "demo-embed"),
        ("/score", "demo-embed"),
        ("/tokenize", "demo-embed"),
        ("/detokenize", "demo-chat"),
    ],
)
async def test_each_path_reaches_the_engine_under_its_own_name(proxy: Proxy, path: str, model: str) -> None:
    body = {"model": model, "prompt": 1.5, "query": "Hi", "documents": ["Hello"]}  # each path finds something in it
    response = await proxy.session.post(path, json=body)
    assert response.status == 200
    assert proxy.upstream.requests[-1][0] == path
    assert json.loads(proxy.upstream.requests[-1][2]) == body


async def test_a_remote_pool_is_bounded_and_its_overflow_refused_at_once(proxy: Proxy) -> None:
    cloud = BackendConfig(name="cloud", kind="openai", base_url=proxy.remote.base_url, max_connections=1)
    proxy.configure(backends=(proxy.config().backends[0], cloud))
    go = asyncio.Event()

    async def slow(request: Any, body: bytes) -> Any:
        await go.wait()
        return await plain()(request, body)

    proxy.remote.behave = slow
    calls = [asyncio.create_task(proxy.chat(model="far")) for _ in range(6)]
    refused = await next(asyncio.as_completed(calls))
    assert refused.status == 503
    assert "retry-after" in refused.headers
    go.set()
    assert sorted([(await call).status for call in calls]) == [200] * 5 + [503]


async def test_an_engine_that_died_in_mid_stream_is_not_asked_again(proxy: Proxy) -> None:
    proxy.upstream.behave = stream(chunk("Hel"), then=die)
    proxy.scheduler.engine_died = True
    await (await proxy.chat(stream=True)).read()
    assert len(proxy.scheduler.waiting) == 1
    assert proxy.scheduler.engine_died
    await proxy.still_works()


@pytest.mark.parametrize("streaming", [False, True])
async def test_what_a_request_really_used_goes_back_with_its_lease(proxy: Proxy, streaming: bool) -> None:
    if streaming:
        proxy.upstream.behave = stream()
    response = await proxy.chat(stream=streaming)
    await response.read()
    await proxy.settled()
    (lent,) = proxy.scheduler.waiting
    assert (lent.usage, lent.ticket.open_ended, lent.closed) == ((7, 2), True, 1)


async def test_a_stream_that_broke_off_teaches_nothing(proxy: Proxy) -> None:
    proxy.upstream.behave = stream(chunk("Hel"), USAGE_CHUNK, then=die)
    response = await proxy.chat(stream=True)
    await response.read()
    await proxy.settled()
    assert proxy.scheduler.waiting[0].usage is None
    await proxy.still_works()


async def test_a_request_with_a_limit_weighs_it_and_one_without_is_open_ended(proxy: Proxy) -> None:
    await proxy.chat(max_tokens=1000)
    await proxy.chat()
    await proxy.session.post("/v1/embeddings", json={"model": "demo-embed", "input": "Hi"})
    limited, open_ended, embedding = proxy.scheduler.tickets
    assert limited.weight_tokens - open_ended.weight_tokens in range(1000, 1010)
    assert [each.open_ended for each in (limited, open_ended, embedding)] == [False, True, False]


def with_vllm(proxy: Proxy, **model: Any) -> None:
    proxy.configure(
        backends=(BackendConfig(name="engines", kind="vllm"),),
        models=(ModelConfig(id="demo-chat", backend="engines", path="/models/demo", **model),),
    )


@pytest.mark.parametrize(
    ("latency_class", "own", "sent"),
    [
        ("instant", None, -2), ("standard", None, None), ("batch", None, 2),
        ("batch", 0, 2), ("batch", 7, 7), ("standard", -3, 0), ("instant", -3, -2), ("instant", 0, 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_the_class_is_handed_on_to_vllm_and_a_caller_may_only_step_back_from_it(
    proxy: Proxy, path: str, latency_class: str, own: int | None, sent: int | None
) -> None:
    with_vllm(proxy)
    body = {"model": "demo-chat", "messages": ["Hi"], "prompt": "Hi"} | ({} if own is None else {"priority": own})
    await proxy.session.post(path, json=body, headers={"x-vramp-class": latency_class})
    assert proxy.upstream.last_body.get("priority") == sent
    assert {**proxy.upstream.last_body, "priority": own} == {**body, "priority": own}


async def test_an_engine_with_a_policy_of_the_users_own_is_told_no_class(proxy: Proxy) -> None:
    with_vllm(proxy, args=("--scheduling-policy=fcfs",))
    await proxy.session.post(
        "/v1/chat/completions", json={"model": "demo-chat", "messages": ["Hi"]}, headers={"x-vramp-class": "batch"}
    )
    assert "priority" not in proxy.upstream.last_body


async def test_two_requests_of_different_classes_are_ordered_for_the_engine(proxy: Proxy) -> None:
    with_vllm(proxy)
    for latency_class in ("batch", "fast"):
        await proxy.session.post(
            "/v1/chat/completions",
            json={"model": "demo-chat", "messages": ["Hi"]},
            headers={"x-vramp-class": latency_class},
        )
    batch, fast = (json.loads(body) for _, _, body in proxy.upstream.requests)
    assert fast["priority"] < 0 < batch["priority"]  # vLLM serves the lower one first; 0 is everybody else's
