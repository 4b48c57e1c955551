"""Requests that go by a flow, beside those that are decided: nobody could tell them apart but by what they cost."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from prometheus_client import generate_latest

from proxy.accounting import usage
from proxy.config import BackendConfig, LimitsConfig, ModelLimitsConfig, TimeoutsConfig
from proxy.server import fast as lane
from proxy.server.fast import FastLane
from tests.fakes import DONE, STREAM, chunk, hang, plain, stream, until
from tests.patience import PATIENCE_S
from tests.proxy.server.conftest import Proxy
from tests.proxy.server.test_fast_lane import (
    CALLS,
    CHAT,
    TIMES,
    Lanes,
    answer_to,
    call,
    lanes,
    next_answer,
    normal,
    request,
)

pytestmark = pytest.mark.native
__all__ = ["lanes"]

COUNTED = b'{"choices":[{"finish_reason":"l\xc3\xa4nge"}],"usage":{"prompt_tokens":7,"completion_tokens":2%b}}'
CACHED = b',"prompt_tokens_details":{"cached_tokens":4}'
LIMITS = LimitsConfig(
    tokens_per_minute=6000, concurrency=9, models={"far": ModelLimitsConfig(requests_per_minute=500, concurrency=9)}
)
OF_OPENAI = {"x-ratelimit-limit-requests": "5", "openai-version": "1", "x-ratelimit-reset-requests": "1s"}


STARTED = b'event: message_start\ndata: {"type":"message_start","message":{"usage":%b}}\n\n'
DELTA = b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":%b}\n\n'
STOPPED = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'


def used(usage: bytes) -> bytes:
    return b'data: {"choices":[],"usage":%b}\n\n' % usage


def two(_: web.BaseRequest, __: bytes) -> Any:
    async def answer() -> web.Response:
        headers: Any = [("openai-version", "1"), ("openai-organization", "o"), ("openai-version", "2")]
        return web.Response(body=COUNTED % b"", headers=headers, content_type="application/json")

    return answer()


REMOTE: dict[str, tuple[Any, bytes]] = {
    "a chat": (plain(COUNTED % b""), request(call("far"))),
    "cached tokens": (plain(COUNTED % CACHED), request(call("far", max_tokens=50))),
    "no usage": (plain(b'{"choices":[]}'), request(call("far"))),
    "no reason": (plain(b'{"choices":[{"index":0}]}'), request(call("far"))),
    "a list": (plain(b"[1]"), request(call("far"))),
    "a body of odd usage": (plain(b'{"usage":{"prompt_tokens":"many"}}'), request(call("far"))),
    "in a class": (plain(COUNTED % b""), request(call("far"), CHAT, b"x-vramp-class: batch")),
    "with an id": (plain(COUNTED % b""), request(call("far"), CHAT, b"x-request-id: mine-1")),
    "traced": (plain(COUNTED % b""), request(call("far"), CHAT, b"traceparent: 00-1-2-01")),
    "headers of a provider": (plain(COUNTED % b"", **OF_OPENAI), request(call("far"))),
    "a header twice": (two, request(call("far"))),
    "an odd type": (plain(COUNTED % b"", content_type="application/x-json"), request(call("far"))),
    "a stream": (stream(), request(call("far", stream=True))),
    "a stream with usage": (stream(), request(call("far", stream=True, stream_options={"include_usage": True}))),
    "a stream of no end": (stream(chunk("Hel")), request(call("far", stream=True))),
    "an error in a stream": (
        stream(chunk("a"), b'data: {"error":{"message":"x"}}\n\n'),
        request(call("far", stream=True)),
    ),
    **{name: (stream(*pieces), request(call("far", stream=True))) for name, pieces in (
        ("a stream of cached tokens", (chunk("a", "stop"), used(b'{"prompt_tokens":7%b}' % CACHED), DONE)),
        ("a stream of odd usage", (chunk("a", "stop"), used(b'{"prompt_tokens":"many"}'), DONE)),
        ("a stream of no usage", (chunk("a", "stop"), DONE)),
        ("a stream of no reason", (chunk("a"), DONE)),
        ("a stream of an empty reason", (chunk("a", ""), DONE)),
        ("a stream of a reason in quotes", (chunk("a", 'so "it" ended'), DONE)),
        ("a stream of a long way", (chunk("a", "l\u00e4nge"), DONE)),
        ("a stream that is not done", (chunk("a", "stop"),)),
        ("a stream without a last line", (chunk("a", "stop"), b"data: [DONE]")),
        ("a stream of a large event", (chunk("a"), chunk("b" * (1 << 21)), chunk("c", "stop"), DONE)),
    )},
    "messages of two usages": (
        stream(STARTED % b'{"input_tokens":3,"output_tokens":1}', DELTA % b'{"output_tokens":8}', STOPPED),
        request(call("far", stream=True, max_tokens=5), "/v1/messages"),
    ),
    "messages": (stream(chunk("a", "stop"), DONE), request(call("far", stream=True, max_tokens=5), "/v1/messages")),
    "completions": (plain(COUNTED % b""), request({"model": "far", "prompt": "x"}, "/v1/completions")),
    **{name: CALLS[name] for name in (
        "to a remote, renamed", "a remote stream", "a stream of comments", "an empty stream", "no JSON",
        "an empty answer", "rate limits", "a page for a refusal", "a bad key there", "overload there",
    )},
    "201": (plain(status=201), request(call("far"))),
    "events unasked": (stream(), request(call("far"))),
    "a stream as JSON": (plain(), request(call("far", stream=True))),
    "a coded answer": (plain(b"\x1f\x8b", **{"content-encoding": "gzip"}), request(call("far"))),
    "a large answer": (plain(b'{"data":[' + b"0.5," * 300_000 + b"0]}"), request(call("far"))),
}  # fmt: skip


def on_engine(data: bytes) -> bytes:
    """The same call of a local model."""
    head, _, body = data.partition(b"\r\n\r\n")
    body = body.replace(b'"far"', b'"demo-chat"')
    return re.sub(rb"(content-length:) \d+", rb"\1 %d" % len(body), head) + b"\r\n\r\n" + body


# Where a comment comes first, the lanes differ: the ordinary one begins the stream, the fast one waits for the output.
LOCAL = {
    f"{name}, local": (behave, on_engine(data))
    for name, (behave, data) in REMOTE.items()
    if b'"far"' in data and name != "a stream of comments"
}
# The ordinary lane says these, and the connection comes back after each.
HANDED_OVER = (
    "no JSON",
    "an empty answer",
    "a page for a refusal",
    "a bad key there",
    "overload there",
    "an empty stream",
)


@pytest.fixture
async def fast(lanes: Lanes) -> Proxy:
    return lanes[1]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What the relay asked of Python."""
    seen: Counter[str] = Counter()
    for name in ("decide", "resume", "hand_over"):
        original = getattr(FastLane, name)

        def counting(self: FastLane, *args: Any, name: str = name, original: Any = original) -> Any:
            seen[name] += 1
            return original(self, *args)

        monkeypatch.setattr(FastLane, name, counting)
    return seen


