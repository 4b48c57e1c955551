"""The fast lane beside the ordinary one: the same answers and records, and what only a lane of sockets can do wrong."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from proxy.config import BackendConfig, LimitsConfig, ModelLimitsConfig, TimeoutsConfig
from proxy.observe import lines
from proxy.server.fast import FastLane
from proxy.server.journey import FORWARDED
from tests.fakes import DONE, STREAM, USAGE_CHUNK, FakeUpstream, chunk, hang, plain, stream, until
from tests.patience import PATIENCE_S
from tests.proxy.server.conftest import Proxy

pytestmark = pytest.mark.native

CHAT = "/v1/chat/completions"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
ANSWER = b'{"choices":[{"finish_reason":"stop"}],"usage":{"prompt_tokens":7,"completion_tokens":2}}'
Lanes = tuple[Proxy, Proxy]


@pytest.fixture
async def lanes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Lanes]:
    """(ordinary, fast) over the same upstreams."""
    monkeypatch.setattr(lines, "FLUSH_S", 0.001)
    async with FakeUpstream() as upstream, FakeUpstream() as remote:
        pair = tuple(Proxy(upstream, remote, tmp_path / f"{fast}.log", fast=fast) for fast in (False, True))
        for each in pair:
            await each.start()
        yield pair[0], pair[1]
        for each in pair:
            await each.stop()
            assert each.scheduler.all_returned_once


@pytest.fixture
async def fast(lanes: Lanes) -> Proxy:
    return lanes[1]


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What the fast lane gave to aiohttp."""
    seen: list[bytes] = []
    original = FastLane.hand_over

    def hand_over(self: FastLane, fd: int, data: bytes, *rest: Any) -> None:
        seen.append(data)
        original(self, fd, data, *rest)

    monkeypatch.setattr(FastLane, "hand_over", hand_over)
    return seen


def request(body: Any, path: str = CHAT, *headers: bytes) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [b"POST %b HTTP/1.1" % path.encode(), b"host: localhost", b"content-type: application/json", *headers]
    return b"\r\n".join([*lines, b"content-length: %d" % len(data), b"", data])


def call(model: str = "demo-chat", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "Hi"}], **fields}


async def answer_to(proxy: Proxy, data: bytes) -> bytes:
    """Everything of one answer on a new connection, as bytes."""
    reader, writer = await asyncio.open_connection(*proxy.address)
    answer = await next_answer(reader, writer, data)
    writer.close()
    return answer


async def next_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> bytes:
    """Everything of one answer."""
    writer.write(data)
    head = await reader.readuntil(b"\r\n\r\n")
    if b"chunked" in head:
        body = b""
        while not body.endswith(b"0\r\n\r\n"):
            body += await reader.read(65536) or pytest.fail("cut off")
    else:
        body = await reader.readexactly(int(re.search(rb"(?i)content-length: (\d+)", head)[1]))  # type: ignore[index]
    return head + body


def normal(answer: bytes) -> tuple[list[bytes], bytes]:
    """What must be equal: the head but for ids, dates and milliseconds; the body without its chunks' borders."""
    head, _, body = answer.partition(b"\r\n\r\n")
    if b"chunked" in head:
        pieces, rest = [], body
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            pieces.append(rest[: int(size, 16)])
            rest = rest[int(size, 16) + 2 :]
        body = b"".join(pieces)
    for pattern in (rb"(?m)^(Date): .*$", rb"(x-request-id)[:=] ?[\w-]+", rb"(x-vramp-wait-ms).*upstream=\d+"):
        head, body = re.sub(pattern, rb"\1", head), re.sub(pattern, rb"\1", body)
    body = re.sub(rb'"request_id":"[^"]*"', b"", body)
    return head.split(b"\r\n"), body


MESSAGES = stream(b'event: message_stop\ndata: {"type":"message_stop","delta":{"stop_reason":"end_turn"}}\n\n')
ERROR = b'{"error":{"message":"too long","type":"invalid_request_error","param":null,"code":"context_length"}}'
LARGE = b'{"data":[' + b"0.5," * 300_000 + b'0],"usage":{"prompt_tokens":11,"total_tokens":11}}'
PART = stream(chunk("Hel"))

