"""Random requests and random answers, down every way that a call can take: nobody may see which one it was.

A case is a seed. One kind sends requests, most of them odd, pipelined and in random pieces, to a server with the fast
lane and to one without: both must answer alike, and say alike what they sent upstream. The other lets an upstream say
random bytes, in random pieces, to calls that go down the ordinary lane, by a decision and by a flow. All that anybody
says is read here by a strict reader of HTTP/1.1, and after each odd answer the same connection must give the right
answer to another call. The suite takes a few seeds (`test_fuzz_lanes.py`); by hand:

    python -m tests.proxy.server.fuzz_lanes --seconds 600 --seed 1 [--tls]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import hashlib
import json
import random
import re
import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import uvloop

from proxy.config import TimeoutsConfig
from proxy.observe import lines
from proxy.server import http
from tests.certificates import make_pair
from tests.fakes import FakeUpstream
from tests.proxy.server.conftest import Proxy

CHAT = b"/v1/chat/completions"
VOLATILE = {"date", "x-request-id", "x-vramp-wait-ms", "content-length"}  # a length: of a body that holds an id
ROW_VARIES = {"time", "request_id", "queue_s", "load_s", "upstream_s", "first_byte_s", "duration_s"}
VARIES = re.compile(rb'"request_id":"[^"]*"|x-request-id=\S+|upstream=\d+|(?<= broke off: )(?:[^"\\]|\\.)*')
HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ?([\t\x20-\x7e\x80-\xff]*)")
AFTER_LAST = b"Data after `Connection: close`"
GONE = (ConnectionError, ssl.SSLError)
TRUSTING = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # whomever
TRUSTING.check_hostname, TRUSTING.verify_mode = False, ssl.CERT_NONE
AT_ONCE = 16  # connections
CLOSED_S = 15.0  # how long a server may take to end a connection that it was asked to end


@dataclass(frozen=True)
class Answer:
    """One answer as a client reads it. `cut`: the connection ended in it."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    cut: bool
    request_id: str = field(default="", compare=False)

    @property
    def was_last(self) -> bool:
        """Whether the connection may have been ended after it."""
        return ("connection", "close") in self.headers or not any(
            name == "transfer-encoding" for name, _ in self.headers
        )

    @classmethod
    def of(cls, status: int, headers: dict[str, str], body: bytes, cut: bool) -> Answer:
        """What must be alike on every way."""
        kept = tuple(sorted((name, value) for name, value in headers.items() if name not in VOLATILE))
        return cls(status, kept, VARIES.sub(b"", body), cut, headers.get("x-request-id", ""))


NOTHING = Answer(0, (), b"", True)  # all that was there of one was dropped with its connection


class NotHttp(AssertionError):
    """Somebody said what is not strictly HTTP/1.1."""


def read_head(head: bytes) -> tuple[bytes, dict[str, str]]:
    """First line and headers."""
    first, *rest = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    headers: dict[str, str] = {}
    for line in rest:
        found = HEADER.fullmatch(line)
        if found is None or (name := found[1].decode().lower()) in headers:
            raise NotHttp(line)
        headers[name] = found[2].decode("latin-1")
    return first, headers


async def read_answer(reader: asyncio.StreamReader) -> Answer | None:
    """The next answer; None where the connection ends before it."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except GONE:
        return None
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise NotHttp(error.partial) from None
        return None
    first, headers = read_head(head)
    if not re.fullmatch(rb"HTTP/1\.[01] [1-5]\d\d [\x20-\x7e]*", first):
        raise NotHttp(first)
    status = int(first[9:12])
    if status == 100:
        return await read_answer(reader)
    pieces: list[bytes] = []
    try:
        async for piece in read_body(reader, headers, bodiless=status in (204, 304)):
            pieces.append(piece)  # noqa: PERF401 - what came before the cut counts
    except asyncio.IncompleteReadError as error:
        return Answer.of(status, headers, b"".join(pieces) + error.partial, True)
    except GONE:
        return Answer.of(status, headers, b"".join(pieces), True)
    return Answer.of(status, headers, b"".join(pieces), False)


async def read_body(reader: asyncio.StreamReader, headers: dict[str, str], *, bodiless: bool) -> AsyncIterator[bytes]:
    """What is in a body's frame."""
    length, coding = headers.get("content-length"), headers.get("transfer-encoding")
    if coding not in (None, "chunked") or (coding and length is not None):
        raise NotHttp(f"{length} {coding}")
    if bodiless:
        return
    if coding is None and length is None:
        yield await reader.read()
    if length is not None:
        if not length.isdigit():
            raise NotHttp(length)
        yield await reader.readexactly(int(length))
    while coding:
        line = await reader.readuntil(b"\r\n")
        if not re.fullmatch(rb"[0-9a-f]+\r\n", line):
            raise NotHttp(line)
        size = int(line, 16)
        if size:
            yield await reader.readexactly(size)
        if await reader.readexactly(2) != b"\r\n":
            raise NotHttp("a chunk's end")
        if not size:
            return


