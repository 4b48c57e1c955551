"""Embedding calls that go upstream as one, and nobody can tell."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from proxy.config import BackendConfig, LimitsConfig, ModelConfig
from proxy.server.packing import MOST_BODY, MOST_OWN, Engine, Packer, split, take_apart
from tests.fakes import die, plain, until
from tests.patience import PATIENCE_S
from tests.proxy.server.conftest import Proxy


class Embedder:
    """An engine: the embedding of a list of tokens is their sum, of a text its length in words, which is its tokens.

    Until `go` is set every embeddings call waits; `refuse` may answer instead, `lie` is added to the usage.
    """

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.calls: list[Any] = []
        self.refuse: Callable[[list[Any]], int] = lambda _: 0
        self.lie = 0
        self.drop = False

    async def __call__(self, request: web.BaseRequest, body: bytes) -> web.StreamResponse:
        asked = json.loads(body)
        if request.path == "/tokenize":
            return web.json_response({"count": len(asked["prompt"].split()), "tokens": []})
        given = asked["input"]
        inputs = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
        self.calls.append(given)
        await self.go.wait()
        if self.drop and len(inputs) > 1:
            await die(request)
        status = self.refuse(inputs)
        if status:
            error = {"message": f"no {given}", "type": "invalid_request_error", "param": None, "code": None}
            return web.json_response({"error": error}, status=status)
        total = sum(self.tokens(each) for each in inputs) + self.lie * (len(inputs) > 1)
        return web.json_response(
            {
                "id": "embd-1",
                "object": "list",
                "model": asked["model"],
                "data": [
                    {"index": at, "object": "embedding", "embedding": [self.value(each), 0.10]}
                    for at, each in enumerate(inputs)
                ],
                "usage": {"prompt_tokens": total, "total_tokens": total, "completion_tokens": 0},
            }
        )

    @staticmethod
    def tokens(given: Any) -> int:
        return len(given.split()) if isinstance(given, str) else len(given)

    @staticmethod
    def value(given: Any) -> int:
        return len(given) if isinstance(given, str) else sum(given)


class Window:
    """The packer's clock: a window that is over when the test says so."""

    def __init__(self) -> None:
        self.opened = 0
        self.over: Callable[[], None] = lambda: None

    def __call__(self, delay_s: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        self.opened += 1
        self.over = call
        return asyncio.get_running_loop().call_later(3600, call)


@pytest.fixture
async def engine(proxy: Proxy) -> AsyncIterator[Embedder]:
    """A vLLM that is busy with a first call; the others gather until it is told to `go`."""
    configure(proxy)
    engine = Embedder()
    proxy.upstream.behave = engine
    first = asyncio.create_task(embed(proxy, [1]))
    await until(lambda: len(engine.calls) == 1)
    yield engine
    engine.go.set()
    assert (await first)["usage"]["prompt_tokens"] == 1
    await proxy.settled()
    assert proxy.scheduler.all_returned_once
    assert proxy.state.packer is None or not proxy.state.packer.is_busy("demo-embed")


def configure(proxy: Proxy, kind: str = "vllm", window_ms: float = 1000.0) -> Window:
    proxy.configure(
        backends=(BackendConfig(name="engines", kind=kind),),
        models=(
            ModelConfig(id="demo-embed", backend="engines", task="embed", path="/models/e"),
            ModelConfig(id="demo-chat", backend="engines", path="/models/c"),
        ),
        limits=LimitsConfig(embed_window_ms=window_ms),
    )
    window = Window()
    if window_ms:
        packer = Packer(window_ms / 1000, window)
        proxy.state = msgspec.structs.replace(proxy.state, packer=packer)
        proxy.handler.configure(proxy.state)
    return window


async def post(proxy: Proxy, given: Any, headers: dict[str, str] | None = None, **more: Any) -> tuple[int, Any, Any]:
    body = {"model": "demo-embed", "input": given, **more}
    async with proxy.session.post("/v1/embeddings", json=body, headers=headers) as response:
        return response.status, response.headers, await response.json()


async def embed(proxy: Proxy, given: Any, **more: Any) -> Any:
    status, _, answer = await post(proxy, given, **more)
    assert status == 200, answer
    return answer


async def gather(proxy: Proxy, *inputs: Any) -> list[asyncio.Task[tuple[int, Any, Any]]]:
    """Callers with these inputs, all of whom hold a lease and wait, in this order."""
    packer = proxy.state.packer
    assert packer is not None
    tasks = []
    for each in inputs:  # one after the other: connections of their own would come in any order
        tasks.append(asyncio.create_task(post(proxy, each)))
        await until(lambda: packer.gathering("demo-embed") == len(tasks))
    return tasks


async def under_way(
    proxy: Proxy, engine: Embedder, *inputs: Any
) -> tuple[asyncio.Task[Any], list[asyncio.Task[tuple[int, Any, Any]]]]:
    """A first call, and callers whose pack has reached the engine; nothing is answered until it is told to `go`."""
    engine.go.set()
    await proxy.settled()
    window = configure(proxy)
    engine.go.clear()
    calls = len(engine.calls)
    first = asyncio.create_task(embed(proxy, [1]))
    await until(lambda: len(engine.calls) == calls + 1)
    callers = await gather(proxy, *inputs)
    window.over()
    await until(lambda: len(engine.calls) == calls + 2)
    return first, callers


@pytest.mark.parametrize("inputs", [([2, 3], [[4], [5, 6]], [7]), ("one", ["two words", "and three more"], "four")])
async def test_callers_that_come_while_the_engine_is_busy_share_a_call_and_each_gets_its_own(
    proxy: Proxy, engine: Embedder, inputs: tuple[Any, ...]
) -> None:
    callers = await gather(proxy, *inputs)
    engine.go.set()
    for asked, (status, headers, answer) in zip(inputs, await asyncio.gather(*callers), strict=True):
        mine = asked if isinstance(asked, list) and not isinstance(asked[0], int) else [asked]
        assert (status, headers["x-vramp-packed"]) == (200, "3")
        assert [each["index"] for each in answer["data"]] == list(range(len(mine)))
        assert [each["embedding"][0] for each in answer["data"]] == [engine.value(each) for each in mine]
        tokens = sum(engine.tokens(each) for each in mine)
        assert (answer["usage"]["prompt_tokens"], answer["usage"]["total_tokens"]) == (tokens, tokens)
        assert (answer["usage"]["completion_tokens"], answer["object"], answer["model"]) == (0, "list", "demo-embed")
    assert len(engine.calls) == 2
    ids = {answer["id"] for _, _, answer in await asyncio.gather(*callers)}
    assert len(ids) == 3


async def test_the_rows_of_the_log_and_the_leases_are_one_for_each_caller(proxy: Proxy, engine: Embedder) -> None:
    callers = await gather(proxy, [2, 3], [4])
    engine.go.set()
    await asyncio.gather(*callers)
    await proxy.settled()
    rows = [line["prompt_tokens"] for line in await proxy.lines()]
    assert sorted(rows) == [1, 1, 2]
    assert [each.closed for each in proxy.scheduler.waiting if each.usage is not None] == [1, 1, 1]


async def test_a_caller_who_is_alone_is_sent_on_at_once_byte_for_byte(proxy: Proxy) -> None:
    window = configure(proxy)
    engine = Embedder()
    engine.go.set()
    proxy.upstream.behave = engine
    body = b' {"input" :[1,\n2], "model":"demo-embed"}'
    response = await proxy.session.post("/v1/embeddings", data=body, headers={"content-type": "application/json"})
    assert "x-vramp-packed" not in response.headers
    assert window.opened == 0
    assert proxy.upstream.requests[-1][2] == body


async def test_a_chat_to_embed_goes_by_itself_though_the_engine_is_busy(proxy: Proxy, engine: Embedder) -> None:
    proxy.upstream.behave = plain(b'{"data":[],"usage":{"prompt_tokens":7}}')
    body = b'{"messages": [{"role":"user","content":"Hi"}],"model":"demo-embed"}'
    response = await proxy.session.post("/v1/embeddings", data=body, headers={"content-type": "application/json"})
    assert response.status == 200
    assert "x-vramp-packed" not in response.headers
    assert proxy.upstream.requests[-1][2] == body
    proxy.upstream.behave = engine
    engine.go.set()
    await proxy.settled()
    assert 7 in [line["prompt_tokens"] for line in await proxy.lines()]


async def test_a_chat_to_embed_reaches_a_remote(proxy: Proxy) -> None:
    proxy.configure(models=(ModelConfig(id="away", backend="cloud", task="embed", upstream_model="theirs"),))
    proxy.remote.behave = plain(b'{"data":[],"usage":{"prompt_tokens":7}}')
    body = {"model": "away", "messages": [{"role": "user", "content": "Hi"}]}
    response = await proxy.session.post("/v1/embeddings", json=body)
    assert response.status == 200
    assert proxy.remote.last_body == {**body, "model": "theirs"}
    await proxy.settled()
    assert [line["prompt_tokens"] for line in await proxy.lines()] == [7]


async def test_who_gathered_and_was_left_alone_is_sent_byte_for_byte_too(proxy: Proxy, engine: Embedder) -> None:
    (caller,) = await gather(proxy, [2, 3])
    engine.go.set()
    _, headers, answer = await caller
    assert "x-vramp-packed" not in headers
    assert answer["id"] == "embd-1"
    assert proxy.upstream.last_body == {"model": "demo-embed", "input": [2, 3]}


async def test_the_window_ends_the_gathering_though_the_engine_is_still_busy(proxy: Proxy, engine: Embedder) -> None:
    first, callers = await under_way(proxy, engine, [2], [3])
    assert engine.calls[-1] == [[2], [3]]
    engine.go.set()
    assert [answer["data"][0]["embedding"][0] for _, _, answer in await asyncio.gather(*callers)] == [2, 3]
    await first


async def test_the_window_is_over_when_its_time_is(proxy: Proxy) -> None:
    configure(proxy)
    packer = Packer(0.001)
    engine = Engine("m", proxy.state.providers["engines"], proxy.upstream.base_url, tokenizes=True)
    proxy.upstream.behave = answers = Embedder()
    answers.go.set()
    packer.begin("m")  # and never over: nothing but the clock ends the gathering
    async with packer.send(engine, b'{"model":"m","input":[1]}') as upstream:
        assert upstream.status == 200


@pytest.mark.parametrize("status", [400, 422, 500])
async def test_a_refusal_of_the_whole_is_told_only_to_whom_it_belongs(
    proxy: Proxy, engine: Embedder, status: int
) -> None:
    engine.refuse = lambda inputs: status if any(0 in each for each in inputs) else 0
    callers = await gather(proxy, [2], [0], [4])
    engine.go.set()
    answers = await asyncio.gather(*callers)
    assert [each[0] for each in answers] == [200, status, 200]
    assert answers[1][2]["error"]["message"] == "no [0]"
    assert all("x-vramp-packed" not in headers for _, headers, _ in answers)


async def test_an_engine_that_is_overloaded_says_so_to_everybody_once(proxy: Proxy, engine: Embedder) -> None:
    engine.refuse = lambda inputs: 503 if len(inputs) > 1 else 0
    callers = await gather(proxy, [2], [3])
    engine.go.set()
    assert [each[0] for each in await asyncio.gather(*callers)] == [503, 503]
    assert len(engine.calls) == 2


async def test_an_engine_that_breaks_off_under_a_pack_has_broken_off_under_every_caller(
    proxy: Proxy, engine: Embedder
) -> None:
    engine.drop = True
    callers = await gather(proxy, [2], [3])
    engine.go.set()
    assert [each[0] for each in await asyncio.gather(*callers)] == [502, 502]
    engine.drop = False
    assert (await embed(proxy, [5]))["data"][0]["embedding"][0] == 5


async def test_a_caller_who_leaves_while_they_gather_is_not_sent(proxy: Proxy, engine: Embedder) -> None:
    callers = await gather(proxy, [2], [3], [4])
    callers[1].cancel()
    await until(lambda: len(proxy.scheduler.closed) == 1)
    engine.go.set()
    first, last = await callers[0], await callers[2]
    assert [first[2]["data"][0]["embedding"][0], last[2]["data"][0]["embedding"][0]] == [2, 4]
    assert engine.calls[-1] == [[2], [4]]
    assert (await embed(proxy, [9]))["data"][0]["embedding"][0] == 9


async def test_a_caller_who_leaves_a_call_under_way_disturbs_nobody(proxy: Proxy, engine: Embedder) -> None:
    first, callers = await under_way(proxy, engine, [2], [3], [4])
    closed = len(proxy.scheduler.closed)
    callers[1].cancel()
    await until(lambda: len(proxy.scheduler.closed) == closed + 1)
    assert proxy.upstream.aborts == 0
    engine.go.set()
    answers = [await callers[0], await callers[2]]
    assert [answer["data"][0]["embedding"][0] for _, _, answer in answers] == [2, 4]
    await first
    assert (await embed(proxy, [9]))["data"][0]["embedding"][0] == 9


async def test_when_all_have_left_the_call_upstream_is_cancelled_and_the_next_works(
    proxy: Proxy, engine: Embedder
) -> None:
    first, callers = await under_way(proxy, engine, [2], [3])
    for caller in callers:
        caller.cancel()
    await asyncio.wait_for(proxy.upstream.aborted.wait(), PATIENCE_S)
    engine.go.set()
    await first
    assert proxy.upstream.aborts == 1
    assert (await embed(proxy, [9]))["data"][0]["embedding"][0] == 9


async def test_when_all_leave_before_their_call_has_begun_the_engine_is_not_busy_for_ever(proxy: Proxy) -> None:
    packer = Packer(1.0)
    provider = proxy.state.providers["engines"]
    engine = Engine("m", provider, proxy.upstream.base_url, tokenizes=True)

    async def ask(tokens: bytes) -> int:
        async with packer.send(engine, b'{"model":"m","input":%b}' % tokens) as upstream:
            return upstream.status

    packer.begin("m")
    callers = [asyncio.create_task(ask(b"[%d]" % each)) for each in (1, 2)]
    await asyncio.sleep(0)
    packer.end("m")  # nothing is on its way any more: their call is to begin with the next turn of the loop
    for caller in callers:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    await until(lambda: not packer.is_busy("m"))
    assert proxy.upstream.requests == []
    assert await ask(b"[3]") == 200


async def test_usage_that_is_not_the_sum_of_its_parts_is_never_divided(proxy: Proxy, engine: Embedder) -> None:
    engine.lie = 5
    callers = await gather(proxy, [2], [3, 3])
    engine.go.set()
    answers = await asyncio.gather(*callers)
    assert [answer["usage"]["prompt_tokens"] for _, _, answer in answers] == [1, 2]
    calls = len(engine.calls)
    engine.go.clear()
    again = [asyncio.create_task(embed(proxy, [each])) for each in (1, 2, 3)]
    await until(lambda: len(engine.calls) == calls + 3)  # nobody gathers any more
    engine.go.set()
    await asyncio.gather(*again)


async def test_what_may_not_go_together_does_not(proxy: Proxy, engine: Embedder) -> None:
    others = [
        asyncio.create_task(post(proxy, [2], dimensions=8)),
        asyncio.create_task(post(proxy, [3], {"traceparent": "00-1-2-01"})),
        asyncio.create_task(post(proxy, "text")),
        asyncio.create_task(post(proxy, [4], truncate_prompt_tokens=2)),
    ]
    await until(lambda: len(proxy.scheduler.tickets) >= 5)
    engine.go.set()
    for _, headers, _ in await asyncio.gather(*others):
        assert "x-vramp-packed" not in headers
    assert len(engine.calls) == 5


async def test_texts_are_not_packed_for_an_engine_that_does_not_count_them(proxy: Proxy) -> None:
    configure(proxy, kind="command")
    engine = Embedder()
    proxy.upstream.behave = engine
    callers = [asyncio.create_task(embed(proxy, each)) for each in ("a", "b", "c")]
    await until(lambda: len(engine.calls) == 3)
    engine.go.set()
    await asyncio.gather(*callers)


async def test_a_window_of_nothing_packs_nothing(proxy: Proxy) -> None:
    configure(proxy, window_ms=0)
    engine = Embedder()
    proxy.upstream.behave = engine
    callers = [asyncio.create_task(embed(proxy, [each])) for each in (1, 2, 3)]
    await until(lambda: len(engine.calls) == 3)
    engine.go.set()
    await asyncio.gather(*callers)


@pytest.mark.parametrize(
    "body",
    [
        b"{}", b"[", b'{"input":"a"}', b'{"model":"m","input":[]}', b'{"model":"m","input":[1,"a"]}',
        b'{"model":"m","input":[["a"]]}', b'{"model":"m","input":["a",[1]]}', b'{"model":"m","input":{}}',
        b'{"model":"m","input":["a",null]}', b'{"model":"m","input":[1.5]}', b'{"model":"m","input":"a","x":1}',
        b'{"model":"m","input":"%b"}' % (b"a" * MOST_BODY),
        b'{"model":"m","input":[%b]}' % b",".join([b'"a"'] * (MOST_OWN + 1)),
    ],
)  # fmt: skip
def test_what_cannot_be_divided_for_certain_is_left_alone(body: bytes) -> None:
    assert take_apart(body) is None


VECTORS = st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=3)


