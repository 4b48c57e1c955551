"""The relay alone: which bytes it takes for a request, and that it reads those as aiohttp does."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import select
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_parser import HttpRequestParser
from hypothesis import given
from hypothesis import strategies as st

from ext._relay import Client, Relay

pytestmark = pytest.mark.native

KEPT = ("authorization", "host", "x-request-id")
FOREIGN = ("expect", "upgrade", "content-encoding", "trailer", "x-vramp-")
BODY = b'{"model":"m","messages":[]}'


class Recorder:
    """Decides nothing: notes what was recognised, and what was handed over."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        self.handed_over: list[bytes] = []
        self.remotes: list[str] = []

    def decide(self, client: Client) -> None:
        self.seen.append((client.path, client.headers, client.body))

    def hand_over(self, fd: int, data: bytes, exchange: Any, remote: str, whole: bool) -> None:
        assert exchange is None
        os.close(fd)
        self.handed_over.append(data)
        self.remotes.append(remote)

    def bug(self, exchange: Any) -> None:
        raise AssertionError("a bug")


class Harness:
    """One relay with a listening socket, pumped by hand."""

    def __init__(self) -> None:
        self.owner = Recorder()
        self.relay = Relay(
            self.owner,
            paths=("/v1/chat/completions", "/v1/embeddings"),
            kept=KEPT,
            foreign=FOREIGN,
            passed=(),
            passed_families=(),
            keepalive_s=75.0,
            stall_s=60.0,
            handshake_s=10.0,
        )
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        self.address = listening.getsockname()
        self.relay.listen(listening.detach())

    def pump(self, wait_s: float = 0.2) -> bool:
        """Handle what comes within the time; whether something came."""
        if not select.select([self.relay.fileno()], [], [], wait_s)[0]:
            return False
        self.relay.pump()
        return True

    def send(self, *pieces: bytes) -> tuple[list[tuple[str, dict[str, str], bytes]], list[bytes]]:
        """What became of these bytes on a new connection: (recognised, handed over)."""
        self.owner.seen, self.owner.handed_over = [], []
        open_before = self.relay.connections
        with socket.create_connection(self.address) as client:
            for piece in pieces:
                client.sendall(piece)
                if self.owner.handed_over:
                    break
                self.pump()
            while not self.owner.handed_over and self.pump(0.0):
                pass
        while self.relay.connections > open_before and self.pump():
            pass
        return self.owner.seen, self.owner.handed_over


@pytest.fixture(scope="module")
def harness() -> Any:
    made = Harness()
    yield made
    made.relay.close()


def request(*lines: bytes, body: bytes = BODY, first: bytes = b"POST /v1/chat/completions HTTP/1.1") -> bytes:
    return b"\r\n".join([first, *lines, b"", body])