CALLS: dict[str, tuple[Any, bytes]] = {
    "a chat": (plain(), request(call())),
    "with an id": (plain(), request(call(), CHAT, b"x-request-id: mine-1")),
    "in a class": (plain(), request(call(), CHAT, b"x-vramp-class: batch")),
    "in no class": (plain(), request(call(), CHAT, b"x-vramp-class: none")),
    "traced": (plain(), request(call(), CHAT, b"traceparent: 00-1-2-01")),
    "to a remote, renamed": (plain(), request(call("far"))),
    "with a group": (plain(), request(call("both"))),
    "a default model": (plain(), request({"input": "x"}, "/v1/embeddings")),
    "embeddings": (
        plain(b'{"data":[],"usage":{"prompt_tokens":3}}'),
        request(call("demo-embed", input="x"), "/v1/embeddings"),
    ),
    "embeddings of a chat": (
        plain(b'{"data":[],"usage":{"prompt_tokens":3}}'),
        request(call("demo-embed"), "/v1/embeddings"),
    ),
    "embeddings of nothing": (plain(), request({"model": "demo-embed"}, "/v1/embeddings")),
    "a priority": (plain(), request(call(priority=-3))),
    "a stream": (stream(), request(call(stream=True))),
    "a stream with usage": (stream(), request(call(stream=True, stream_options={"include_usage": True}))),
    "a remote stream": (stream(), request(call("far", stream=True))),
    "a stream of messages": (MESSAGES, request(call(stream=True, max_tokens=5), "/v1/messages")),
    "a stream of comments": (stream(b": a\n\n", STREAM), request(call("far", stream=True))),
    "a stream without a last blank line": (stream(chunk("a", "stop").rstrip()), request(call(stream=True))),
    "a stream cut short": (PART, request(call(stream=True))),
    "a first event that is too large to read": (
        stream(b'data: {"x":"' + b"a" * (1 << 20), b'"}\n\n', STREAM),
        request(call(stream=True)),
    ),
    "an empty stream": (stream(b""), request(call("far", stream=True))),
    "a stream as JSON": (plain(), request(call(stream=True))),
    "events unasked": (stream(), request(call())),
    "no JSON": (plain(b"<html>"), request(call("far"))),
    "an empty answer": (plain(b""), request(call("far"))),
    "a large answer": (plain(LARGE), request(call("demo-embed", input="x"), "/v1/embeddings")),
    "a coded answer": (plain(b"\x1f\x8b", **{"content-encoding": "gzip"}), request(call())),
    "rate limits": (plain(**{"x-ratelimit-limit-requests": "5", "openai-version": "1"}), request(call("far"))),
    "201": (plain(status=201), request(call())),
    "a refusal": (plain(ERROR, status=400), request(call())),
    "a refusal in other words": (plain(b'{"detail":"no"}', status=422), request(call())),
    "a page for a refusal": (plain(b"<html>" * 20_000, status=500, content_type="text/html"), request(call("far"))),
    "a bad key there": (plain(ERROR, status=401), request(call("far"))),
    "overload there": (plain(ERROR, status=429, **{"retry-after": "7"}), request(call("far"))),
    "an unknown model": (plain(), request(call("demo-chta"))),
    "the wrong task": (plain(), request(call("demo-embed"))),
    "bad JSON": (plain(), request(b'{"model":')),
    "bad fields": (plain(), request(call(max_tokens=-1))),
    "no messages": (plain(), request(call(messages=[]))),
    "no messages to a remote": (plain(), request(call("far", messages=[]))),
    "no prompt": (plain(), request(call(), "/v1/completions")),
    "a prompt": (plain(), request(call(prompt="x"), "/v1/completions")),
    "two models": (plain(), request(b'{"model":"far","messages":[],"model":"demo-chat"}')),
    "an odd body": (plain(), request(b'{"model":"demo-chat","messages":[1],"x":"\\ud800"}')),
}
SENT = request(call()).partition(b"\r\n\r\n")[2]
CALLS["in chunks"] = (
    plain(),
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    b"transfer-encoding: chunked\r\n\r\n5\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (SENT[:5], len(SENT) - 5, SENT[5:]),
)
TIMES = ("time", "request_id", "queue_s", "load_s", "upstream_s", "first_byte_s", "duration_s")


