"""The client's side of one request: the only writer of its response, which knows what can still be said.

    nothing sent --begin--> headers sent --write--> committed --finish--> over
         |                       ^
         +-------comment---------+   progress comments fix the status at 200; output is still to come

An error is an envelope with its status while nothing is sent, an event of the dialect's after that.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus

from aiohttp import HttpVersion11, hdrs, web

from proxy.dialects.call import Dialect
from proxy.dialects.envelope import body_for, event_for, retry_headers, status_for
from proxy.errors import CallError, MethodNotAllowed
from proxy.observe.outcome import Outcome
from proxy.server.head import Dates, head_of
from proxy.server.watchdog import Watchdog

EVENT_STREAM = "text/event-stream"
JSON = "application/json"
# `x-accel-buffering` stops an nginx in front from collecting a stream before it passes it on.
STREAM_HEADERS = {"content-type": EVENT_STREAM, "cache-control": "no-store", "x-accel-buffering": "no"}
_dates = Dates()


class ClientStalled(Exception):
    """The client took nothing for `[timeouts] write_stall_s`. Nothing can be told to it any more."""


class Written(web.StreamResponse):
    """What the server is told of an answer, which `Answer` writes itself.

    aiohttp's own response takes 20 us to put a head together, a tenth of a request, and 4 us to write a chunk.
    """

    def __init__(self, *, keeps: bool) -> None:
        super().__init__()
        self._keeps = keeps

    async def prepare(self, request: web.BaseRequest) -> None:
        """It was."""

    async def write_eof(self, data: bytes = b"") -> None:
        """It was."""

    @property
    def keep_alive(self) -> bool:
        """Whether the connection is good for another request."""
        return self._keeps


_KEPT, _LAST = Written(keeps=True), Written(keeps=False)


class Answer:
    """One response. Every write waits until the client's connection takes more, within the stall limit."""

    __slots__ = (
        "_chunked",
        "_commented",
        "_dialect",
        "_head",
        "_keeps",
        "_outcome",
        "_over",
        "_request",
        "_stall_s",
        "_streams",
        "_watch",
        "committed",
        "last",
        "started",
    )

    def __init__(
        self, request: web.BaseRequest, dialect: Dialect, outcome: Outcome, watch: Watchdog, stall_s: float
    ) -> None:
        self._request = request
        self._dialect = dialect
        self._outcome = outcome
        self._watch = watch
        self._stall_s = stall_s
        self._head = b""  # goes out with the first bytes of the body
        self._chunked = False
        self._streams = False
        self._keeps = False
        self._commented = False
        self._over = False
        self.started = False  # the status is out
        self.committed = False
        self.last = False  # close the connection afterwards, so that the client comes back to whoever listens then

    @property
    def response(self) -> web.StreamResponse:
        """What the server needs back. Only after something was sent."""
        if not self.started:
            raise RuntimeError("a request is over and nothing was answered")
        return _KEPT if self._keeps else _LAST

    async def comment(self, text: str) -> None:
        """A progress line, which every SSE client ignores. The first one sends the status and the headers."""
        await self.pass_comment(f": vramp {_one_line(text)}\n\n".encode())

    async def pass_comment(self, data: bytes) -> None:
        """An upstream's own comment, as it came."""
        if not self.started:
            self._begin_events({}, waiting=True)
        self._commented = True
        await self._send(data)

    async def begin_stream(self, headers: Mapping[str, str]) -> None:
        """Send the headers of an event stream, or where comments have gone before, what headers can no longer say."""
        if not self.started:
            self._begin_events(headers)
        elif self._commented:
            self._commented = False
            await self._send(closing_comment(self._outcome))

    async def write(self, data: bytes) -> None:
        """Model output. After it nothing else may be tried."""
        self.committed = True
        await self._send(data)

    def begin_body(self, status: int, headers: Mapping[str, str], length: int | None) -> None:
        """Begin an answer that is no event stream, of so many bytes if that is known."""
        self.committed = True
        self._begin(status, headers, length)

    async def whole(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Answer at once, with a length."""
        self.committed = True
        self._begin(status, headers, len(body))
        if body and self._request.method != hdrs.METH_HEAD:
            self._outcome.bytes_out += len(body)
            self._write(body)
        await self.finish()

    async def finish(self) -> None:
        """End the response. Idempotent."""
        if self._over:
            return
        self._over = True
        if self._chunked:
            self._write(b"0\r\n\r\n")
        elif self._head:
            self._write(b"")
        await self._taken()
        self._watch.lift()

    async def fail(self, error: CallError) -> None:
        """Tell the error in the form that is still possible, and end."""
        self._outcome.error = error.code or error.type
        if not self.started:
            headers = {"content-type": JSON, **error_headers(error)}
            await self.whole(status_for(self._dialect, error), headers, self._envelope(error))
            return
        if self._streams:
            await self._send(event_for(self._dialect, error, self._outcome.request_id))
            await self.finish()
            return
        # Half of a body that has a length or is one JSON: an end that looks regular would be a lie. Cut it off.
        self.abort()

    def abort(self) -> None:
        """Drop the connection with whatever is buffered for it."""
        self._keeps = False
        transport = self._request.transport
        if transport is not None:
            transport.abort()

    def _envelope(self, error: CallError) -> bytes:
        return body_for(self._dialect, error, self._outcome.request_id)

    def _begin_events(self, passed: Mapping[str, str], *, waiting: bool = False) -> None:
        self._streams = True
        self._begin(200, {**STREAM_HEADERS, **passed}, None, waiting=waiting)

    def _begin(self, status: int, passed: Mapping[str, str], length: int | None, *, waiting: bool = False) -> None:
        """Fix the status and the head. Where no length is known, HTTP/1.0 has nothing but the connection's end."""
        request, outcome = self._request, self._outcome
        chunks = request.version >= HttpVersion11
        self.started = True
        outcome.status = status
        self._chunked = length is None and chunks
        said = request.content.exception() is None  # else aiohttp closes: nobody knows where the next request begins
        self._keeps = request.keep_alive and not self.last and said and (length is not None or chunks)
        framing = ""
        if self._chunked:
            framing = "Transfer-Encoding: chunked\r\n"
        elif length is not None and status != HTTPStatus.NO_CONTENT:
            framing = f"Content-Length: {length}\r\n"
        if self._keeps is not chunks:  # the other is what the version says by itself
            framing += f"Connection: {'keep-alive' if self._keeps else 'close'}\r\n"
        head = head_of(status, outcome.headers(passed, waiting=waiting), outcome.rate_limits)
        self._head = f"{head}{framing}{_dates.now()}".encode("utf-8", "surrogateescape")

    async def _send(self, data: bytes) -> None:
        """Send a piece of the body, never an empty one."""
        self._outcome.bytes_out += len(data)
        self._write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        await self._taken()

    def _write(self, framed: bytes) -> None:
        transport = self._request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has left")
        if self._head:
            framed, self._head = self._head + framed, b""
        self._request.writer.output_size += len(framed)  # by which aiohttp knows that an answer has begun
        transport.write(framed)

    async def _taken(self) -> None:
        """Wait until the client's connection takes more."""
        if self._request.protocol.writing_paused:
            self._watch.limit(self._stall_s, ClientStalled)
            await self._request.writer.drain()


def closing_comment(outcome: Outcome) -> bytes:
    """What the headers of a stream could not know yet."""
    known = " ".join(f"{name}={value}" for name, value in outcome.facts().items())
    return f": vramp {_one_line(known)}\n\n".encode()


def error_headers(error: CallError) -> dict[str, str]:
    """The headers that belong to an error of ours."""
    headers = retry_headers(error)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, MethodNotAllowed):
        headers["allow"] = error.allow
    return headers


def _one_line(text: str) -> str:
    return text.replace("\r", " ").replace("\n", " ")
