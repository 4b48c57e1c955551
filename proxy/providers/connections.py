"""Requests to one backend over aiohttp's connector and parser, without its session.

A session takes 50 us for a request: it merges headers, makes objects for request, writer and response, starts a task
to send the body, and looks for redirects, cookies, proxies and traces, none of which a call has here. What is hard
stays aiohttp's: names, TLS, kept connections, and the parser.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping

import aiohttp
import msgspec
from aiohttp.http import RawResponseMessage
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from ext import tls_words
from proxy.providers.base import Broken, Unreachable

JOINED = 1 << 14  # a body up to this size is copied behind its head: cheaper than to send two buffers
STALE = 16  # connections that said something unasked, in a row, before their server is none


class Destination(msgspec.Struct, frozen=True):
    """Where requests are posted, made once. `head` is all that every one says, without the empty line."""

    url: URL
    head: bytes
    request: aiohttp.ClientRequest  # what the connector wants to know it from

    @classmethod
    def of(cls, url: URL, headers: Mapping[str, str], loop: asyncio.AbstractEventLoop) -> Destination:
        """The destination of requests with these headers."""
        host = url.host_port_subcomponent or ""
        head = f"POST {url.raw_path_qs} HTTP/1.1\r\nhost: {host}\r\n".encode() + lines_of(headers)
        return cls(url, head, aiohttp.ClientRequest("POST", url, loop=loop))


def lines_of(headers: Mapping[str, str]) -> bytes:
    """Headers as they are sent; what a parser read is the same bytes again."""
    return "".join([f"{name}: {value}\r\n" for name, value in headers.items()]).encode("utf-8", "surrogateescape")


class Connections:
    """One backend's. Make it on the running loop."""

    def __init__(
        self, backend: str, *, connect_s: float, keepalive_s: float, tls: ssl.SSLContext | None = None
    ) -> None:
        """`tls`: for https; where there is none, it is aiohttp's own."""
        self._backend = backend
        self._connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=keepalive_s, ssl=tls or True)
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_s)

    async def post(self, to: Destination, lines: bytes, body: bytes) -> HttpUpstream:
        """The answer, once its head is there. `lines` are headers of this request.

        Raises `Unreachable` and `Broken`. Whoever gets an answer ends it.
        """
        connection = await self._connect(to)
        try:
            return await _exchange(connection, b"%b%bcontent-length: %d\r\n\r\n" % (to.head, lines, len(body)), body)
        except (aiohttp.ClientError, OSError) as error:
            connection.close()
            raise Broken(f"backend {self._backend}: {why(error)}") from error
        except HttpProcessingError as error:
            connection.close()
            what = error.message.partition("\n")[0].rstrip(":")
            raise Broken(f"backend {self._backend}: its answer is no HTTP: {what}") from error
        except BaseException:
            connection.close()
            raise

    async def close(self) -> None:
        """Close all; what is in flight breaks."""
        await self._connector.close()

    async def _connect(self, to: Destination) -> aiohttp.connector.Connection:
        """A connection on which nothing was said that nobody asked for. The connector looks at that when it takes one
        back, and not when it lends it again: the next caller would get what came since for an answer."""
        for _ in range(STALE):
            connection = await self._lent(to)
            if connection.protocol is None or not connection.protocol.should_close:
                return connection
            connection.close()
        raise Broken(f"backend {self._backend}: it answers before it is asked")

    async def _lent(self, to: Destination) -> aiohttp.connector.Connection:
        try:
            return await self._connector.connect(to.request, [], self._timeout)
        except TimeoutError as error:
            raise Unreachable(f"backend {self._backend}: Connection timeout to host {to.url}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Unreachable(f"backend {self._backend}: {why(error)}") from error


async def _exchange(connection: aiohttp.connector.Connection, head: bytes, body: bytes) -> HttpUpstream:
    """Send and wait for the answer's head. The body goes to the transport whole: it is in memory anyway."""
    protocol, transport = connection.protocol, connection.transport
    if protocol is None or transport is None or transport.is_closing():
        raise aiohttp.ClientConnectionResetError("Cannot write to closing transport")
    protocol.set_response_params(read_until_eof=True, auto_decompress=False)
    if len(body) <= JOINED:
        transport.write(head + body)
    else:
        transport.writelines((head, body))
    while True:
        message, content = await protocol.read()
        if message.code >= 200 or message.code == 101:  # the others announce another
            return HttpUpstream(connection, message, content)


class HttpUpstream:
    """`Upstream` over one connection."""

    __slots__ = ("_connection", "_content", "headers", "status")

    def __init__(
        self, connection: aiohttp.connector.Connection, message: RawResponseMessage, content: aiohttp.StreamReader
    ) -> None:
        self._connection = connection
        self._content = content
        self.status: int = message.code
        self.headers: Mapping[str, str] = message.headers

    def arrived(self) -> bytes | None:
        """See `Upstream`."""
        content = self._content
        return content.read_nowait() if content.is_eof() and content.exception() is None else None

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes; reading pauses when the consumer does."""
        content = self._content
        try:
            while chunk := await content.readany():
                yield chunk
        except (aiohttp.ClientError, OSError) as error:
            raise Broken(why(error)) from error

    def end(self) -> None:
        """Keep the connection if the answer was read to its end and the request sent to its own, else close it, which
        is what cancels the work upstream."""
        transport = self._connection.transport
        if self._content.at_eof() and transport is not None and not transport.get_write_buffer_size():
            self._connection.release()
        else:
            self._connection.close()


def why(error: Exception) -> str:
    """An error in words; what the peer said is not among them, for they go to clients."""
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "the connection was closed"  # the error itself holds all of the head that was there
    if isinstance(error.__cause__, ssl.SSLError):
        return tls_words.why(error.__cause__)
    return str(error) or type(error).__name__