async def compare(lanes: Lanes, name: str) -> None:
    """Send one of `CALLS` down both lanes: the answers and records are to be equal."""
    behave, data = CALLS[name]
    answers, records, rows, asked = [], [], [], []
    for proxy in lanes:
        proxy.upstream.behave = proxy.remote.behave = behave
        proxy.upstream.requests.clear()
        proxy.remote.requests.clear()
        answers.append(normal(await answer_to(proxy, data)))
        await proxy.settled()
        records.append([{k: v for k, v in line.items() if k not in TIMES} for line in await proxy.lines()])
        rows.append([{k: v for k, v in row.items() if k not in TIMES} for row in await proxy.rows()])
        asked.append([(path, body) for path, _, body in proxy.upstream.requests + proxy.remote.requests])
        assert proxy.metrics.registry.get_sample_value("vramp_requests_in_flight") == 0
    if name == "a stream of comments":  # how the pieces fall says whether headers went out before the first event
        answers = [(head[:1], body) for head, body in answers]
        for line in (*records[0], *records[1], *rows[0], *rows[1]):
            line.pop("bytes_out", None)
    assert answers[0] == answers[1]
    assert records[0] == records[1]
    assert rows[0] == rows[1]
    assert len(records[1]) == len(rows[1]) == 1
    assert asked[0] == asked[1]


@pytest.mark.parametrize("name", CALLS)
async def test_both_lanes_answer_and_record_alike(lanes: Lanes, name: str) -> None:
    await compare(lanes, name)


@pytest.mark.parametrize(
    "name",
    ["a chat", "a stream", "embeddings", "embeddings of a chat", "a large answer", "a refusal", "rate limits"],
)
async def test_both_lanes_tell_alike_what_the_limits_leave_and_let_go_of_it(lanes: Lanes, name: str) -> None:
    behave, data = CALLS[name]
    seen = []
    for proxy in lanes:
        models = {"demo-chat": ModelLimitsConfig(requests_per_minute=50)}
        proxy.configure(limits=LimitsConfig(tokens_per_minute=6000, concurrency=1, models=models))
        proxy.upstream.behave = proxy.remote.behave = behave
        answers = [normal(await answer_to(proxy, data)) for _ in range(2)]
        await proxy.settled()
        meter = proxy.counters.meter("key local", 0, 6000)
        seen.append((answers[0], proxy.metrics.registry.get_sample_value("vramp_requests_in_flight"), meter.in_use))
        assert [head[0] for head, _ in answers] == [answers[0][0][0]] * 2  # nobody was refused
        left = next(line for line in answers[1][0][0].splitlines() + answers[1][0] if b"remaining-tokens" in line)
        assert int(left.split()[1]) > 5000
    assert seen[0] == seen[1]
    assert b"x-ratelimit-limit-tokens: 6000" in seen[0][0][0]


ONES = ("a chat", "in chunks", "with an id", "in a class", "traced", "to a remote, renamed", "with a group",
        "a default model", "embeddings", "a priority", "a stream", "a remote stream")  # fmt: skip


async def test_what_a_connection_said_before_changes_no_answer(lanes: Lanes, handed_over: list[bytes]) -> None:
    """Each call again, and after each other one, on one connection that remembers, beside new ones that cannot."""
    ordinary, fast = lanes
    reader, writer = await asyncio.open_connection(*fast.address)
    expected: dict[str, Any] = {}
    for name in [*(each for one in ONES for each in (one, one)), *ONES, *reversed(ONES)]:
        behave, data = CALLS[name]
        seen = []
        for proxy in (ordinary,) * (name not in expected) + (fast,):
            proxy.upstream.behave = proxy.remote.behave = behave
            proxy.upstream.requests.clear()
            proxy.remote.requests.clear()
            got = answer_to(proxy, data) if proxy is ordinary else next_answer(reader, writer, data)
            answer = normal(await got)
            await proxy.settled()
            line = {k: v for k, v in (await proxy.lines())[-1].items() if k not in TIMES}
            asked = [
                (path, body, {name: value for name, value in headers.items() if name in FORWARDED})
                for path, headers, body in proxy.upstream.requests + proxy.remote.requests
            ]
            seen.append((answer, line, asked))
        expected.setdefault(name, seen[0])
        assert seen[-1] == expected[name]
    writer.close()
    assert handed_over == []


