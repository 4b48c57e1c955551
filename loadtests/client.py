"""The benchmark's clients: connections in a closed loop that send canned requests and count checked answers."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Callable
from typing import cast

from loadtests import canned

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_HEAD_END = b"\r\n\r\n"
_OK = b"HTTP/1.1 200 "
_DATA = b"data: "
_SHORTER = len(_DATA) - 1  # bytes of a read are kept: a mark that was cut in two is found, none is counted twice


class Count:
    """What came back. `failed` are answers that were not as they should be, and connections that broke."""

    def __init__(self) -> None:
        self.answers = 0
        self.events = 0
        self.failed = 0
        self.started = 0  # streams whose first event has come


class _Connection(asyncio.Protocol):
    """Sends the next request when an answer is whole."""

    def __init__(self, request: bytes, count: Count) -> None:
        self._request = request
        self._count = count
        self._closing = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._closing:
            self._count.failed += 1

    def close(self) -> None:
        self._closing = True
        self._transport.abort()

    def _ask(self) -> None:
        self._transport.write(self._request)


class Plain(_Connection):
    """Answers with a Content-Length."""

    def __init__(self, request: bytes, count: Count) -> None:
        super().__init__(request, count)
        self._got = b""

    def data_received(self, data: bytes) -> None:
        got = self._got = self._got + data if self._got else data
        head = got.find(_HEAD_END)
        length = _LENGTH.search(got, 0, head) if head >= 0 else None
        if head < 0 or (length and len(got) < head + len(_HEAD_END) + int(length[1])):
            return
        self._got = b""
        if length is None or not got.startswith(_OK) or not got.endswith(b"}"):
            self._count.failed += 1
        else:
            self._count.answers += 1
        self._ask()


class Streamed(_Connection):
    """Chunked event streams with so many events each."""

    def __init__(self, request: bytes, count: Count, events: int) -> None:
        super().__init__(request, count)
        self._expected = events
        self._seen = 0
        self._head_right = False
        self._tail = b""

    def data_received(self, data: bytes) -> None:
        self._head_right = self._head_right or data.startswith(_OK)
        joined = self._tail + data
        events = joined.count(_DATA)
        self._count.started += bool(events and not self._seen)
        self._count.events += events
        self._seen += events
        self._tail = joined[-_SHORTER:]
        if joined.endswith(canned.LAST):
            self._whole()

    def _whole(self) -> None:
        if self._head_right and self._seen == self._expected:
            self._count.answers += 1
        else:
            self._count.failed += 1
        self._seen, self._head_right, self._tail = 0, False, b""
        self._ask()


class Load:
    """So many connections to one port, opened one after the other within `spread_s`.

    Use as `async with`; `count` goes on until the end.
    """

    def __init__(
        self,
        port: int,
        connections: int,
        make: Callable[[Count], _Connection],
        tls: ssl.SSLContext | None,
        spread_s: float = 0.0,
    ) -> None:
        self.count = Count()
        self._tls = tls
        self._port = port
        self._wanted = connections
        self._make = make
        self._pause_s = spread_s / connections
        self._open: list[_Connection] = []

    async def __aenter__(self) -> Load:
        loop = asyncio.get_running_loop()
        for _ in range(self._wanted):
            _, protocol = await loop.create_connection(
                lambda: self._make(self.count), "127.0.0.1", self._port, ssl=self._tls
            )
            self._open.append(protocol)
            await asyncio.sleep(self._pause_s)
        return self

    async def __aexit__(self, *exc: object) -> None:
        for connection in self._open:
            connection.close()


def plain(
    port: int, connections: int, prompt_bytes: int = canned.SMALL_BYTES, tls: ssl.SSLContext | None = None
) -> Load:
    """Small answers as fast as they come."""
    request = canned.request(canned.PLAIN, prompt_bytes)
    return Load(port, connections, lambda count: Plain(request, count), tls)


def streams(port: int, connections: int, model: str, tls: ssl.SSLContext | None = None) -> Load:
    """One stream after the other in each connection, out of step: together they would save a proxy its wake-ups."""
    request, events = canned.request(model, stream=True), canned.events_of(model)
    return Load(port, connections, lambda count: Streamed(request, count, events), tls, spread_s=0.1)
