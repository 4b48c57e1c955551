"""A fast fake of OpenAI's chat API: a uvloop protocol that answers with canned bytes. Prints its port and serves.

It reads no more of a request than the end of its head, its length, the model's name and whether usage is wanted. That
is no HTTP server: it is for proxies that we trust to speak HTTP, and costs a tenth of what they do.

With `--busy` it spends so much more time on each answer and event: as slow as over TLS, without TLS.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import re
import ssl
import time
from typing import cast

import msgspec
import uvloop

from loadtests import canned

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_STREAMED = re.compile(rb'"model": ?"sse-(\d+)-(\d+)"')
_HEAD_END = b"\r\n\r\n"
_PLAIN = canned.plain_answer()


class Busy(msgspec.Struct, frozen=True):
    """For how long to compute nothing, in µs: before the answer to a small or a large request, and before an event."""

    answer: float = 0.0
    large_answer: float = 0.0
    event: float = 0.0


def spin(us: float) -> None:
    """Keep the core busy."""
    until = time.perf_counter() + us / 1e6
    while time.perf_counter() < until:
        pass


class Upstream(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, busy: Busy | None = None) -> None:
        self._busy = busy
        self._loop = asyncio.get_running_loop()
        self._got = b""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        got = self._got = self._got + data if self._got else data
        head = got.find(_HEAD_END)
        if head < 0:
            return
        length = _LENGTH.search(got, 0, head)
        end = head + len(_HEAD_END) + (int(length[1]) if length else 0)
        if len(got) < end:
            return
        self._got = got[end:]
        streamed = _STREAMED.search(got, head)
        if streamed is None:
            if self._busy is not None:
                spin(self._busy.large_answer if end > canned.LARGE_BYTES else self._busy.answer)
            self._transport.write(_PLAIN)
        else:
            last = canned.STREAM_END_WITH_USAGE if b'"include_usage"' in got else canned.STREAM_END
            self._transport.write(canned.STREAM_HEAD)
            self._stream(0, int(streamed[1]), int(streamed[2]) / 1000, last)

    def _stream(self, number: int, events: int, each_s: float, last: bytes) -> None:
        if number < events:
            if self._busy is not None:
                spin(self._busy.event)
            self._transport.write(canned.numbered(number))
            self._timer = self._loop.call_later(each_s, self._stream, number + 1, events, each_s, last)
        else:
            self._transport.write(last)


async def serve(pair: list[str], busy: Busy | None) -> None:
    """Serve on a free port until killed: over TLS with the files of a certificate and its key."""
    tls = None
    if pair:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(*pair)
    make = functools.partial(Upstream, busy)
    server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0, backlog=1024, ssl=tls)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="A fast fake of OpenAI's chat API. Prints its port and serves.")
    parser.add_argument("pair", nargs="*", metavar="FILE", help="a certificate and its key: serve over TLS")
    parser.add_argument("--busy", nargs=3, type=float, metavar="US", help="see Busy")
    asked = parser.parse_args()
    uvloop.run(serve(asked.pair, Busy(*asked.busy) if asked.busy else None))


if __name__ == "__main__":
    main()