async def test_a_connection_is_asked_for_its_key_again_when_it_sends_another_or_the_keys_change(fast: Proxy) -> None:
    reader, writer = await asyncio.open_connection(*fast.address)

    async def status(key: bytes) -> bytes:
        data = request(call(), CHAT, b"authorization: Bearer " + key)
        return (await next_answer(reader, writer, data))[9:12]

    fast.configure(keys=("one", "two"))
    assert [await status(key) for key in (b"one", b"one", b"two", b"one")] == [b"200"] * 4
    await fast.settled()
    assert [line["tenant"] for line in await fast.lines()] == ["tenant-0", "tenant-0", "tenant-1", "tenant-0"]
    fast.configure(keys=("two",))
    assert await status(b"two") == b"200"
    assert await status(b"one") == b"401"
    writer.close()
    fast.configure(keys=("one",))
    reader, writer = await asyncio.open_connection(*fast.address)
    assert await status(b"one") == b"200"
    fast.configure(keys=("two",))
    assert await status(b"one") == b"401"
    writer.close()


@pytest.mark.parametrize(
    "name", ["a chat", "a remote stream", "embeddings", "a priority", "a large answer", "a stream", "in chunks"]
)
async def test_an_ordinary_call_stays_in_the_fast_lane(fast: Proxy, handed_over: list[bytes], name: str) -> None:
    fast.upstream.behave = fast.remote.behave = CALLS[name][0]
    for limits in (LimitsConfig(), LimitsConfig(requests_per_minute=9, tokens_per_minute=9000, concurrency=1)):
        fast.configure(limits=limits)
        await answer_to(fast, CALLS[name][1])
        await fast.settled()
    assert handed_over == []


async def test_each_call_of_one_kind_keeps_its_own_session(fast: Proxy, handed_over: list[bytes]) -> None:
    for header in ((b"x-vramp-session: one",), (b"x-vramp-session: two",), ()):
        await answer_to(fast, request(call(), CHAT, *header))
    assert [ticket.session for ticket in fast.scheduler.tickets] == ["one", "two", ""]
    assert handed_over == []


async def test_a_lease_that_is_not_free_is_waited_for_in_the_ordinary_lane(
    fast: Proxy, handed_over: list[bytes]
) -> None:
    url, fast.scheduler.base_url = fast.scheduler.base_url, None
    asking = asyncio.create_task(answer_to(fast, request(call())))
    await fast.scheduler.submitted.wait()
    assert handed_over == [request(call())]
    assert url is not None
    fast.scheduler.waiting[0].grant(url)
    assert (await asking).startswith(b"HTTP/1.1 200 ")


async def test_a_slot_that_is_not_free_is_waited_for_in_the_ordinary_lane(
    fast: Proxy, handed_over: list[bytes]
) -> None:
    fast.configure(
        backends=(
            BackendConfig(name="engines", kind="simulated"),
            BackendConfig(name="cloud", kind="openai", base_url=fast.remote.base_url + "/v1", max_connections=1),
        )
    )
    release = asyncio.Event()

    async def slow(web_request: Any, body: bytes) -> Any:
        await release.wait()
        return await plain()(web_request, body)

    fast.remote.behave = slow
    asking = [asyncio.create_task(answer_to(fast, request(call("far")))) for _ in range(3)]
    await until(lambda: len(handed_over) == 2 and len(fast.remote.requests) == 1)
    await asyncio.sleep(0.02)
    assert len(fast.remote.requests) == 1
    release.set()
    assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in await asyncio.gather(*asking))


async def test_a_connection_comes_back_from_the_ordinary_lane_with_its_next_request(
    fast: Proxy, handed_over: list[bytes]
) -> None:
    reader, writer = await asyncio.open_connection(*fast.address)
    url, fast.scheduler.base_url = fast.scheduler.base_url, None
    asking = asyncio.create_task(next_answer(reader, writer, request(call())))
    await fast.scheduler.submitted.wait()
    assert len(handed_over) == 1
    assert url is not None
    fast.scheduler.base_url = url
    fast.scheduler.waiting[0].grant(url)
    assert (await asking).startswith(b"HTTP/1.1 200 ")
    for _ in range(3):
        assert (await next_answer(reader, writer, request(call()))).startswith(b"HTTP/1.1 200 ")
    assert len(handed_over) == 1
    await fast.settled()
    assert {line["remote"] for line in await fast.lines()} == {"127.0.0.1"}
    assert (await next_answer(reader, writer, request(call("nobody")))).startswith(b"HTTP/1.1 404 ")
    assert (await next_answer(reader, writer, request(call()))).startswith(b"HTTP/1.1 200 ")
    assert len(handed_over) == 2
    writer.close()
    await fast.still_works()