class Connection:
    """One connection, on which calls follow each other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def ask(self, data: bytes) -> bytes:
        return await next_answer(self.reader, self.writer, data)

    async def status(self, data: bytes) -> int:
        return int((await self.ask(data)).split()[1])

    async def make_known(self, data: bytes) -> None:
        """From the second of its kind on there is a flow."""
        assert [await self.status(data) for _ in range(2)] == [200, 200]


@pytest.fixture
async def connection(fast: Proxy) -> AsyncIterator[Connection]:
    made = Connection(*await asyncio.open_connection(*fast.address))
    yield made
    made.writer.close()


async def seen(proxy: Proxy, answer: bytes) -> dict[str, Any]:
    """All that came of the last call, but for ids and times."""
    await proxy.settled()
    meters = [proxy.counters.meter(name, 500, 6000) for name in ("key local", "model far")]
    path, headers, body = (proxy.upstream.requests + proxy.remote.requests)[-1]
    return {
        "answer": normal(answer),
        "line": {name: value for name, value in (await proxy.lines())[-1].items() if name not in TIMES},
        "row": {name: value for name, value in (await proxy.rows())[-1].items() if name not in TIMES},
        "asked": (path, body, sorted(set(headers.items()) - {("host", headers["host"])})),
        "in use": [meter.in_use for meter in meters],
        "leases": [(msgspec.structs.replace(each.ticket, id=0), each.usage) for each in proxy.scheduler.waiting],
        "all returned": proxy.scheduler.all_returned_once,
    }


def counts(proxy: Proxy) -> dict[str, float]:
    """The metrics but for sums of seconds, and for the buckets that seconds fall into."""
    page = generate_latest(proxy.metrics.registry).decode()
    lines = [line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines if "_sum" not in name and "_bucket" not in name}


@pytest.mark.parametrize("limits", [LimitsConfig(), LIMITS], ids=["free", "limited"])
@pytest.mark.parametrize("name", [*REMOTE, *LOCAL])
async def test_what_goes_by_a_flow_is_what_is_decided(
    lanes: Lanes, asked: Counter[str], name: str, limits: LimitsConfig
) -> None:
    behave, data = (REMOTE | LOCAL)[name]
    found: dict[str, list[dict[str, Any]]] = {}
    for way, proxy in zip(("ordinary", "fast"), lanes, strict=True):
        proxy.configure(limits=limits)
        proxy.upstream.behave = proxy.remote.behave = behave
        connection = Connection(*await asyncio.open_connection(*proxy.address))
        found[way] = [await seen(proxy, await connection.ask(data)) for _ in range(4)]
        connection.writer.close()
    for each in (*found["ordinary"], *found["fast"]):
        head, body = each["answer"]
        # what is left of a minute's tokens depends on when
        each["answer"] = ([re.sub(rb"((remaining|reset)-\w+: ).*", rb"\1", line) for line in head], body)
        if name == "a stream of comments":  # how its pieces fall says whether the head went before the first event
            each["answer"] = (head[:1], body)
            each["line"].pop("bytes_out")
    assert found["fast"] == found["ordinary"]
    assert counts(lanes[1]) == counts(lanes[0])
    if name.partition(",")[0] in HANDED_OVER:
        assert asked["hand_over"] == 4
    else:
        assert (asked["decide"], asked["hand_over"]) == (4 if "with an id" in name else 2, 0)


async def test_what_is_out_of_the_ordinary_is_pythons_and_nothing_else_is(
    fast: Proxy, connection: Connection, asked: Counter[str]
) -> None:
    fast.remote.behave = plain(COUNTED % b"")
    for _ in range(5):
        assert await connection.status(request(call("far"))) == 200
    assert asked == {"decide": 2}
    fast.remote.behave = plain(status=201)
    assert await connection.status(request(call("far"))) == 201
    assert asked == {"decide": 2, "resume": 1}


async def test_streams_that_end_as_they_should_are_none_of_pythons(
    fast: Proxy, connection: Connection, asked: Counter[str]
) -> None:
    for behave in (stream(), stream(chunk("a", "stop"), DONE), stream(chunk("a"), DONE)):
        fast.remote.behave = behave
        for _ in range(3):
            assert await connection.status(request(call("far", stream=True))) == 200
    assert asked == {"decide": 2}
    fast.remote.behave = stream(chunk("a", "stop"), used(b'{"prompt_tokens":"many"}'), DONE)
    assert await connection.status(request(call("far", stream=True))) == 200
    assert asked == {"decide": 2, "resume": 1}


async def test_a_kind_is_decided_twice_for_all_connections(fast: Proxy, asked: Counter[str]) -> None:
    """At first nobody knows whether it will be said again."""
    for _ in range(4):
        await answer_to(fast, request(call("far")))
    assert asked == {"decide": 2}
    others = {
        "another key": request(call("far"), CHAT, b"authorization: Bearer other"),
        "another path": request({"model": "far", "messages": [], "prompt": "x"}, "/v1/completions"),
        "another model": request(call("demo-chat")),
        "other parameters": request(call("far", max_tokens=9)),
        "another class": request(call("far"), CHAT, b"x-vramp-class: batch"),
    }
    for at, data in enumerate(others.values()):
        for _ in range(3):
            await answer_to(fast, data)
        assert asked == {"decide": 2 * at + 4}


async def test_what_is_never_said_twice_makes_no_flow(
    fast: Proxy, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trace in each request would otherwise cost each a flow that nobody goes by."""
    made: list[object] = []
    monkeypatch.setattr(lane, "flow_of", lambda *args, **more: made.append(args))
    for number in range(5):
        trace = b"traceparent: 00-%032d-1-01" % number
        assert await connection.status(request(call("far"), CHAT, trace)) == 200
    assert made == []