@given(st.lists(st.lists(st.tuples(VECTORS, st.integers(0, 9)), min_size=1, max_size=4), min_size=1, max_size=4))
def test_every_split_gives_back_what_was_put_together(callers: list[list[tuple[list[float], int]]]) -> None:
    flat = [each for caller in callers for each in caller]
    total = sum(tokens for _, tokens in flat)
    data = [{"object": "embedding", "embedding": vector, "index": at} for at, (vector, _) in enumerate(flat)]
    usage = {"prompt_tokens": total, "total_tokens": total, "prompt_tokens_details": None}
    whole = json.dumps({"object": "list", "data": data[::-1], "model": "m", "usage": usage, "more": [1]}).encode()
    sizes, counts = [len(caller) for caller in callers], [tokens for _, tokens in flat]
    bodies = split(whole, sizes, counts)
    assert bodies is not None
    for caller, body in zip(callers, bodies, strict=True):
        answer = json.loads(body)
        assert [each["embedding"] for each in answer["data"]] == [vector for vector, _ in caller]
        assert [each["index"] for each in answer["data"]] == list(range(len(caller)))
        assert (
            answer["usage"]["prompt_tokens"] == sum(tokens for _, tokens in caller) == answer["usage"]["total_tokens"]
        )
        assert answer["more"] == [1]
    assert split(whole, [*sizes, 1], [*counts, 0]) is None
    assert split(whole, sizes, [*counts[:-1], counts[-1] + 1]) is None
    assert split(whole[:-1], sizes, counts) is None