@pytest.mark.parametrize("more", [b"POST /v1/", request(call("far"))[:40], request(call("far"))])
async def test_a_connection_stays_where_it_is_once_more_came_than_one_request(
    fast: Proxy, handed_over: list[bytes], more: bytes
) -> None:
    """What began as one request must not be taken for the start of another."""
    reader, writer = await asyncio.open_connection(*fast.address)
    rest = request(call("far"))[len(more) :]
    assert (await next_answer(reader, writer, request(call("nobody")) + more)).startswith(b"HTTP/1.1 404 ")
    assert (await next_answer(reader, writer, rest)).startswith(b"HTTP/1.1 200 ")
    assert (await next_answer(reader, writer, request(call("far")))).startswith(b"HTTP/1.1 200 ")
    assert len(handed_over) == 1
    writer.close()


async def test_pipelined_requests_are_answered_in_their_order(fast: Proxy, handed_over: list[bytes]) -> None:
    names = [b"a-%d" % at for at in range(5)]
    reader, writer = await asyncio.open_connection(*fast.address)
    writer.write(b"".join(request(call(), CHAT, b"x-request-id: " + name) for name in names))
    for name in names:
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"x-request-id: " + name in head
        await reader.readexactly(int(re.search(rb"Content-Length: (\d+)", head)[1]))  # type: ignore[index]
    writer.close()
    assert handed_over == []
    assert len(fast.scheduler.tickets) == 5


async def test_requests_of_any_size_in_any_pieces_keep_to_themselves(fast: Proxy, handed_over: list[bytes]) -> None:
    """Large requests are read into buffers that go from one to the other, and back when their answers begin."""

    async def echo(_: Any, body: bytes) -> web.StreamResponse:
        return web.Response(body=body, content_type="application/json")

    async def ask(mark: int) -> None:
        reader, writer = await asyncio.open_connection(*fast.address)
        for size in (10, 100_000, 20_000, 10, 200_000, 130_000, 16_300):
            text = f"{mark}-" + "abcdefg"[mark] * size
            data = request(call(messages=[{"role": "user", "content": text}]))
            for at in range(0, len(data), 7_000 + 9_000 * mark):
                writer.write(data[at : at + 7_000 + 9_000 * mark])
                await writer.drain()
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            length = int(re.search(rb"(?i)Content-Length: (\d+)", head)[1])  # type: ignore[index]
            assert json.loads(await reader.readexactly(length))["messages"][0]["content"] == text
        writer.close()

    fast.upstream.behave = echo
    await asyncio.gather(*(ask(mark) for mark in range(7)))
    assert handed_over == []


