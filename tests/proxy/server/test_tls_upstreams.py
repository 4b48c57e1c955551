"""Upstreams over TLS: both lanes say the same of them, and what only TLS can do wrong harms nobody."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from proxy.config import BackendConfig, ModelConfig, TimeoutsConfig
from proxy.observe import lines
from proxy.providers.tls import AUTHORITIES
from tests.certificates import Pair, SealedUpstream, expire, make_pair
from tests.fakes import DONE, STREAM, FakeUpstream, chunk, hang, plain, stream, until
from tests.patience import PATIENCE_S
from tests.proxy.server.conftest import Proxy
from tests.proxy.server.test_fast_lane import (
    ANSWER,
    CALLS,
    HEAD,
    Lanes,
    answer_to,
    call,
    chunked,
    compare,
    handed_over,
    lengthy,
    next_answer,
    normal,
    request,
)

__all__ = ["handed_over"]  # a fixture
pytestmark = pytest.mark.native

MODELS = (
    *(ModelConfig(id=name, backend="cloud", upstream_model=name.upper()) for name in ("demo-chat", "both", "far")),
    ModelConfig(id="demo-embed", backend="cloud", task="embed"),
)
FAR = request(call("far"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("upstream"))


@pytest.fixture(autouse=True)
def trusted(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Any:
    """This one certificate is what upstreams are believed by."""
    with monkeypatch.context() as within:
        within.setenv("SSL_CERT_FILE", str(pair.cert))
        AUTHORITIES.read_again()
        yield
    AUTHORITIES.read_again()


@pytest.fixture
def context(pair: Pair) -> ssl.SSLContext:
    """The upstream's."""
    return pair.context()


@pytest.fixture
async def lanes(context: ssl.SSLContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Lanes]:
    """(ordinary, fast), all models at one remote upstream over TLS."""
    monkeypatch.setattr(lines, "FLUSH_S", 0.001)
    async with FakeUpstream() as upstream, FakeUpstream(context) as remote:
        pair = tuple(Proxy(upstream, remote, tmp_path / f"{fast}.log", fast=fast) for fast in (False, True))
        for each in pair:
            await each.start()
            each.configure(models=MODELS)
        yield pair[0], pair[1]
        for each in pair:
            await each.stop()


@pytest.fixture
async def fast(lanes: Lanes) -> Proxy:
    return lanes[1]


@pytest.fixture
async def sealed(context: ssl.SSLContext, lanes: Lanes) -> AsyncIterator[SealedUpstream]:
    """An upstream whose bytes on the wire are in the test's hand, behind both lanes."""
    async with SealedUpstream(context).serving() as upstream:
        upstream.answer = lengthy(ANSWER)
        send_to(lanes, upstream.base_url)
        yield upstream


def send_to(lanes: Lanes, url: str, **changes: Any) -> None:
    backends = (
        BackendConfig(name="engines", kind="simulated"),
        BackendConfig(name="cloud", kind="openai", base_url=url + "/v1", keepalive_s=changes.pop("keepalive_s", 30.0)),
    )
    for each in lanes:
        each.configure(backends=backends, models=MODELS, **changes)


async def both(lanes: Lanes, data: bytes = FAR) -> tuple[list[bytes], bytes]:
    """What both lanes answer, which is the same."""
    answers = []
    for each in lanes:
        answers.append(normal(await answer_to(each, data)))
        await each.settled()
    assert answers[0] == answers[1]
    return answers[1]


@pytest.mark.parametrize("name", CALLS)
async def test_both_lanes_answer_and_record_alike(lanes: Lanes, name: str) -> None:
    await compare(lanes, name)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_calls_over_either_tls_stay_in_the_fast_lane(
    lanes: Lanes, context: ssl.SSLContext, handed_over: list[bytes], version: ssl.TLSVersion
) -> None:
    context.minimum_version = context.maximum_version = version
    for name in ("a chat", "a stream", "embeddings", "a large answer", "rate limits"):
        lanes[0].remote.behave, data = CALLS[name]
        head, _ = await both(lanes, data)
        assert head[0] == b"HTTP/1.1 200 OK"
    assert handed_over == []


# ---- whom to believe


async def test_the_name_of_the_backend_is_asked_for_and_has_connections_of_its_own(
    fast: Proxy, sealed: SealedUpstream, handed_over: list[bytes]
) -> None:
    await answer_to(fast, FAR)
    send_to((fast, fast), sealed.base_url.replace("127.0.0.1", "localhost"))
    while True:  # until the name is resolved
        handed_over.clear()
        assert (await answer_to(fast, FAR)).startswith(b"HTTP/1.1 200 ")
        if not handed_over:
            break
    assert sealed.names[0] is None
    assert sealed.names[-1] == "localhost"
    connections = len(sealed.names)
    send_to((fast, fast), sealed.base_url)
    await answer_to(fast, FAR)
    assert len(sealed.names) == connections, "the first is still there"