@pytest.mark.parametrize("limit", ["concurrency", "requests_per_minute"])
async def test_a_limit_refuses_what_would_go_by_a_flow(fast: Proxy, connection: Connection, limit: str) -> None:
    fast.configure(limits=LimitsConfig(**{limit: 3}))
    held = asyncio.Event()

    async def holding(web_request: web.BaseRequest, body: bytes) -> web.StreamResponse:
        await held.wait()
        return await plain()(web_request, body)

    fast.remote.behave = plain()
    data = request(call("far"))
    await connection.make_known(data)
    fast.remote.behave = holding
    asking = [asyncio.create_task(answer_to(fast, data)) for _ in range(3 if limit == "concurrency" else 1)]
    await until(lambda: fast.handler.in_flight == len(asking))
    assert await connection.status(data) == 429
    held.set()
    assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in await asyncio.gather(*asking))
    await fast.settled()
    assert fast.counters.meter("key local", 0, 0, 3).in_use == 0


async def test_a_slot_that_is_not_free_is_waited_for_and_not_lost(fast: Proxy, asked: Counter[str]) -> None:
    backend = BackendConfig(name="cloud", kind="openai", base_url=fast.remote.base_url + "/v1", max_connections=1)
    fast.configure(backends=(BackendConfig(name="engines", kind="simulated"), backend))
    connections = [Connection(*await asyncio.open_connection(*fast.address)) for _ in range(3)]
    for each in connections:
        assert await each.status(request(call("far"))) == 200
    assert asked["hand_over"] == 0
    release = asyncio.Event()

    async def slow(web_request: Any, body: bytes) -> Any:
        await release.wait()
        return await plain()(web_request, body)

    fast.remote.behave = slow
    before = len(fast.remote.requests)
    asking = [asyncio.create_task(each.status(request(call("far")))) for each in connections]
    await until(lambda: asked["hand_over"] == 2 and len(fast.remote.requests) > before)
    await asyncio.sleep(0.02)
    assert len(fast.remote.requests) == before + 1
    release.set()
    assert await asyncio.gather(*asking) == [200, 200, 200]
    assert fast.state.providers["cloud"].slots.places.taken == 0  # type: ignore[union-attr]
    for each in connections:
        each.writer.close()