async def test_after_an_odd_request_the_connection_goes_on(fast: Proxy) -> None:
    reader, writer = await asyncio.open_connection(*fast.address)
    for data in (request(call()), b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n", request(call())):
        writer.write(data)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        await reader.readexactly(int(re.search(rb"(?i)Content-Length: (\d+)", head)[1]))  # type: ignore[index]
    writer.close()


class RawUpstream:
    """Answers every request with the bytes it is told, in the pieces it is told; knows its connections."""

    def __init__(self) -> None:
        self.connections = 0
        self.requests = 0
        self.writers: list[asyncio.StreamWriter] = []
        self.answer: Callable[[asyncio.StreamWriter], Awaitable[None]] = self.pieces(b"")
        self.gone = asyncio.Event()

    @staticmethod
    def pieces(*data: bytes, close: bool = False) -> Callable[[asyncio.StreamWriter], Awaitable[None]]:
        async def answer(writer: asyncio.StreamWriter) -> None:
            for piece in data:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            if close:
                writer.close()

        return answer

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))  # type: ignore[index]
                self.requests += 1
                await self.answer(writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.gone.set()
        finally:
            writer.close()


@pytest.fixture
async def raw(fast: Proxy) -> AsyncIterator[RawUpstream]:
    upstream = RawUpstream()
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    fast.scheduler.base_url = "http://{}:{}".format(*server.sockets[0].getsockname())
    yield upstream
    server.close()
    fast.scheduler.base_url = fast.upstream.base_url


def lengthy(body: bytes) -> bytes:
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


def chunked(*pieces: bytes) -> bytes:
    body = b"".join(b"%X;x=y\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        + body
        + b"0\r\nt: 1\r\n\r\n"
    )


async def test_an_answer_split_at_every_byte_is_one_answer(fast: Proxy, raw: RawUpstream) -> None:
    reader, writer = await asyncio.open_connection(*fast.address)
    answer = b"HTTP/1.1 100 Continue\r\n\r\n" + lengthy(ANSWER)
    for at in range(1, len(answer)):
        raw.answer = raw.pieces(answer[:at], answer[at:])
        writer.write(request(call()))
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n"), at
        assert await reader.readexactly(len(ANSWER)) == ANSWER
    writer.close()
    assert raw.connections == 1


async def test_a_stream_split_at_every_byte_is_one_stream(fast: Proxy, raw: RawUpstream) -> None:
    answer = chunked(chunk("a"), chunk(None, "stop") + USAGE_CHUNK, DONE)
    whole = chunk("a") + chunk(None, "stop") + DONE
    for at in range(1, len(answer), 3):
        raw.answer = raw.pieces(answer[:at], answer[at : at + 1], answer[at + 1 :])
        head, body = normal(await answer_to(fast, request(call(stream=True))))
        assert head[0] == b"HTTP/1.1 200 OK"
        assert body == whole, at
    assert raw.connections == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 5\r\n\r\n{}   ",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n{}   ",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\ncontent-length: 2\n\n{}\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n folded\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-length : 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-length: -2\r\n\r\n{}",
        b"HTTP/2 200\r\n\r\n{}",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 20x OK\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\nx\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\n{}xx",
        HEAD + b"transfer-encoding: chunked\r\n\r\n2 2\r\n{}\r\n0\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nno trailer\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n2\n{}\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"f" * 17 + b"\r\n",
        HEAD + b"x: " + b"a" * 20_000,
    ],
)
async def test_a_malformed_answer_is_a_502_and_its_connection_is_not_used_again(
    fast: Proxy, raw: RawUpstream, answer: bytes
) -> None:
    raw.answer = raw.pieces(answer)
    assert (await answer_to(fast, request(call()))).startswith(b"HTTP/1.1 502 ")
    await asyncio.wait_for(raw.gone.wait(), PATIENCE_S)
    raw.answer = raw.pieces(lengthy(ANSWER))
    assert (await answer_to(fast, request(call()))).endswith(ANSWER)


async def test_a_connection_closed_while_idle_costs_nobody_an_answer(
    fast: Proxy, raw: RawUpstream, handed_over: list[bytes]
) -> None:
    raw.answer = raw.pieces(lengthy(ANSWER))
    await answer_to(fast, request(call()))
    answered = raw.answer
    left = [1]

    async def die_once(writer: asyncio.StreamWriter) -> None:
        if left.pop(0):
            left.append(0)
            writer.close()  # as if it had been closed just when the request went out
        else:
            left.append(0)
            await answered(writer)

    raw.answer = die_once
    assert (await answer_to(fast, request(call()))).endswith(ANSWER)
    assert (raw.connections, raw.requests) == (2, 3)
    assert handed_over == []


async def test_a_new_connection_that_breaks_is_not_tried_again_by_the_relay(fast: Proxy, raw: RawUpstream) -> None:
    raw.answer = raw.pieces(close=True)
    assert (await answer_to(fast, request(call()))).startswith(b"HTTP/1.1 502 ")
    assert raw.requests == 1


async def test_an_answer_until_the_connection_closes_is_whole(fast: Proxy, raw: RawUpstream) -> None:
    raw.answer = raw.pieces(HEAD + b"\r\n" + ANSWER, close=True)
    for _ in range(2):
        assert (await answer_to(fast, request(call()))).endswith(ANSWER)
    assert raw.connections == 2


async def test_more_than_was_asked_for_is_dropped_with_its_connection(fast: Proxy, raw: RawUpstream) -> None:
    raw.answer = raw.pieces(lengthy(ANSWER) + lengthy(b'{"for":"somebody else"}'))
    for _ in range(2):
        assert (await answer_to(fast, request(call()))).endswith(ANSWER)
    assert raw.connections == 2