async def refusal(lanes: Lanes) -> bytes:
    head, body = await both(lanes)
    assert head[0] == b"HTTP/1.1 503 Service Unavailable"
    return body


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("unknown", b"cannot be verified: self-signed certificate (trusted are"),
        ("expired", b"cannot be verified: certificate has expired"),
        ("other", b"cannot be verified: IP address mismatch, certificate is not valid for '127.0.0.1'"),
    ],
)
async def test_a_certificate_that_does_not_prove_the_name_is_refused_in_the_same_words(
    lanes: Lanes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handed_over: list[bytes], spoil: str, words: bytes
) -> None:
    bad = make_pair(tmp_path / "bad", names="DNS:elsewhere.test" if spoil == "other" else "IP:127.0.0.1")
    if spoil == "expired":
        expire(bad)
    if spoil != "unknown":
        monkeypatch.setenv("SSL_CERT_FILE", str(bad.cert))
        AUTHORITIES.read_again()
    async with SealedUpstream(bad.context()).serving() as upstream:
        send_to(lanes, upstream.base_url)
        assert words in await refusal(lanes)
    assert upstream.requests == [], "nothing was said to it"
    assert handed_over == [FAR], "with what went wrong, to be told"
    send_to(lanes, lanes[0].remote.base_url)


async def test_a_server_that_speaks_no_tls_is_named_as_one(lanes: Lanes) -> None:
    async with FakeUpstream() as bare:
        send_to(lanes, bare.base_url.replace("http:", "https:"))
        assert b"it does not speak TLS (is its base_url to begin with http://?)" in await refusal(lanes)


async def test_a_server_of_an_old_tls_is_refused_in_the_same_words(
    lanes: Lanes, sealed: SealedUpstream, context: ssl.SSLContext
) -> None:
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    assert b"TLS failed: tlsv1 alert protocol version" in await refusal(lanes)
    assert sealed.requests == []