async def test_keys_and_models_of_a_new_configuration_hold_for_the_next_request(
    fast: Proxy, connection: Connection
) -> None:
    data = request(call("far"), CHAT, b"authorization: Bearer one")
    fast.configure(keys=("one",))
    assert [await connection.status(data) for _ in range(3)] == [200, 200, 200]
    fast.configure(keys=("one",), limits=LimitsConfig(requests_per_minute=1))
    assert [await connection.status(data) for _ in range(2)] == [200, 429]
    fast.configure(keys=("two",))
    assert await connection.status(data) == 401


async def test_what_carries_its_own_id_is_not_let_by_after_a_reload(fast: Proxy, connection: Connection) -> None:
    data = request(call("far"), CHAT, b"authorization: Bearer one", b"x-request-id: same")
    fast.configure(keys=("one",))
    assert [await connection.status(data) for _ in range(3)] == [200, 200, 200]
    fast.configure(keys=("two",))
    other = request(call("far"), CHAT, b"authorization: Bearer two")
    assert (await answer_to(fast, other)).startswith(b"HTTP/1.1 200 ")
    assert await connection.status(data) == 401


async def test_a_server_that_drains_lets_nothing_by(fast: Proxy, connection: Connection) -> None:
    await connection.make_known(request(call("far")))
    fast.handler.drain()
    assert await connection.status(request(call("far"))) == 503