async def test_a_slow_client_pauses_its_own_upstream_and_nobody_elses(fast: Proxy, raw: RawUpstream) -> None:
    written = 0
    piece = chunk("x" * 50_000)

    async def endless(writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
        while True:
            writer.write(piece)
            await writer.drain()
            written += len(piece)

    raw.answer = endless
    reader, writer = await asyncio.open_connection(*fast.address, limit=1024)
    writer.write(request(call(stream=True)))
    await reader.readuntil(b"\r\n\r\n")

    async def stalled() -> bool:
        before = written
        await asyncio.sleep(0.1)
        return written == before

    while not await stalled():
        pass
    assert written < 64 << 20
    fast.scheduler.base_url = fast.upstream.base_url
    assert (await answer_to(fast, request(call()))).startswith(b"HTTP/1.1 200 ")
    before = written
    await reader.readexactly(8 << 20)
    await until(lambda: written > before)
    writer.close()
    await asyncio.wait_for(raw.gone.wait(), PATIENCE_S)
    await fast.settled()
    assert [line["status"] for line in await fast.lines()] == [200, 499]


async def test_a_client_that_takes_nothing_is_dropped_and_recorded(fast: Proxy, raw: RawUpstream) -> None:
    fast.configure(timeouts=TimeoutsConfig(write_stall_s=0.2))

    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
        while True:
            writer.write(chunk("x" * 50_000))
            await writer.drain()

    raw.answer = endless
    _, writer = await asyncio.open_connection(*fast.address, limit=1024)
    writer.write(request(call(stream=True)))
    await asyncio.wait_for(raw.gone.wait(), PATIENCE_S)
    await fast.settled()
    assert [(line["status"], line["error"]) for line in await fast.lines()] == [(499, "client_stalled")]
    writer.close()


@pytest.mark.parametrize("sent", [1, 40, -5, None])
@pytest.mark.parametrize("streaming", [False, True])
async def test_a_client_that_leaves_at_any_point_costs_nothing(fast: Proxy, sent: int | None, streaming: bool) -> None:
    fast.upstream.behave = stream(chunk("a"), then=hang) if streaming else hang  # type: ignore[arg-type]
    data = request(call(stream=streaming))
    reader, writer = await asyncio.open_connection(*fast.address)
    writer.write(data[:sent])
    if sent is None:
        await fast.upstream.arrived.wait()
        if streaming:
            await reader.readuntil(b"\r\n\r\n")
    writer.close()
    if sent is None:
        await asyncio.wait_for(fast.upstream.aborted.wait(), PATIENCE_S)
    await fast.settled()
    assert len(await fast.lines()) == (sent is None)
    assert fast.metrics.registry.get_sample_value("vramp_requests_in_flight") == 0
    await fast.still_works()


async def test_a_stop_ends_what_is_in_flight_with_words(fast: Proxy) -> None:
    fast.upstream.behave = stream(chunk("a"), then=hang)  # type: ignore[arg-type]
    reader, writer = await asyncio.open_connection(*fast.address)
    writer.write(request(call(stream=True)))
    await reader.readuntil(b'"a"')
    waiting = asyncio.create_task(answer_to(fast, request(call())))
    await until(lambda: fast.handler.in_flight == 2)
    await fast.server.close()
    assert b"stopping" in await reader.readuntil(b"\r\n0\r\n\r\n")
    writer.close()
    assert (await waiting).startswith((b"HTTP/1.1 503 ", b"HTTP/1.1 200 "))


async def test_a_reload_is_seen_by_the_next_request(fast: Proxy) -> None:
    assert (await answer_to(fast, request(call()))).startswith(b"HTTP/1.1 200 ")
    fast.configure(keys=("secret",))
    assert (await answer_to(fast, request(call()))).startswith(b"HTTP/1.1 401 ")
    good = request(call(), CHAT, b"authorization: Bearer secret")
    assert (await answer_to(fast, good)).startswith(b"HTTP/1.1 200 ")


async def test_a_backend_by_name_is_looked_up_and_then_fast(fast: Proxy, handed_over: list[bytes]) -> None:
    url = fast.remote.base_url.replace("127.0.0.1", "localhost")
    fast.configure(
        backends=(
            BackendConfig(name="engines", kind="simulated"),
            BackendConfig(name="cloud", kind="openai", base_url=url + "/v1"),
        )
    )
    for _ in range(200):
        assert (await answer_to(fast, request(call("far")))).startswith(b"HTTP/1.1 200 ")
        if not handed_over:
            break
        handed_over.clear()
    else:
        pytest.fail("never fast")
    assert fast.remote.requests[-1][1]["host"].startswith("localhost:")


async def test_an_answer_that_came_before_its_request_is_nobodys(fast: Proxy, raw: RawUpstream) -> None:
    """Both are there in one turn of the relay: the request has a connection, and is not out yet."""
    raw.answer = raw.pieces(lengthy(ANSWER))
    reader, writer = await asyncio.open_connection(*fast.address)
    await next_answer(reader, writer, request(call(stream=True)))
    raw.answer = raw.pieces(chunked(chunk("asked", "stop"), DONE))
    os.write(writer.get_extra_info("socket").fileno(), request(call(stream=True)))
    os.write(raw.writers[0].get_extra_info("socket").fileno(), chunked(chunk("unasked"))[:-5])
    assert normal(await next_answer(reader, writer, b""))[1] == chunk("asked", "stop") + DONE
    assert raw.connections == 2
    writer.close()


@pytest.mark.parametrize("lane", [0, 1], ids=["ordinary", "fast"])
async def test_what_comes_after_an_answer_is_nobodys(lanes: Lanes, raw: RawUpstream, lane: int) -> None:
    """An idle connection that says something has lost count: the next answer on it would be to another request."""
    proxy = lanes[lane]
    proxy.scheduler.base_url = lanes[1].scheduler.base_url
    raw.answer = raw.pieces(lengthy(ANSWER))
    await answer_to(proxy, request(call()))
    raw.writers[0].write(lengthy(b'{"for":"somebody else"}'))
    for _ in range(5):
        await asyncio.sleep(0)
    assert (await answer_to(proxy, request(call()))).endswith(ANSWER)
    assert raw.connections == 2
    proxy.scheduler.base_url = proxy.upstream.base_url
    await proxy.still_works()


async def test_an_upstream_that_said_it_goes_on_and_went_is_not_asked_again(fast: Proxy, raw: RawUpstream) -> None:
    raw.answer = raw.pieces(lengthy(ANSWER))
    await answer_to(fast, request(call()))
    raw.answer = raw.pieces(b"HTTP/1.1 100 Continue\r\n\r\n", close=True)
    assert (await answer_to(fast, request(call()))).startswith(b"HTTP/1.1 502 ")
    assert raw.requests == 2


@pytest.mark.parametrize("options", [b"close", b"Close, x", b"x, close"])
async def test_a_connection_that_its_upstream_will_close_is_not_used_again(
    fast: Proxy, raw: RawUpstream, options: bytes
) -> None:
    raw.answer = raw.pieces(lengthy(ANSWER).replace(b"\r\n\r\n", b"\r\nConnection: " + options + b"\r\n\r\n"))
    for _ in range(2):
        assert (await answer_to(fast, request(call()))).endswith(ANSWER)
    assert raw.connections == 2


@pytest.mark.parametrize("lane", [0, 1], ids=["ordinary", "fast"])
@pytest.mark.parametrize("byte", [b"\x00", b"\x1b", b"\x7f"])
async def test_no_control_character_of_an_upstream_reaches_a_client(
    lanes: Lanes, raw: RawUpstream, lane: int, byte: bytes
) -> None:
    """The relay takes that for no HTTP, aiohttp's parser for a header."""
    lanes[lane].scheduler.base_url = lanes[1].scheduler.base_url
    raw.answer = raw.pieces(lengthy(ANSWER).replace(b"\r\n\r\n", b"\r\nopenai-version: 1" + byte + b"2\r\n\r\n"))
    head = (await answer_to(lanes[lane], request(call()))).partition(b"\r\n\r\n")[0]
    assert byte not in head
    lanes[lane].scheduler.base_url = lanes[lane].upstream.base_url


async def test_an_upstream_that_goes_in_its_head_is_told_without_what_it_said(lanes: Lanes, raw: RawUpstream) -> None:
    lanes[0].scheduler.base_url = lanes[1].scheduler.base_url
    raw.answer = raw.pieces(HEAD + b"set-cookie: secret\r\nx-long", close=True)
    answer = await answer_to(lanes[0], request(call()))
    assert answer.startswith(b"HTTP/1.1 502 ")
    assert b"the connection was closed" in answer
    assert b"secret" not in answer
    lanes[0].scheduler.base_url = lanes[0].upstream.base_url