async def after_hello(lanes: Lanes, then: Callable[[asyncio.StreamWriter], Awaitable[None]], **changes: Any) -> None:
    """Every lane says that it cannot reach a server that does this for an answer to its first words of TLS."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert (await reader.read(1))[0] == 0x16, "a handshake"
        await then(writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    send_to(lanes, "https://{}:{}".format(*server.sockets[0].getsockname()), **changes)
    for each in lanes:
        head, body = normal(await answer_to(each, FAR))
        assert head[0] == b"HTTP/1.1 503 Service Unavailable"
        assert b"cannot be reached: backend cloud: " in body
        await each.settled()
    server.close()
    send_to(lanes, lanes[0].remote.base_url)
    await both(lanes)


async def test_a_server_that_closes_in_the_handshake_is_one_that_cannot_be_reached(lanes: Lanes) -> None:
    async def close(_: asyncio.StreamWriter) -> None:
        """Nothing more."""

    await after_hello(lanes, close)


async def test_a_server_that_resets_in_the_handshake_is_one_that_cannot_be_reached(lanes: Lanes) -> None:
    async def reset(writer: asyncio.StreamWriter) -> None:
        connection: socket.socket = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    await after_hello(lanes, reset)


async def test_a_server_that_says_nothing_in_the_handshake_is_given_up_in_time(lanes: Lanes) -> None:
    gone = asyncio.Event()

    async def wait(_: asyncio.StreamWriter) -> None:
        await gone.wait()

    asking = asyncio.create_task(after_hello(lanes, wait, timeouts=TimeoutsConfig(connect_s=0.1)))
    await asyncio.wait({asking}, timeout=3)
    gone.set()
    await asking
    line = (await lanes[1].lines())[0]
    assert line["error"] == "no_backend"


async def test_a_client_that_leaves_in_the_handshake_costs_nothing(fast: Proxy) -> None:
    left = asyncio.Event()
    begun = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        begun.set()
        while await reader.read(65536):
            pass
        left.set()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    send_to((fast, fast), "https://{}:{}".format(*server.sockets[0].getsockname()))
    _, writer = await asyncio.open_connection(*fast.address)
    writer.write(FAR)
    await begun.wait()
    writer.close()
    await asyncio.wait_for(left.wait(), PATIENCE_S)
    await fast.settled()
    server.close()
    send_to((fast, fast), fast.remote.base_url)
    assert (await answer_to(fast, FAR)).startswith(b"HTTP/1.1 200 ")


# ---- bytes


async def test_any_cut_of_the_wire_gives_one_answer(
    fast: Proxy, sealed: SealedUpstream, handed_over: list[bytes]
) -> None:
    for sealed.piece in (1, 2, 3, 5, 7, 50):
        send_to((fast, fast), sealed.base_url, keepalive_s=0.0)  # so the handshake is cut, too
        assert (await answer_to(fast, FAR)).endswith(ANSWER)
    send_to((fast, fast), sealed.base_url)
    for sealed.piece in range(1, 300, 9):
        assert (await answer_to(fast, FAR)).endswith(ANSWER)
    assert handed_over == []
    assert len(sealed.resumed) == 7


@pytest.mark.parametrize("record", [1, 17, 16 << 10])
@pytest.mark.parametrize("piece", [11, 1 << 20])
async def test_any_records_give_one_stream(
    fast: Proxy, sealed: SealedUpstream, handed_over: list[bytes], record: int, piece: int
) -> None:
    sealed.record, sealed.piece = record, piece
    sealed.answer = chunked(chunk("a"), chunk("b" * 300), chunk(None, "stop"), DONE)
    for _ in range(2):
        _, body = normal(await answer_to(fast, request(call("far", stream=True))))
        assert body == chunk("a") + chunk("b" * 300) + chunk(None, "stop") + DONE
    assert len(sealed.resumed) == 1
    assert handed_over == []


@pytest.mark.parametrize("record", [700, 16 << 10])
async def test_large_requests_and_answers_pass_whole(fast: Proxy, sealed: SealedUpstream, record: int) -> None:
    sealed.record = record
    body = b'{"data":["' + bytes(range(97, 123)) * 60_000 + b'"],"usage":{"prompt_tokens":11,"total_tokens":11}}'
    sealed.answer = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    for size in (10, 16_000, 16_384, 70_000, 200_000):
        text = "abcdefg" * (size // 7)
        data = request(call("far", messages=[{"role": "user", "content": text}]))
        assert (await answer_to(fast, data)).endswith(body)
        assert text.encode() in sealed.requests[-1]
    assert len(sealed.resumed) == 1


# ---- ends


@pytest.mark.parametrize("ends", ["tls", "tcp"])
async def test_an_answer_until_the_end_is_whole_only_if_tls_says_so(
    fast: Proxy, sealed: SealedUpstream, ends: str
) -> None:
    sealed.answer, sealed.ends = HEAD + b"\r\n" + ANSWER, ends
    for _ in range(2):
        answer = await answer_to(fast, FAR)
        if ends == "tls":
            assert answer.endswith(ANSWER)
        else:
            assert answer.startswith(b"HTTP/1.1 502 ")
            assert b"the connection was closed, and TLS was not: somebody may have cut it" in answer


async def test_a_stream_until_the_end_is_whole_only_if_tls_says_so(fast: Proxy, sealed: SealedUpstream) -> None:
    sealed.answer = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + STREAM
    for sealed.ends, whole in (("tls", True), ("tcp", False)):
        answer = await answer_to(fast, request(call("far", stream=True)))
        assert (b'"type":"' in answer) is not whole


@pytest.mark.parametrize("ends", ["tls", "tcp"])
async def test_a_connection_that_ends_while_idle_costs_nobody_an_answer(
    fast: Proxy, sealed: SealedUpstream, handed_over: list[bytes], ends: str
) -> None:
    for _ in range(3):
        sealed.ends = ends
        sealed.gone.clear()
        assert (await answer_to(fast, FAR)).endswith(ANSWER)
        await sealed.gone.wait()
        assert (await answer_to(fast, FAR)).endswith(ANSWER)
    assert handed_over == []


async def test_a_connection_that_dies_of_its_next_request_costs_nobody_an_answer(
    fast: Proxy, sealed: SealedUpstream, handed_over: list[bytes]
) -> None:
    assert (await answer_to(fast, FAR)).endswith(ANSWER)
    good, sealed.answer, sealed.ends = sealed.answer, b"", "tls"

    async def mend() -> None:
        await until(lambda: len(sealed.requests) == 2)
        sealed.answer, sealed.ends = good, ""

    mending = asyncio.create_task(mend())
    assert (await answer_to(fast, FAR)).endswith(ANSWER)
    await mending
    assert len(sealed.requests) == 3
    assert handed_over == []


async def test_a_later_connection_goes_on_with_what_an_earlier_one_agreed(fast: Proxy, sealed: SealedUpstream) -> None:
    sealed.ends = "tls"
    for _ in range(3):
        assert (await answer_to(fast, FAR)).endswith(ANSWER)
    assert sealed.resumed == [False, True, True]


async def test_an_idle_connection_is_ended_as_tls_demands(fast: Proxy, sealed: SealedUpstream) -> None:
    send_to((fast, fast), sealed.base_url, keepalive_s=0.1)
    assert (await answer_to(fast, FAR)).endswith(ANSWER)
    await until(lambda: sealed.parted == 1)


async def test_what_is_no_tls_any_more_is_a_broken_answer_and_the_next_works(
    fast: Proxy, sealed: SealedUpstream
) -> None:
    await answer_to(fast, FAR)
    sealed.garble = 60
    answer = await answer_to(fast, FAR)
    assert answer.startswith(b"HTTP/1.1 502 ")
    assert b"TLS failed: " in answer
    sealed.garble = 0
    assert (await answer_to(fast, FAR)).endswith(ANSWER)


# ---- clients


async def test_a_slow_client_pauses_its_own_upstream(fast: Proxy, sealed: SealedUpstream) -> None:
    piece = chunk("x" * 50_000)
    sealed.answer = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + piece * 1_000
    reader, writer = await asyncio.open_connection(*fast.address, limit=1024)
    writer.write(request(call("far", stream=True)))
    await reader.readuntil(b"\r\n\r\n")

    async def stalled() -> bool:
        before = sealed.written
        await asyncio.sleep(0.1)
        return sealed.written == before

    while not await stalled():
        pass
    assert sealed.written < 24 << 20
    before = sealed.written
    await reader.readexactly(8 << 20)
    await until(lambda: sealed.written > before)
    writer.close()
    await asyncio.wait_for(sealed.gone.wait(), PATIENCE_S)
    await fast.settled()
    sealed.answer = lengthy(ANSWER)
    assert (await answer_to(fast, FAR)).endswith(ANSWER)


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_client_that_leaves_ends_the_work_upstream(fast: Proxy, streaming: bool) -> None:
    fast.remote.behave = stream(chunk("a"), then=hang) if streaming else hang  # type: ignore[arg-type]
    reader, writer = await asyncio.open_connection(*fast.address)
    writer.write(request(call("far", stream=streaming)))
    await fast.remote.arrived.wait()
    if streaming:
        await reader.readuntil(b"\r\n\r\n")
    writer.close()
    await asyncio.wait_for(fast.remote.aborted.wait(), PATIENCE_S)
    await fast.settled()
    assert [line["status"] for line in await fast.lines()] == [499]
    fast.remote.behave = plain()
    assert (await answer_to(fast, FAR)).startswith(b"HTTP/1.1 200 ")


async def test_connections_that_come_and_go_leave_nothing(fast: Proxy, sealed: SealedUpstream) -> None:
    def held() -> tuple[int, int]:
        gc.collect()
        sessions = [each for each in gc.get_objects() if type(each) is ssl.SSLObject]  # isinstance loads lazy modules
        return len(os.listdir("/proc/self/fd")), len(sessions)

    reader, writer = await asyncio.open_connection(*fast.address)
    sealed.ends = "tls"
    await next_answer(reader, writer, FAR)
    before = held()
    assert before[1]
    for sealed.ends in ("tls", "tcp") * 30:
        assert (await next_answer(reader, writer, FAR)).endswith(ANSWER)
    await until(lambda: all(now <= then for now, then in zip(held(), before, strict=True)))
    writer.close()


async def test_new_keys_are_taken_and_given_on_an_open_connection(
    fast: Proxy, pair: Pair, handed_over: list[bytes]
) -> None:
    """Python's `ssl` cannot ask for them, so this server is OpenSSL's own: a line with a K, and it does."""
    command = ["openssl", "s_server", "-accept", "127.0.0.1:0", "-cert", str(pair.cert), "-key", str(pair.key)]
    pipe = asyncio.subprocess.PIPE
    server = await asyncio.create_subprocess_exec(*command, "-crlf", stdin=pipe, stdout=pipe, stderr=pipe)
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        await server.stdout.readuntil(b"ACCEPT 127.0.0.1:")
        send_to((fast, fast), f"https://127.0.0.1:{int(await server.stdout.readline())}")
        said = b""
        for _ in range(4):
            asking = asyncio.create_task(answer_to(fast, FAR))
            said += await server.stdout.readuntil(b"]}")
            server.stdin.write(lengthy(ANSWER).replace(b"\r", b""))
            assert (await asking).endswith(ANSWER)
            server.stdin.write(b"K\n")
    finally:
        server.terminate()
        await server.communicate()
    assert b"SSL_do_handshake -> 1" in said, "it was asked for new keys"
    assert said.count(b"BEGIN SSL SESSION") == 1
    assert handed_over == []