def chunks(*pieces: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + end


def in_chunks(body: bytes, *lines: bytes) -> bytes:
    return request(b"host: x", b"content-type: application/json", b"transfer-encoding: chunked", *lines, body=body)


LENGTH = b"content-length: %d" % len(BODY)
GOOD = (b"host: x", b"content-type: application/json", LENGTH)

RECOGNISED = {
    "plain": request(*GOOD),
    "any case": request(b"HoSt: x", b"Content-Type: APPLICATION/JSON; charset=UTF-8", LENGTH.title()),
    "spaces around a value": request(b"host:x", b"content-type: \t application/json \t", LENGTH + b"  "),
    "keep-alive": request(*GOOD, b"Connection: Keep-Alive"),
    "an unknown header": request(*GOOD, b"X-Stainless-Lang: python", b"!#$%&'*+-.^_`|~: x"),
    "an empty value": request(*GOOD, b"x-a:"),
    "a long unknown name": request(*GOOD, b"x" * 300 + b": 1"),
    "one chunk": in_chunks(chunks(BODY)),
    "many chunks": in_chunks(chunks(*(bytes([each]) for each in BODY))),
    "chunks with large digits": in_chunks(b"1B\r\n" + BODY + b"\r\n00000\r\n\r\n"),
    "leading zeros in a length": request(*GOOD[:2], b"content-length: 000%d" % len(BODY)),
}

FOR_AIOHTTP = {
    "GET": request(b"host: x", body=b"", first=b"GET /v1/models HTTP/1.1"),
    "HTTP/1.0": request(*GOOD, first=b"POST /v1/chat/completions HTTP/1.0"),
    "HTTP/1.2": request(*GOOD, first=b"POST /v1/chat/completions HTTP/1.2"),
    "absolute form": request(*GOOD, first=b"POST http://x/v1/chat/completions HTTP/1.1"),
    "a query": request(*GOOD, first=b"POST /v1/chat/completions?a=1 HTTP/1.1"),
    "another path": request(*GOOD, first=b"POST /v1/chat/completionsx HTTP/1.1"),
    "a path with dots": request(*GOOD, first=b"POST /v1/../v1/chat/completions HTTP/1.1"),
    "an escaped path": request(*GOOD, first=b"POST /v1/chat%2Fcompletions HTTP/1.1"),
    "two spaces": request(*GOOD, first=b"POST  /v1/chat/completions HTTP/1.1"),
    "a tab for a space": request(*GOOD, first=b"POST\t/v1/chat/completions HTTP/1.1"),
    "lower-case method": request(*GOOD, first=b"post /v1/chat/completions HTTP/1.1"),
    "an empty line first": b"\r\n" + request(*GOOD),
    "length and chunks": request(*GOOD, b"transfer-encoding: chunked"),
    "chunks": request(b"host: x", b"content-type: application/json", b"transfer-encoding: chunked", body=b"0\r\n\r\n"),
    "chunks with an extension": in_chunks(b"1b;a=b\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunks with a trailer": in_chunks(chunks(BODY, end=b"0\r\na: b\r\n\r\n")),
    "chunks with a bare LF": in_chunks(b"1b\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunks that end in a bare LF": in_chunks(b"1b\r\n" + BODY + b"\n0\r\n\r\n"),
    "chunks that are longer than they say": in_chunks(b"1a\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunks of a signed size": in_chunks(b"+1b\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunks of a size with 0x": in_chunks(b"0x1b\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunks of a size with a space": in_chunks(b"1b \r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunks of a huge size": in_chunks(b"ffffffffffffffff1b\r\n" + BODY),
    "chunks above the bound": in_chunks(b"50000\r\n"),
    "chunks twice": in_chunks(chunks(BODY), b"transfer-encoding: chunked"),
    "chunks, coded": in_chunks(chunks(BODY), b"transfer-encoding: gzip"),
    "an empty size": in_chunks(b"\r\n" + BODY),
    "odd coding": request(*GOOD, b"Transfer-Encoding: xchunked"),
    "two lengths": request(*GOOD, LENGTH),
    "two different lengths": request(*GOOD, b"content-length: 5"),
    "a list of lengths": request(*GOOD[:2], LENGTH + b", %d" % len(BODY)),
    "a signed length": request(*GOOD[:2], b"content-length: +%d" % len(BODY)),
    "a negative length": request(*GOOD[:2], b"content-length: -1"),
    "a hexadecimal length": request(*GOOD[:2], b"content-length: 0x1b"),
    "a huge length": request(*GOOD[:2], b"content-length: 99999999999999999999"),
    "a large length": request(*GOOD[:2], b"content-length: 1000000"),
    "no length": request(*GOOD[:2]),
    "an empty length": request(*GOOD[:2], b"content-length:"),
    "length zero": request(*GOOD[:2], b"content-length: 0", body=b""),
    "no host": request(*GOOD[1:]),
    "two hosts": request(*GOOD, b"host: y"),
    "two keys": request(*GOOD, b"authorization: Bearer a", b"Authorization: Bearer b"),
    "no type": request(b"host: x", LENGTH),
    "another type": request(b"host: x", b"content-type: text/plain", LENGTH),
    "two types": request(*GOOD, b"content-type: application/json"),
    "space before the colon": request(*GOOD[:2], b"content-length : %d" % len(BODY), LENGTH),
    "a space in a name": request(*GOOD, b"x y: 1"),
    "no colon": request(*GOOD, b"nonsense"),
    "an empty name": request(*GOOD, b": 1"),
    "a folded line": request(*GOOD, b"x-a: 1", b" 2"),
    "a folded first line": request(b" host: x", *GOOD[1:]),
    "a bare LF in the head": request(*GOOD).replace(b"host: x\r\n", b"host: x\n"),
    "a bare LF in a value": request(*GOOD, b"x-a: 1\ncontent-length: 3"),
    "a bare CR in a value": request(*GOOD, b"x-a: 1\rcontent-length: 3"),
    "only LFs": request(*GOOD).replace(b"\r\n", b"\n") + b"\r\n\r\n",
    "a NUL in a value": request(*GOOD, b"x-a: \x00"),
    "a NUL in a name": request(*GOOD, b"x\x00: 1"),
    "DEL in a value": request(*GOOD, b"x-a: \x7f"),
    "not ASCII in a value": request(*GOOD, b"x-a: \xc3\xa4"),
    "not ASCII in a name": request(*GOOD, b"x-\xe4: 1"),
    "expect": request(*GOOD, b"expect: 100-continue"),
    "upgrade": request(*GOOD, b"upgrade: websocket"),
    "close": request(*GOOD, b"connection: close"),
    "two options of a connection": request(*GOOD, b"connection: keep-alive, close"),
    "a coded body": request(*GOOD, b"content-encoding: gzip"),
    "a header of ours that takes time": request(*GOOD, b"x-vramp-deadline-ms: 5"),
    "too many headers": request(*GOOD, *[b"x-%d: 1" % at for at in range(70)]),
    "a large head": request(*GOOD, b"x: " + b"a" * 17_000),
    "a large head without an end": b"POST /v1/chat/completions HTTP/1.1\r\nx: " + b"a" * 20_000,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}


@pytest.mark.parametrize("name", RECOGNISED)
def test_an_ordinary_request_is_recognised_and_its_bytes_are_kept(harness: Harness, name: str) -> None:
    seen, handed_over = harness.send(RECOGNISED[name])
    assert [(path, body) for path, _, body in seen] == [("/v1/chat/completions", BODY)]
    assert handed_over == [RECOGNISED[name]]  # since nothing was decided


@pytest.mark.parametrize("name", FOR_AIOHTTP)
def test_everything_else_is_handed_over_untouched(harness: Harness, name: str) -> None:
    seen, handed_over = harness.send(FOR_AIOHTTP[name])
    assert seen == []
    assert handed_over == [FOR_AIOHTTP[name]]


def test_a_request_byte_by_byte_is_one_request(harness: Harness) -> None:
    whole = RECOGNISED["plain"]
    seen, handed_over = harness.send(*(whole[at : at + 1] for at in range(len(whole))))
    assert [body for _, _, body in seen] == [BODY]
    assert handed_over == [whole]


def test_chunks_byte_by_byte_are_one_request(harness: Harness) -> None:
    whole = in_chunks(chunks(BODY[:5], BODY[5:]))
    seen, handed_over = harness.send(*(whole[at : at + 1] for at in range(len(whole))))
    assert [body for _, _, body in seen] == [BODY]
    assert handed_over == [whole]


def test_a_chunked_request_takes_along_what_is_behind_it(harness: Harness) -> None:
    whole = in_chunks(chunks(BODY)) + RECOGNISED["plain"]
    seen, handed_over = harness.send(whole)
    assert [body for _, _, body in seen] == [BODY]
    assert handed_over == [whole]


def test_what_is_none_of_ours_is_handed_over_at_its_first_strange_byte(harness: Harness) -> None:
    assert harness.send(b"PO") == ([], [])
    assert harness.send(b"GE")[1] == [b"GE"]
    assert harness.send(b"POST /v2")[1] == [b"POST /v2"]


def test_a_pipelined_request_goes_along(harness: Harness) -> None:
    whole = RECOGNISED["plain"] + RECOGNISED["any case"]
    seen, handed_over = harness.send(whole)
    assert len(seen) == 1
    assert handed_over == [whole]


def test_connections_that_come_and_go_leave_nothing(harness: Harness) -> None:
    before = harness.relay.connections
    for piece in (b"", b"POST /v1/chat", RECOGNISED["plain"][:-3]):
        for _ in range(20):
            harness.send(piece)
    assert harness.relay.connections == before


def resident_kb() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def test_what_a_closed_connection_had_said_is_let_go_of_at_once(harness: Harness) -> None:
    """Its limit is looked at half a minute later, and a client that comes and goes has said a lot by then."""
    head = request(*GOOD[:2], b"content-length: 262144", body=b"")
    harness.send(head, b"x" * 200_000)
    before = resident_kb()
    for _ in range(200):
        harness.send(head, b"x" * 200_000)
    assert resident_kb() - before < 10_000


@pytest.mark.parametrize("address", ["127.0.0.1", "127.10.200.9", "127.255.99.100"])
def test_a_client_has_the_address_that_it_comes_from(harness: Harness, address: str) -> None:
    with socket.create_connection(harness.address, source_address=(address, 0)) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert harness.pump()
    assert harness.owner.remotes[-1] == address


def test_clients_that_come_together_are_taken_in_one_turn(harness: Harness) -> None:
    before = harness.relay.connections
    clients = [socket.create_connection(harness.address) for _ in range(20)]
    assert harness.pump()
    assert harness.relay.connections == before + 20
    for each in clients:
        each.close()
    while harness.relay.connections > before:
        assert harness.pump()


def test_a_listener_that_stopped_hears_nothing_of_a_socket_that_others_go_on_with() -> None:
    with socket.create_server(("127.0.0.1", 0)) as kept:
        stopped = Harness()
        kept.setblocking(False)
        stopped.relay.listen(os.dup(kept.fileno()))
        stopped.relay.stop_listening()
        gc.collect()
        with socket.create_connection(kept.getsockname()):
            assert not stopped.pump()
            assert not stopped.relay.connections
            kept.accept()[0].close()
        stopped.relay.close()


def test_a_listener_that_is_not_watched_takes_as_many_as_it_is_told_to() -> None:
    harness = Harness()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        listener = harness.relay.listen(os.dup(listening.fileno()), watched=False)
        before = harness.relay.connections
        clients = [socket.create_connection(listening.getsockname()) for _ in range(3)]
        assert not harness.pump(0.01), "nothing is taken unasked"
        assert (listener.accept(2), listener.accept(2), listener.accept(2)) == (2, 1, 0)
        assert harness.relay.connections == before + 3
        clients[0].sendall(RECOGNISED["plain"])
        assert harness.pump()
        assert harness.owner.seen
        harness.relay.stop_listening()
        assert listener.accept(1) == 0
        for each in clients:
            each.close()
    harness.relay.close()


def as_aiohttp_reads(data: bytes) -> list[tuple[str, str, dict[str, str], bytes]]:
    """Every whole request in these bytes; raises where aiohttp refuses them."""
    loop = asyncio.new_event_loop()
    try:
        parser = HttpRequestParser(BaseProtocol(loop), loop, 2**16, max_line_size=8190, max_field_size=65536)
        messages, _, _ = parser.feed_data(data)
        return [
            (
                message.method,
                message.path,
                {name.lower(): value for name, value in message.headers.items()},
                b"".join(piece[0] if isinstance(piece, tuple) else piece for piece in payload._buffer),
            )
            for message, payload in messages
        ]
    finally:
        loop.close()


PIECES = st.sampled_from(
    [
        *GOOD,
        *GOOD,
        *GOOD,
        b"content-length: 5",
        b"transfer-encoding: chunked",
        b"connection: close",
        b"x-a: 1",
        b" folded",
        b"x-a : 1",
        b"x-a:\t1 ",
        b"host: y",
        b"X-Request-Id: abc",
        b"x\n: 1",
        b"x: \r",
        b"x: a\nb: c",
        b"Authorization: b",
    ]
)  # fmt: skip
IN_CHUNKS = [chunks(BODY), chunks(BODY[:3], BODY[3:]), chunks(BODY, end=b"0\r\na: b\r\n\r\n")]
BODIES = st.sampled_from([BODY] * 3 + IN_CHUNKS)
FIRST = st.sampled_from(
    [b"POST /v1/chat/completions HTTP/1.1"] * 6
    + [b"POST /v1/embeddings HTTP/1.1", b"POST /v1/chat/completions HTTP/1.0", b"POST /v1/chat/completions  HTTP/1.1"]
)


@given(
    first=FIRST,
    lines=st.lists(PIECES, max_size=6),
    sent=BODIES,
    whole=st.booleans(),
    at=st.integers(0, 300),
    noise=st.binary(max_size=2) | st.sampled_from([b"\r\n", b"\n", b"\r", b" ", b":", b"\x00"]),
    noisy=st.booleans(),
)
def test_what_is_recognised_is_what_aiohttp_reads(
    first: bytes, lines: list[bytes], sent: bytes, whole: bool, at: int, noise: bytes, noisy: bool
) -> None:
    framed = sent is not BODY and b"transfer-encoding: chunked" in lines
    data = request(*((GOOD[:2] if framed else GOOD) if whole else ()), *lines, first=first, body=sent)
    if noisy:
        data = data[: at % len(data)] + noise + data[at % len(data) :]
    harness = Harness()
    try:
        seen, _ = harness.send(data)
    finally:
        harness.relay.close()
    if not seen:
        return
    path, headers, body = seen[0]
    start = data.index(b"\r\n\r\n") + 4
    chunked = b"content-length" not in data[:start].lower()
    read = as_aiohttp_reads(data[: data.index(b"0\r\n\r\n", start) + 5 if chunked else start + len(body)])
    assert len(read) == 1
    assert read[0][:2] == ("POST", path)
    assert read[0][3] == body
    for name, value in headers.items():
        assert read[0][2][name] == value
    assert chunked or int(read[0][2]["content-length"]) == len(body)


@pytest.mark.slow
def test_without_descriptors_clients_wait_in_the_listen_queue() -> None:
    """The listener is not asked again and again meanwhile, and takes them when there are some."""
    harness = Harness()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.create_connection(harness.address) as client:
        client.sendall(RECOGNISED["plain"])
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            harness.relay.pump()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert not harness.pump(0.01), "nothing is ready until it is looked again"
        for _ in range(100):
            time.sleep(0.02)
            harness.relay.tick()
            harness.pump(0.0)
            if harness.owner.seen:
                break
    assert [body for _, _, body in harness.owner.seen] == [BODY]
    harness.relay.close()
