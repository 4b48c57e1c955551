"""The public listener: aiohttp's low-level server on sockets that somebody else opened.

`handler_cancellation` is on: when a client's connection goes, its handler is cancelled where it waits, and with it the
lease and the work upstream. aiohttp parses; what its parser refuses is answered in an API client's language.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast
from typing import Protocol as Interface

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import RequestHandler, RequestPayloadError

from ext.relay import Relay
from proxy.errors import CallError, HeadersTooLarge, InvalidRequest
from proxy.server.fast import HANDSHAKE_S, FastLane
from proxy.server.handler import LEFT, Handed, Handler

log = logging.getLogger("vramp.server")

BACKLOG = 4096
MAX_LINE = 8190
MAX_HEADERS = 128
CUT_OFF_S = 1.0  # for the last words to clients at a stop
LEAVE_S = 2.0  # how long connections that are idle are kept for a next request, once another proxy has the listeners
LINGER_S = 2.0  # how long a refused client may go on sending before we close on it


class Limits(msgspec.Struct, frozen=True):
    """What the parser and the connections need to know. A reload leaves them as they are."""

    keepalive_s: float = 75.0
    write_stall_s: float = 60.0
    shared: bool = False  # other processes accept from the same sockets


class Protocol(RequestHandler):
    """One client connection, or what is left of one to the ordinary lane (`Handed`)."""

    __slots__ = ("_handed", "_handler", "_stall_ms", "_take_back", "tried")

    def __init__(
        self,
        manager: HttpServer,
        handler: Handler,
        limits: Limits,
        handed: Handed | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(manager, **kwargs)
        self._handler = handler
        self._handed = handed
        self._take_back: Callable[[socket.socket, bytes, str], None] | None = None
        self.tried = handed.tried if handed is not None else None
        self._stall_ms = int(limits.write_stall_s * 1000)

    @property
    def peername(self) -> str | tuple[str, int, int, int] | tuple[str, int] | None:
        """The client's address, which the socket does not know where the fast lane speaks TLS before it."""
        return (self._handed.remote, 0) if self._handed is not None else super().peername

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let the kernel drop a connection whose peer takes nothing of what our handlers have already left behind."""
        connection: socket.socket | None = transport.get_extra_info("socket")
        if connection is not None and hasattr(socket, "TCP_USER_TIMEOUT") and connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, self._stall_ms)
        super().connection_made(transport)
        if self._handed is not None:
            self.data_received(self._handed.read)  # before the transport reads anything itself
            self._take_back = self._handed.take_back

    def data_received(self, data: bytes) -> None:
        """Parse what came, or let it be the fast lane's, if it is the start of what may be a request for that.

        Where a request begins is known only as long as one thing at a time came: a whole request, its answer, the next.
        Without that some bytes could be one request to aiohttp and another to the relay.
        """
        take_back = self._take_back
        if data:  # aiohttp itself calls this with nothing
            self._take_back = None
        idle = self._waiter is not None and not self._waiter.done() and not self._messages
        if take_back is not None and idle and data.startswith(b"POST /v1/") and self._gives_back(take_back, data):
            return
        super().data_received(data)

    def _gives_back(self, take_back: Callable[[socket.socket, bytes, str], None], data: bytes) -> bool:
        transport = self.transport
        leaving = self._handler.draining or self._handler.leaving
        if leaving or transport is None or transport.is_closing() or transport.get_write_buffer_size():
            return False
        assert self._handed is not None
        connection = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
        transport.pause_reading()  # closing takes a turn of the loop, in which it would read what is not for it
        self.force_close()
        take_back(connection, data, self._handed.remote)
        return True

    def connection_lost(self, exc: BaseException | None) -> None:
        """Settle a request that was taken over and never reached its handler."""
        super().connection_lost(exc)
        tried, self.tried = self.tried, None
        if tried is not None:
            tried.outcome.status, tried.outcome.error = LEFT, "client_left"
            self._handler.end(tried.outcome, asyncio.get_running_loop().time())

    def _make_error_handler(self, err_info: Any) -> Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]:
        async def refuse(request: web.BaseRequest) -> web.StreamResponse:
            self.close()  # from here on what arrives is dropped unparsed
            refusal = self._handed.refusal if self._handed is not None else None
            response = self._handler.malformed(request, refusal or _explain(err_info.exc))
            response.force_close()
            await response.prepare(request)
            await response.write_eof()
            # Closing over unread bytes sends a reset, which can overtake the answer: linger, as nginx does.
            await asyncio.sleep(LINGER_S)
            return response

        return refuse

    def log_exception(self, *args: Any, **more: Any) -> None:
        """A body that is not coded as it says was refused, or not asked for. aiohttp reads it after the answer to be
        rid of it, and would log that as a fault of the server."""
        if not isinstance(more.get("exc_info"), RequestPayloadError):
            super().log_exception(*args, **more)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Only for what `Handler` itself let through, which is a bug of ours."""
        if isinstance(exc, ConnectionError):
            raise exc  # the client went while we wrote: the connection just ends
        log.error("request failed outside its handler: %s", message or exc, exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun already")
        response = self._handler.malformed(request, CallError("An error of vramp itself.", code="internal"))
        response.force_close()
        return response


class HttpServer(web.Server):
    """aiohttp's server with our protocol."""

    def __init__(self, handler: Handler, limits: Limits) -> None:
        super().__init__(handler, handler_cancellation=True)
        self._handler = handler
        self._limits = limits

    def __call__(self, handed: Handed | None = None) -> RequestHandler:
        """A protocol for a new connection, or for one that the fast lane hands over."""
        return Protocol(
            self,
            self._handler,
            self._limits,
            handed,
            loop=self._loop,
            keepalive_timeout=self._limits.keepalive_s,
            access_log=cast("logging.Logger", None),
            max_line_size=MAX_LINE,
            max_field_size=self._handler.state.max_header,
            max_headers=MAX_HEADERS,
            lingering_time=LINGER_S,
        )


def _explain(error: BaseException) -> CallError:
    if isinstance(error, LineTooLong):
        return HeadersTooLarge("The request line or a header is too long ([limits] max_header).")
    first_line = str(getattr(error, "message", "")).partition("\n")[0].rstrip(":.")
    return InvalidRequest(f"This is not a well-formed HTTP request: {first_line or 'it cannot be parsed'}.")


class Server:
    """A running listener. `drain`, then `close`."""

    def __init__(self, handler: Handler, protocol: HttpServer, listeners: Sequence[Listener]) -> None:
        self._handler = handler
        self._protocol = protocol
        self._listeners = listeners

    async def drain(self, timeout_s: float) -> bool:
        """Let what is in flight finish; True when all of it did in time. New calls get 503 meanwhile."""
        self._handler.drain()
        return await self._idle_within(timeout_s)

    def stop_accepting(self) -> None:
        """New connections are left in the listen queue for whoever else holds the sockets: the way of an upgrade. Those
        that are open go on, each until its next answer has been sent."""
        self._stop_listening()
        self._handler.leave()

    async def finish(self, timeout_s: float) -> bool:
        """After `stop_accepting`: let what is in flight finish; True when all of it did in time. Connections that
        clients keep are first given time to be used once more, or to be left."""
        await asyncio.sleep(LEAVE_S)
        return await self._idle_within(timeout_s)

    async def _idle_within(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._handler.until_idle()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Stop listening, end what is left with an error event or a 503, close every connection. Idempotent."""
        self._stop_listening()
        self._handler.drain()
        self._handler.cut_off()
        for listener in self._listeners:
            listener.cut_off()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CUT_OFF_S):
                await self._handler.until_idle()
        for listener in self._listeners:
            listener.close()
        self._protocol.pre_shutdown()
        await self._protocol.shutdown(timeout=0.1)

    def _stop_listening(self) -> None:
        for listener in self._listeners:
            listener.stop()


class Listener(Interface):
    """What accepts connections, in either lane."""

    def stop(self) -> None:
        """Accept nothing more. Idempotent."""
        ...

    def cut_off(self) -> None:
        """End what is in flight here with what can still be said, after the handler's own requests."""
        ...

    def close(self) -> None:
        """Close the connections that are only here. Idempotent."""
        ...


class Ordinary:
    """A listening socket whose connections go to aiohttp at once."""

    def __init__(self, server: asyncio.Server) -> None:
        self._server = server

    def stop(self) -> None:
        """See `Listener`."""
        self._server.close()

    def cut_off(self) -> None:
        """Nothing: what is in flight is the handler's."""

    def close(self) -> None:
        """Nothing: the connections are aiohttp's."""


async def start(
    handler: Handler,
    sockets: Sequence[socket.socket],
    limits: Limits,
    *,
    fast: bool = False,
    tls: ssl.SSLContext | None = None,
) -> Server:
    """Serve on these bound sockets, on the running loop. The server closes its own duplicates, never the sockets.

    `fast`: through the fast lane, where it was built; what it does not take goes to aiohttp. With `tls` clients speak
    that, in either lane.
    """
    loop = asyncio.get_running_loop()
    protocol = HttpServer(handler, limits)
    if fast and Relay is not None:
        lane = FastLane(
            handler,
            protocol,
            keepalive_s=limits.keepalive_s,
            stall_s=limits.write_stall_s,
            shared=limits.shared,
            tls=tls,
        )
        for each in sockets:
            each.listen(BACKLOG)
            lane.listen(each.dup())
        return Server(handler, protocol, [lane])
    limit_s = None if tls is None else HANDSHAKE_S
    servers = [
        await loop.create_server(protocol, sock=each.dup(), backlog=BACKLOG, ssl=tls, ssl_handshake_timeout=limit_s)
        for each in sockets
    ]
    return Server(handler, protocol, [Ordinary(server) for server in servers])