async def test_nobody_goes_by_unrecorded(fast: Proxy, connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    await connection.make_known(request(call("far")))
    await fast.rows()
    monkeypatch.setattr(usage, "MOST_PENDING", 0)
    assert await connection.status(request(call("far"))) in (200, 503)  # the row of this one tells that it is full
    assert await connection.status(request(call("far"))) == 503
    monkeypatch.undo()
    again = Connection(*await asyncio.open_connection(*fast.address))
    await again.make_known(request(call("far")))
    again.writer.close()


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_client_that_leaves_is_recorded_as_one(fast: Proxy, connection: Connection, streaming: bool) -> None:
    data = request(call("far", stream=streaming))
    fast.remote.behave = stream() if streaming else plain()
    await connection.make_known(data)
    fast.remote.behave = stream(chunk("a"), then=hang) if streaming else hang  # type: ignore[arg-type]
    fast.remote.arrived.clear()
    connection.writer.write(data)
    await fast.remote.arrived.wait()
    if streaming:
        await connection.reader.readuntil(b"\n\n")
    connection.writer.close()
    await asyncio.wait_for(fast.remote.aborted.wait(), PATIENCE_S)
    await fast.settled()
    line, row = (await fast.lines())[-1], (await fast.rows())[-1]
    assert (line["status"], line["error"], row["status"]) == (499, "client_left", 499)
    assert ("first_byte_s" in line) == streaming
    assert fast.counters.meter("key local", 0, 0, 9).in_use == 0
    await fast.still_works()


@pytest.mark.parametrize("streaming", [False, True])
async def test_an_upstream_that_goes_is_told_and_recorded(fast: Proxy, connection: Connection, streaming: bool) -> None:
    async def cut(web_request: web.BaseRequest) -> None:
        assert web_request.transport is not None
        web_request.transport.abort()

    async def gone(web_request: web.BaseRequest, _: bytes) -> web.StreamResponse:
        await cut(web_request)
        raise ConnectionResetError

    data = request(call("far", stream=streaming))
    fast.remote.behave = stream() if streaming else plain()
    await connection.make_known(data)
    fast.remote.behave = stream(chunk("a"), then=cut) if streaming else gone
    answer = await connection.ask(data)
    await fast.settled()
    line = (await fast.lines())[-1]
    if streaming:
        assert b"upstream_error" in answer
        assert (line["status"], line["error"]) == (200, "upstream_error")
        assert line["bytes_out"] == len(normal(answer)[1])
    else:
        assert answer.startswith(b"HTTP/1.1 502 ")
        assert line["status"] == 502
    await fast.still_works()


async def test_an_answer_that_does_not_come_is_a_504(fast: Proxy, connection: Connection) -> None:
    fast.configure(timeouts=TimeoutsConfig(first_byte_s=0.5))
    await connection.make_known(request(call("far")))
    fast.remote.behave = hang  # type: ignore[assignment]
    assert await connection.status(request(call("far"))) == 504


async def test_a_stop_ends_a_stream_with_words(fast: Proxy, connection: Connection) -> None:
    data = request(call("far", stream=True))
    fast.remote.behave = stream()
    await connection.make_known(data)
    fast.remote.behave = stream(chunk("a"), then=hang)  # type: ignore[arg-type]
    connection.writer.write(data)
    await connection.reader.readuntil(b'"a"')
    await fast.server.close()
    assert b"stopping" in await connection.reader.readuntil(b"\r\n0\r\n\r\n")


async def test_ids_of_requests_differ(fast: Proxy, connection: Connection) -> None:
    ids = set()
    for _ in range(50):
        found = re.search(rb"x-request-id: (req-[0-9a-f]{24})\r\n", await connection.ask(request(call("far"))))
        assert found
        ids.add(found[1])
    assert len(ids) == 50


async def test_a_slow_stream_is_one_stream_at_any_border(fast: Proxy, connection: Connection, tmp_path: Path) -> None:
    data = request(call("far", stream=True))
    fast.remote.behave = stream()
    await connection.make_known(data)
    whole = normal(await connection.ask(data))
    for size in (1, 7, 100):
        pieces = [STREAM[at : at + size] for at in range(0, len(STREAM), size)]
        fast.remote.behave = stream(*pieces)
        assert normal(await connection.ask(data)) == whole
