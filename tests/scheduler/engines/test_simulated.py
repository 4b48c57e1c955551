"""The simulated engine, asked over real HTTP."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestClient, TestServer

from scheduler.engines.simulated import SimulatedKind
from scheduler.engines.simulated_server import Engine, Settings

Client = TestClient[Any, Any]
Make = Callable[..., Awaitable[Client]]
CHAT = "/v1/chat/completions"


@pytest.fixture
async def engine() -> AsyncIterator[Make]:
    async with AsyncExitStack() as stack:

        async def make(**options: Any) -> Client:
            defaults: dict[str, Any] = {"port": 0, "model": "sim", "task": "generate", "ttft_ms": 0.0}
            defaults |= {"tokens_per_s": 1e6, "load_s": 0.0, "max_sequences": 4, "fault": "none", "fault_after": 0}
            server = TestServer(Engine(Settings(**{**defaults, **options})).app())
            await server.start_server()
            return await stack.enter_async_context(TestClient(server))

        yield make


def chat(words: str = "Hello there", **more: Any) -> dict[str, Any]:
    return {"model": "sim", "messages": [{"role": "user", "content": words}], **more}


async def events(reply: aiohttp.ClientResponse) -> list[Any]:
    frames = (await reply.text()).strip().split("\n\n")
    found = [frame.partition("data: ")[2] for frame in frames]
    return [part if part == "[DONE]" else json.loads(part) for part in found]


async def stats(client: Client) -> dict[str, int]:
    found: dict[str, int] = await (await client.get("/stats")).json()
    return found


async def until(client: Client, key: str, count: int) -> None:
    while (await stats(client))[key] != count:
        await asyncio.sleep(0.005)


async def test_an_answer_says_that_it_is_simulated_and_is_the_same_every_time(engine: Make) -> None:
    client = await engine()
    first, second = [await (await client.post(CHAT, json=chat())).json() for _ in range(2)]
    assert first["choices"] == second["choices"]
    choice = first["choices"][0]
    assert choice["message"]["content"] == '[simulated sim] No model ran. You said: "Hello there".'
    assert choice["finish_reason"] == "stop"
    usage = first["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize(("options", "with_usage"), [({}, False), ({"stream_options": {"include_usage": True}}, True)])
async def test_a_stream_is_framed_as_vllm_does(engine: Make, options: dict[str, Any], with_usage: bool) -> None:
    client = await engine()
    reply = await client.post(CHAT, json=chat(stream=True, max_tokens=3, **options))
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    role, *tokens, done = await events(reply)
    if with_usage:
        *tokens, usage = tokens
        assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 3)
    assert done == "[DONE]"
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [token["choices"][0]["finish_reason"] for token in tokens] == [None, None, "length"]
    assert not any("usage" in token for token in tokens)


async def test_lengths_can_be_forced(engine: Make) -> None:
    client = await engine()
    for options in ({"max_tokens": 200, "ignore_eos": True}, {"max_tokens": 200, "min_tokens": 200}):
        body = await (await client.post(CHAT, json=chat(**options))).json()
        assert body["usage"]["completion_tokens"] == 200


async def test_completions_answer_every_prompt_of_a_list(engine: Make) -> None:
    client = await engine()
    body = await (await client.post("/v1/completions", json={"model": "sim", "prompt": ["a", "b"]})).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["usage"]["completion_tokens"] == 32


async def test_responses_and_messages_have_their_own_events(engine: Make) -> None:
    client = await engine()
    asked = {"model": "sim", "input": "Hi", "stream": True}
    found = await events(await client.post("/v1/responses", json=asked))
    kinds = [event["type"] for event in found if event["type"] != "response.output_text.delta"]
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    said = "".join(event["delta"] for event in found if event["type"] == "response.output_text.delta")
    assert found[-1]["response"]["output"][0]["content"][0]["text"] == said
    found = await events(await client.post("/v1/messages", json=chat(stream=True, max_tokens=2)))
    assert [event["type"] for event in found] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert found[-2]["delta"]["stop_reason"] == "max_tokens"


async def test_embeddings_are_the_same_as_floats_and_as_base64(engine: Make) -> None:
    client = await engine(task="embed")
    asked = {"model": "sim", "input": ["red apple", "blue sea"]}
    floats = await (await client.post("/v1/embeddings", json=asked)).json()
    packed = await (await client.post("/v1/embeddings", json={**asked, "encoding_format": "base64"})).json()
    vector = floats["data"][1]["embedding"]
    unpacked = struct.unpack(f"<{len(vector)}f", base64.b64decode(packed["data"][1]["embedding"]))
    assert unpacked == pytest.approx(vector)
    assert sum(value * value for value in vector) == pytest.approx(1)


@pytest.mark.parametrize(("given", "tokens"), [([7, 151_000, 0], 3), ([[5] * 40, [6]], 41), ("red apple", 2)])
async def test_ids_of_tokens_are_counted_each_as_one(engine: Make, given: Any, tokens: int) -> None:
    client = await engine(task="embed")
    body = await (await client.post("/v1/embeddings", json={"model": "sim", "input": given})).json()
    assert body["usage"]["prompt_tokens"] == tokens


async def test_a_chat_is_embedded_as_what_it_says_and_several_one_by_one(engine: Make) -> None:
    client = await engine(task="embed")
    chats = [[{"role": "user", "content": said}] for said in ("red apple", "blue sea")]
    bodies: list[dict[str, Any]] = [{"input": ["red apple", "blue sea"]}, {"messages": chats}, {"messages": chats[0]}]
    texts, several, one = [
        [row["embedding"] for row in (await (await client.post("/v1/embeddings", json=body)).json())["data"]]
        for body in bodies
    ]
    assert several == texts
    assert one == texts[:1]


async def test_reranking_puts_shared_words_first(engine: Make) -> None:
    client = await engine(task="embed")
    asked = {"model": "sim", "query": "red apple", "documents": ["blue sea", "a red apple"]}
    body = await (await client.post("/v1/rerank", json=asked)).json()
    assert [result["index"] for result in body["results"]] == [1, 0]


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        (CHAT, b"{", 400, "BadRequestError"),
        (CHAT, b"[]", 400, "BadRequestError"),
        (CHAT, b'{"model": "other", "messages": []}', 404, "NotFoundError"),
        (CHAT, b'{"model": "sim", "messages": [], "max_tokens": -1, "stream": true}', 400, "BadRequestError"),
    ],
)
async def test_bad_requests_are_refused_in_vllms_shape(
    engine: Make, path: str, body: bytes, status: int, kind: str
) -> None:
    client = await engine()
    reply = await client.post(path, data=body)
    error = (await reply.json())["error"]
    assert (reply.status, error["type"], error["code"]) == (status, kind, status)
    assert (await client.post(CHAT, json=chat())).status == 200


async def test_the_other_tasks_routes_are_absent(engine: Make) -> None:
    reply = await (await engine(task="embed")).post(CHAT, json=chat())
    assert (reply.status, await reply.json()) == (404, {"detail": "Not Found"})


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_stops_its_generation(engine: Make, stream: bool) -> None:
    client = await engine(tokens_per_s=20.0)
    request = asyncio.create_task(client.post(CHAT, json=chat(stream=stream, max_tokens=1000, ignore_eos=True)))
    await until(client, "running", 1)
    if stream:
        (await request).close()
    else:
        request.cancel()
    await until(client, "aborted", 1)
    assert (await stats(client))["running"] == 0
    assert (await client.post(CHAT, json=chat(max_tokens=1))).status == 200


async def test_requests_beyond_the_sequences_wait(engine: Make) -> None:
    client = await engine(max_sequences=1, tokens_per_s=50.0)
    first = asyncio.create_task(client.post(CHAT, json=chat(max_tokens=100, ignore_eos=True)))
    await until(client, "running", 1)
    second = asyncio.create_task(client.post(CHAT, json=chat(max_tokens=1)))
    await until(client, "waiting", 1)
    first.cancel()
    assert (await second).status == 200


async def test_a_hang_is_silent_after_the_first_token_and_ends_with_the_client(engine: Make) -> None:
    client = await engine()
    reply = await client.post(CHAT, json=chat("[[fault:hang]]", stream=True))
    await reply.content.readuntil(b"\n\n")
    await reply.content.readuntil(b"\n\n")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await reply.content.readany()
    reply.close()
    await until(client, "aborted", 1)


async def test_garbage_by_header_is_not_the_protocol(engine: Make) -> None:
    client = await engine()
    reply = await client.post(CHAT, json=chat(), headers={"x-vramp-simulate": "garbage"})
    with pytest.raises(json.JSONDecodeError):
        json.loads(await reply.read())
    assert (await client.post(CHAT, json=chat())).status == 200


async def test_a_fault_sets_in_after_the_good_answers_and_never_meets_a_probe(engine: Make) -> None:
    client = await engine(fault="garbage", fault_after=1)
    kind = SimulatedKind(model="sim", memory_bytes=1)
    base_url = str(client.make_url("")).rstrip("/")
    assert await kind.probe(client.session, base_url)
    assert (await (await client.post(CHAT, json=chat())).json())["object"] == "chat.completion"
    assert (await (await client.post(CHAT, json=chat())).read()).startswith(b"\xff")
    assert await kind.probe(client.session, base_url)
    assert (await stats(client))["requests"] == 2


def test_a_fault_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="model m: fault is 'explode'; use one of none, slow"):
        SimulatedKind(model="m", memory_bytes=1, fault="explode")
