"""A fast fake of OpenAI's chat API: a uvloop protocol that answers with canned bytes. Prints its port and serves.

It reads no more of a request than the end of its head, its length, the model's name and whether usage is wanted. That
is no HTTP server: it is for proxies that we trust to speak HTTP, and costs a tenth of what they do.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import sys
from typing import cast

import uvloop

from loadtests import canned

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_STREAMED = re.compile(rb'"model": ?"sse-(\d+)-(\d+)"')
_HEAD_END = b"\r\n\r\n"
_PLAIN = canned.plain_answer()


class Upstream(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
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
            self._transport.write(_PLAIN)
        else:
            last = canned.STREAM_END_WITH_USAGE if b'"include_usage"' in got else canned.STREAM_END
            self._transport.write(canned.STREAM_HEAD)
            self._stream(0, int(streamed[1]), int(streamed[2]) / 1000, last)

    def _stream(self, number: int, events: int, each_s: float, last: bytes) -> None:
        if number < events:
            self._transport.write(canned.numbered(number))
            self._timer = self._loop.call_later(each_s, self._stream, number + 1, events, each_s, last)
        else:
            self._transport.write(last)


async def main(*pair: str) -> None:
    """Serve on a free port until killed: over TLS with the files of a certificate and its key."""
    tls = None
    if pair:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(*pair)
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", 0, backlog=1024, ssl=tls)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