def split(rng: random.Random, data: bytes, most: int = 6) -> list[bytes]:
    """The data in pieces; byte by byte now and then."""
    if len(data) < 400 and rng.random() < 0.02:
        return [data[at : at + 1] for at in range(len(data))]
    cuts = sorted({rng.randrange(len(data) + 1) for _ in range(rng.randrange(most))} | {0, len(data)})
    return [data[start:end] for start, end in pairwise(cuts)] or [b""]


# ---- upstream


class Script(NamedTuple):
    """What the upstream says to a call, and whether it then ends the connection."""

    pieces: list[bytes]
    end: str = "keep"  # or "close", "reset"
    strict: bool = True  # it is HTTP/1.1, so all ways must read it alike
    unasked: bool = False  # more comes with it: aiohttp refuses all of that, the relay its connection


class ScriptedUpstream:
    """Says what the script of a call's marker says; without one, what came."""

    def __init__(self) -> None:
        self.scripts: dict[bytes, Script] = {}
        self.wrong: list[str] = []
        self.base_url = ""
        self._server: asyncio.Server

    async def __aenter__(self) -> ScriptedUpstream:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.base_url = "http://{}:{}".format(*self._server.sockets[0].getsockname())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._answer(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except NotHttp as error:
            self.wrong.append(f"asked for with {error!r}")
        finally:
            with contextlib.suppress(ConnectionError):
                writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        first, headers = read_head(await reader.readuntil(b"\r\n\r\n"))
        if not re.fullmatch(rb"POST /\S+ HTTP/1\.1", first) or "transfer-encoding" in headers:
            raise NotHttp(first)
        body = b"".join([piece async for piece in read_body(reader, headers, bodiless=False)])
        marker = re.search(rb"(again-\d-)?case-\d+", body)
        script = self.scripts.get(marker[0]) if marker else None
        if script is None:
            script = Script([echo(body)])
        await say(writer, script.pieces)
        if script.end == "reset":
            writer.transport.abort()
        return script.end == "keep"


def echo(body: bytes) -> bytes:
    """An answer that says which request it is to, so that nobody can be given another's."""
    marker = re.search(rb"(again-\d-)?case-\d+", body)
    said = json.loads(body)
    told = {"marker": marker[0].decode() if marker else "", "sha": hashlib.sha1(body).hexdigest()}
    reason, usage = {"finish_reason": "stop", "delta": {"content": "a"}}, {"prompt_tokens": 7, "completion_tokens": 2}
    answer = json.dumps({"echo": told, "choices": [reason], "usage": usage}).encode()
    if said.get("stream") is True:
        events = b"data: " + answer + b"\n\ndata: [DONE]\n\n"
        return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks(
            events
        )
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(answer) + answer


def chunks(*pieces: bytes, extension: bytes = b"", trailer: bytes = b"") -> bytes:
    """A body in chunks."""
    framed = b"".join(b"%x%b\r\n%b\r\n" % (len(each), extension, each) for each in pieces if each)
    return framed + b"0%b\r\n%b\r\n" % (extension, trailer)


STATUSES = [200] * 12 + [201, 202, 204, 299, 302, 304, 400, 401, 404, 413, 422, 429, 500, 502, 503, 504, 529]
JSON, EVENTS = b"application/json", b"text/event-stream"
BODIES: list[tuple[bytes, bytes]] = [
    (JSON, b'{"m":"%b","choices":[{"finish_reason":"stop"}],"usage":{"prompt_tokens":5,"completion_tokens":3}}'),
    (JSON, b' {"m":"%b","choices":[{"finish_reason":"l\xc3\xa4nge"}],"usage":{"input_tokens":5}}'),
    (JSON, b'{"m":"%b","usage":{"prompt_tokens":-1}}'),
    (JSON, b'{"m":"%b","usage":{"prompt_tokens":99999999999999999999,"completion_tokens":1e3}}'),
    (JSON, b'{"m":"%b","choices":[{"finish_reason":"\xff"}],"usage":{"prompt_tokens":1}}'),
    (JSON, b'{"m":"%b","choices":[{"finish_reason":"a\\"b"}],"usage":{"prompt_tokens":1,"prompt_tokens":2}}'),
    (JSON, b'{"m":"%b","error":{"message":"no","type":"x","code":"y"}}'),
    (JSON, b'{"m":"%b"'),
    (JSON, b""),
    (b"text/html", b"<html>%b</html>"),
    (EVENTS, b'data: {"m":"%b","choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'),
    (EVENTS + b"; charset=utf-8", b'data: {"m":"%b"}\r\n\r\ndata: {"usage":{"prompt_tokens":3}}\r\n\r\ndata: [DONE]'),
    (EVENTS, b'data: {"m":"%b","choices":[{"delta":{"content":"a"}}]}\n\ndata: {"cut'),
    (EVENTS, b'event: error\ndata: {"m":"%b","error":{"message":"x"}}\n\n'),
    (EVENTS, b""),
]  # fmt: skip
UPSTREAM_HEADERS = [
    b"openai-version: 1", b"OpenAI-Organization:  o ", b"x-ratelimit-limit-requests: 5", b"Set-Cookie: a=b",
    b"Server: x", b"Keep-Alive: timeout=5", b"connection: keep-alive", b"Connection: Keep-Alive, x",
    b"retry-after: 3", b"openai-x: \xc3\xa4\xff", b"x-request-id: theirs", b"request-id: r-1", b"Date: yesterday",
    b"x-vramp-model: false", b"openai-empty:", b"Content-Encoding: identity", b"x-" + b"a" * 60 + b": 1",
    b"openai-a: " + b"b" * 300, b"trailer: t", b"upgrade: h2c", b"vary: *",
]  # fmt: skip
BROKEN_HEADERS = [
    b"openai-a: 1\r\n folded", b"openai-a : 1", b"openai-a: \x00", b"openai-a: a\rb", b"openai-a: a\nx-injected: 1",
    b": 1", b"openai a: 1", b"no colon", b"content-length: 5\r\ncontent-length: 6", b"content-length: +5",
    b"transfer-encoding: gzip, chunked", b"transfer-encoding: chunked\r\ntransfer-encoding: chunked",
    b"content-length: 3, 3", b"content-length: 0x10", b"transfer-encoding: identity", b"openai-version: \x7f",
]  # fmt: skip
BROKEN_CHUNKS = [
    b"x\r\n\r\n", b"5\r\nabc", b"-1\r\n", b"ffffffffffffffffff\r\n", b"2\n{}\r\n0\r\n\r\n", b"2\r\n{}xx0\r\n\r\n",
    b"2 \r\n{}\r\n0\r\n\r\n", b"2;a=\x00\r\n{}\r\n0\r\n\r\n", b"0\r\nt: 1\r\n", b"2\r\n{}\r\n0\r\nno trailer\r\n\r\n",
    b"0x2\r\n{}\r\n0\r\n\r\n", b"\r\n", b"2\r\n{}\n0\r\n\r\n", b"2 2\r\n{}\r\n0\r\n\r\n",
]  # fmt: skip


BROKEN_LINES = [
    b"HTTP/1.0 200 OK", b"HTTP/1.1 200", b"HTTP/2 200 OK", b"HTTP/1.1 99 OK", b"", b"http/1.1 200 OK",
    b"HTTP/1.1 101 Go", b"HTTP/1.1  200 OK", b"HTTP/1.1 2000 OK",
]  # fmt: skip
INTERIM = [b"", b"", b"", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early\r\nlink: x\r\n\r\n" * 2]
UNASKED = [b"\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", b"x"]


def script_of(rng: random.Random, marker: bytes) -> Script:
    """A random answer to the call with this marker."""
    kind, body = rng.choice(BODIES)
    body = body.replace(b"%b", marker)
    if rng.random() < 0.05:
        body = b'{"data":[' + b"0.5," * rng.choice([10_000, 60_000, 300_000]) + b'0],"usage":{"prompt_tokens":4}}'
    headers = [b"content-type: " + kind, *rng.sample(UPSTREAM_HEADERS, rng.randrange(5))]
    if rng.random() < 0.1:
        body = gzip.compress(body, mtime=0)
        headers.append(b"content-encoding: gzip")
    framing, framed = frame_of(rng, body)
    headers.append(framing)
    status = rng.choice(STATUSES)
    line = b"HTTP/1.1 %d %b" % (status, rng.choice([b"OK", b"", b"a b c"]))
    if status in (204, 304):
        framed = b""
    sound = (headers.copy(), framed, line)
    if rng.random() < 0.1:
        headers.append(rng.choice(BROKEN_HEADERS))
    if rng.random() < 0.06 and framed.endswith(b"0\r\n\r\n"):
        framed = rng.choice(BROKEN_CHUNKS)
    if rng.random() < 0.08:
        line = rng.choice(BROKEN_LINES)
    strict = sound == (headers, framed, line)
    rng.shuffle(headers)
    data = rng.choice(INTERIM) + b"\r\n".join([line, *headers, b"", framed])
    return ended(rng, data, strict=strict, closes=framing == b"connection: close")


def frame_of(rng: random.Random, body: bytes) -> tuple[bytes, bytes]:
    """A body in one of its three frames: the header that says which, and the bytes."""
    frame = rng.randrange(4)
    if frame == 0:
        return b"connection: close", body
    if frame == 1:
        return rng.choice([b"Content-Length: %d", b"content-length:%d", b"CONTENT-LENGTH:  %d  "]) % len(body), body
    extension, trailer = rng.choice([b"", b"", b";a=b"]), rng.choice([b"", b"", b"t: 1\r\n", b"x: y\r\nz: \r\n"])
    header = rng.choice([b"transfer-encoding: chunked", b"Transfer-Encoding:Chunked"])
    return header, chunks(*split(rng, body), extension=extension, trailer=trailer)


def ended(rng: random.Random, data: bytes, *, strict: bool, closes: bool) -> Script:
    """The answer in pieces, whole or cut short, or with more behind it, which goes with the last piece: what comes
    later could be to anybody's request."""
    end, unasked = "close" if closes else "keep", b""
    chance = rng.random()
    if chance < 0.1 and len(data) < 4000:
        unasked = rng.choice(UNASKED)
    elif chance < 0.22:
        strict, data, end = False, data[: rng.randrange(len(data))], rng.choice(["close", "reset"])
    elif chance < 0.27:
        end = "close"
    if len(data) > 1000 and rng.random() < 0.05:
        strict, data = False, data.replace(rng.choice([b"\r\n", b"0", b":"]), rng.choice([b"\n", b"", b"\x00"]), 1)
    *pieces, last = split(rng, data)
    return Script([*pieces, last + unasked], end, strict, unasked != b"")


# ---- what clients say


def body_of(rng: random.Random, marker: bytes) -> bytes:
    """A call's body, most of them good."""
    model = rng.choice([b"far", b"demo-chat", b"far", b"demo-chat", b"both", b"nobody"])
    stream = rng.choice([b"", b"", b',"stream":true', b',"max_tokens":7', b',"stream":1', b',"model":"far"'])
    text = marker + rng.choice([b"", b" \\u00e4", b" \xc3\xa4", b" \xff", b"x" * 3000, b"y" * 70_000])
    return b'{"model":"%b","messages":[{"role":"user","content":"%b"}]%b}' % (model, text, stream)


# Not `connection: upgrade` with it: aiohttp's parser loses what comes behind such a request in the same read.
ODD = [
    b"connection: close", b"Connection: Keep-Alive", b"connection: close, x", b"connection: x",
    b"expect: 100-continue", b"Upgrade: websocket", b"upgrade: h2c", b"x-a: 1\r\n folded", b"x-a : 1", b"x-a:\t 1 \t",
    b"host: b", b"x\x00: 1", b"x-a: \x00", b"x-a: a\rb", b"x-a: a\nb: c", b"x-a: \xc3\xa4", b": 1", b"no colon",
    b"TE: trailers", b"X-Request-ID: mine", b"x-request-id: a b", b"x-request-id: a\r\nx-request-id: b",
    b"authorization: Bearer x", b"authorization: Bearer x\r\nAuthorization: Bearer y", b"x-vramp-class: batch",
    b"x-vramp-class: none", b"x-vramp-deadline-ms: 60000", b"x-vramp-session: s", b"content-type: application/json",
    b"Content-Type: text/plain", b"x-" + b"n" * 100 + b": 1", b"x-large: " + b"v" * 9000,
    b"x-larger: " + b"v" * 70_000, b"transfer-encoding: chunked", b"Transfer-Encoding: gzip, chunked",
    b"transfer-encoding: xchunked", b"transfer-encoding:\x0bchunked", b"content-length: 3", b"Content-Length: 0",
    b"content-length: 5, 5", b"content-length: -1", b"content-length: +4", b"content-length: 0x4",
    b"content-length: 99999999999999999999", b"content-length:", b"content_length: 3", b"trailer: x",
    b"content-encoding: gzip", b"content-encoding: identity", b"traceparent: 00-1-2-01", b"traceparent: \t",
    b"HTTP2-Settings: x", b"accept: */*", b"transfer-encoding: identity", b"Transfer-Encoding: chunked, chunked",
    b"proxy-connection: close", b"keep-alive: 5",
]  # fmt: skip
FIRST = [
    b"POST /v1/chat/completions HTTP/1.0", b"POST http://localhost/v1/chat/completions HTTP/1.1",
    b"GET /healthz HTTP/1.1", b"POST /v1/chat/completions?x=1 HTTP/1.1", b"POST /v1/chat%2Fcompletions HTTP/1.1",
    b"POST //v1/chat/completions HTTP/1.1", b"POST /v1/./chat/completions HTTP/1.1",
    b"post /v1/chat/completions HTTP/1.1", b"POST /v1/chat/completions HTTP/1.2",
    b"POST /v1/chat/completions  HTTP/1.1", b"POST\t/v1/chat/completions HTTP/1.1",
    b"POST /v1/chat/completions HTTP/1.1 ", b"POST /v1/chat/completions", b"OPTIONS * HTTP/1.1",
    b"POST /v1/chat/completions# HTTP/1.1", b"PUT /v1/messages HTTP/1.1", b"\r\nPOST /v1/chat/completions HTTP/1.1",
    b"POST /v1/" + b"a" * 9000 + b" HTTP/1.1", b"POST /v1/\xc3\xa4 HTTP/1.1", b"CONNECT localhost:80 HTTP/1.1",
    b"POST /v1/messages HTTP/1.1", b"POST /v1/embeddings HTTP/1.1", b"POST * HTTP/1.1",
    b"POST /v1/chat/completions HTTP/2.0", b"POST /v1/chat/completions HTTP/1.10", b"POST /v1/\x00 HTTP/1.1",
]  # fmt: skip
BAD_CHUNKS = [
    b"x\r\n", b"+5\r\nhello\r\n0\r\n\r\n", b"5 \r\nhello\r\n0\r\n\r\n", b"5\nhello\r\n0\r\n\r\n",
    b"5\r\nhelloxx0\r\n\r\n", b"5\r\nhello\n0\r\n\r\n", b"ffffffffffffffff5\r\nhello\r\n0\r\n\r\n", b"0\r\n\r\n",
    b"\r\n", b"5;a\nb\r\nhello\r\n0\r\n\r\n", b"0x5\r\nhello\r\n0\r\n\r\n", b"5\r\nhello\r\n0\n\n",
    b"5\r\nhello\r\n0\r\nx: y\r\nz\r\n\r\n", b"5\r\nhello\r\n00\r\n\r\n", b"5\r\nhello\r\n0\r\n\r",
    b"5;\r\nhello\r\n0\r\n\r\n", b"5\r\nhello\r\n0;a=\x00\r\n\r\n",
]  # fmt: skip


def request_of(rng: random.Random, marker: bytes, *, odd: float) -> bytes:
    """One request; `odd` is how likely each of its parts is no ordinary one."""
    first, body = b"POST %b HTTP/1.1" % CHAT, body_of(rng, marker)
    headers = [
        b"Host: localhost",
        rng.choice([b"content-type: application/json", b"Content-Type:application/json; charset=utf-8"]),
    ]
    if rng.random() < odd:
        first = rng.choice(FIRST)
    if rng.random() < odd:
        headers += rng.sample(ODD, rng.randrange(1, 3))
    if rng.random() < odd / 4:
        headers += [b"x-%d: 1" % at for at in range(rng.choice([50, 70, 140]))]
    if rng.random() < 0.3:
        pieces = split(rng, body, 4)
        framed = chunks(
            *pieces, extension=rng.choice([b"", b"", b";a=b"]), trailer=rng.choice([b"", b"", b"", b"t: 1\r\n"])
        )
        if rng.random() < odd:
            framed = rng.choice(BAD_CHUNKS)
        headers.append(b"transfer-encoding: chunked")
    else:
        slip = rng.choice([-3, -1, 1, 4]) if rng.random() < odd / 2 else 0
        framed = body
        headers.append(
            rng.choice([b"content-length: %d", b"Content-Length:%d", b"CONTENT-LENGTH:   00%d "]) % (len(body) + slip)
        )
    if rng.random() < odd / 4:
        headers.pop(rng.randrange(len(headers)))
    rng.shuffle(headers)
    data = b"\r\n".join([first, *headers, b"", framed])
    if rng.random() < odd / 4:
        at = rng.randrange(len(data))
        noise = rng.choice([b"\r\n", b"\n", b"\r", b" ", b":", b"\x00", b"\t", b"\xff", b"\r\n\r\n"])
        data = data[:at] + noise + data[at + rng.randrange(2) :]
    return data


LAST = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def conversation_of(rng: random.Random, number: int) -> list[bytes]:
    """What a client says on one connection, in pieces. Its last words end the connection."""
    odd = rng.choice([0.0, 0.1, 0.4])
    said = [request_of(rng, b"case-%d%d" % (number, at), odd=odd) for at in range(rng.randrange(1, 5))]
    if rng.random() < 0.5:
        return split(rng, b"".join(said) + LAST, 10)
    return [piece for each in (*said, LAST) for piece in split(rng, each, 3)]


# ---- cases


class Lanes:
    """Two servers over one upstream, and what was found wrong."""

    def __init__(self, ordinary: Proxy, fast: Proxy, upstream: ScriptedUpstream) -> None:
        self.ordinary, self.fast, self.upstream = ordinary, fast, upstream
        self.wrong: list[str] = []
        self.cases = 0
        self._strict: list[tuple[int, list[Answer]]] = []  # whose rows must be alike

    async def run(self, seeds: Iterable[int]) -> None:
        """One conversation and one answer for each seed."""
        chosen = list(seeds)
        await self._many(self._converse, chosen)
        await self._make_flows()
        rows = [await Rows.of(each) for each in (self.ordinary, self.fast)]
        await self._many(self._answered, chosen)
        self._compare_rows(*[await each.read() for each in rows])
        for each in (self.ordinary, self.fast):
            if not each.scheduler.all_returned_once:
                self.wrong.append("a lease is not back")
            each.scheduler.waiting.clear()
        self.wrong += self.upstream.wrong

    async def _many(self, case: Callable[[int], Awaitable[None]], seeds: list[int]) -> None:
        waiting = iter(seeds)

        async def work() -> None:
            for seed in waiting:
                self.cases += 1
                try:
                    await case(seed)
                except (NotHttp, TimeoutError, AssertionError) as error:
                    self.wrong.append(f"{case.__name__} {seed}: {error!r}")

        await asyncio.gather(*(work() for _ in range(AT_ONCE)))
        for each in (self.ordinary, self.fast):
            await each.settled()

    async def _make_flows(self) -> None:
        """From the second of its kind on there is one."""
        for model in (b"far", b"demo-chat"):
            for stream in (b"", b',"stream":true'):
                body = b'{"model":"%b"%b,"messages":["case-0"]}' % (model, stream)
                for _ in range(3):
                    await ask(self.fast, b"", body, b"case-0")

    async def _converse(self, seed: int) -> None:
        """A client that says random things must be answered alike in both lanes."""
        pieces = conversation_of(random.Random(seed), seed)
        ordinary, fast = await asyncio.gather(*(talk(each, pieces) for each in (self.ordinary, self.fast)))
        if not alike(ordinary, fast):
            self.wrong.append(f"conversation {seed}:\n  {pieces}\n  ordinary {ordinary}\n  fast     {fast}")

    async def _answered(self, seed: int) -> None:
        """Whatever an upstream says, all ways must tell it alike, and give the next call its own answer."""
        rng = random.Random(seed)
        marker = b"case-%d" % seed
        script = self.upstream.scripts[marker] = script_of(rng, marker)
        model, stream = rng.choice([b"far", b"far", b"demo-chat"]), rng.choice([b"", b',"stream":true'])
        body = b'{"model":"%b"%b,"messages":[{"role":"user","content":"%b"}]}' % (model, stream, marker)
        told = [
            await asyncio.wait_for(ask(proxy, headers, body, marker), CLOSED_S)
            for proxy, headers in (
                (self.ordinary, b""),
                (self.fast, b"x-request-id: decided-%d\r\n" % seed),  # with an id of its own each is
                (self.fast, b""),
            )
        ]
        del self.upstream.scripts[marker]
        first, *others = told
        refused = [each for each in others if each.cut or each.status >= 500]
        may_differ = script.unasked or (not script.strict and len(refused) == len(others))
        if any(each != first for each in others) and not may_differ:
            self.wrong.append(f"answer {seed}:\n  {script}\n  {body!r}\n  " + "\n  ".join(map(str, told)))
        if script.strict and not script.unasked:
            self._strict.append((seed, told))

    def _compare_rows(self, ordinary: list[dict[str, Any]], fast: list[dict[str, Any]]) -> None:
        """Each answer has one row, which says the same whichever way it went."""
        for rows in (ordinary, fast):
            if len({row["request_id"] for row in rows}) != len(rows):
                self.wrong.append("a call has two rows")
        if 2 * len(ordinary) != len(fast):
            self.wrong.append(f"{len(ordinary)} rows in one lane, {len(fast)} in the other, which was asked twice")
        found = {row["request_id"]: {n: v for n, v in row.items() if n not in ROW_VARIES} for row in ordinary + fast}
        for seed, told in self._strict:
            said = [found.get(each.request_id) for each in told]
            if said[0] is None or any(row != said[0] for row in said):
                self.wrong.append(f"rows of answer {seed}:\n  " + "\n  ".join(map(str, said)))
        self._strict.clear()


class Rows:
    """The usage rows of a server from here on."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._taken, self._at = proxy.usage.taken, proxy.usage_path.stat().st_size

    @classmethod
    async def of(cls, proxy: Proxy) -> Rows:
        await proxy.rows()  # those that are to come are written
        return cls(proxy)

    async def read(self) -> list[dict[str, Any]]:
        """All that there will be of what was answered."""
        usage, path = self._proxy.usage, self._proxy.usage_path
        with path.open("rb") as file:
            file.seek(self._at)
            read = b""
            async with asyncio.timeout(CLOSED_S):
                while read.count(b"\n") < usage.taken - self._taken:
                    await asyncio.sleep(0.001)
                    read += file.read()
        return [json.loads(line) for line in read.splitlines()]


async def connect(proxy: Proxy) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A client's connection, over TLS where the server wants that."""
    return await asyncio.open_connection(*proxy.address, ssl=TRUSTING if proxy.tls else None)


async def talk(proxy: Proxy, pieces: list[bytes]) -> list[Answer]:
    """All that is answered to these pieces."""
    reader, writer = await connect(proxy)
    saying = asyncio.create_task(say(writer, pieces))
    answers: list[Answer] = []
    try:
        async with asyncio.timeout(CLOSED_S):
            while (answer := await read_answer(reader)) is not None:
                answers.append(answer)
    except GONE:
        pass  # whoever was refused goes on talking, and is reset
    finally:
        saying.cancel()
        writer.close()
    return answers


async def say(writer: asyncio.StreamWriter, pieces: list[bytes]) -> None:
    """These pieces, as separate as the kernel lets them be, until the peer has gone."""
    with contextlib.suppress(*GONE):
        for piece in pieces:
            if writer.is_closing():
                return
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)


async def ask(proxy: Proxy, headers: bytes, body: bytes, marker: bytes) -> Answer:
    """The answer to a call; then another one on its connection, whose answer must be its own."""
    reader, writer = await connect(proxy)
    try:
        writer.write(call(headers, body))
        answer = await read_answer(reader) or NOTHING
        for number in range(2):
            again = b"again-%d-%b" % (number, marker)
            writer.write(call(b"", body.replace(marker, again)))
            second = await read_answer(reader)
            if second is None:
                assert answer.cut or ("connection", "close") in answer.headers, "it ended after a whole answer"
                break
            if second.status != 200 or again not in second.body:
                raise AssertionError(f"after {answer}: {second}")
        return answer
    finally:
        writer.close()


def call(headers: bytes, body: bytes) -> bytes:
    head = b"POST %b HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n%bcontent-length: %d\r\n\r\n"
    return head % (CHAT, headers, len(body)) + body


def alike(ordinary: list[Answer], fast: list[Answer]) -> bool:
    """Equal, but for what aiohttp refuses: where that comes at once with what is before it, that is forgotten, and so
    is a last request where something comes with it; a client that speaks after a last request may be reset in its
    answer. How much comes at once is another matter in each lane."""
    if ordinary == fast:
        return True
    if not ordinary or not fast:
        return False
    ends = (ordinary[-1], fast[-1])
    refused = all(400 <= each.status < 500 for each in ends) or any(AFTER_LAST in each.body for each in ends)
    if not refused and not any(each.was_last and each.cut for each in ends):
        return False
    common = min(len(ordinary), len(fast)) - 1
    return ordinary[:common] == fast[:common]


@contextlib.asynccontextmanager
async def lanes_over_scripts(folder: Path, *, tls: bool = False) -> AsyncIterator[Lanes]:
    """Both servers, for a while. With `tls` the fast lane's clients speak that, and what is handed over goes on so."""
    async with ScriptedUpstream() as upstream, FakeUpstream() as unused:
        made = []
        for fast in (False, True):
            context = make_pair(folder / "certificate").context() if tls and fast else None
            proxy = Proxy(unused, unused, folder / f"{fast}.log", fast=fast, tls=context)
            proxy.limits = http.Limits(keepalive_s=12.0, write_stall_s=12.0)
            await proxy.start()
            unused_url, unused.base_url = unused.base_url, upstream.base_url
            proxy.configure(timeouts=TimeoutsConfig(read_body_s=3.0, first_byte_s=10.0, idle_s=10.0))
            unused.base_url = unused_url
            proxy.scheduler.base_url = upstream.base_url
            made.append(proxy)
        yield Lanes(made[0], made[1], upstream)
        for proxy in made:
            await proxy.stop()


def shortened(text: str) -> str:
    """Without what is said again and again."""
    return re.sub(r"(.{1,5}?)\1{15,}", r"\1...", text)


async def fuzz(seconds: float, seed: int, *, tls: bool) -> int:
    """Take seeds from this one on for so long; how many things were found wrong."""
    lines.FLUSH_S = 0.01
    http.LINGER_S = 0.05
    ends = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        async with lanes_over_scripts(Path(folder), tls=tls) as lanes:
            while time.monotonic() < ends and not lanes.wrong:
                await lanes.run(range(seed, seed + 500))
                seed += 500
            print(
                f"{lanes.cases} cases, next seed {seed}",
                *map(shortened, lanes.wrong),
                sep="\n",
            )
            return len(lanes.wrong)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tls", action="store_true")
    given = parser.parse_args()
    raise SystemExit(min(uvloop.run(fuzz(given.seconds, given.seed, tls=given.tls)), 1))
