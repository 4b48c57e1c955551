"""The client's side of one request: the only writer of its response, which knows what can still be said.

    nothing sent --begin--> headers sent --write--> committed --finish--> over
         |                       ^
         +-------comment---------+   progress comments fix the status at 200; output is still to come

An error is an envelope with its status while nothing is sent, an event of the dialect's after that.
"""

from __future__ import annotations

from collections.abc import Mapping

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
    """What the server is told of an answer that is out already.

    aiohttp's own response takes 20 us to put a head together, which is a tenth of a request on this lane.
    """

    async def prepare(self, request: web.BaseRequest) -> None:
        """It was."""

    async def write_eof(self, data: bytes = b"") -> None:
        """It was."""

    @property
    def keep_alive(self) -> bool:
        """Others are not written this way."""
        return True


class Answer:
    """One response. Every write waits until the client's connection takes more, within the stall limit."""

    __slots__ = (
        "_commented",
        "_dialect",
        "_outcome",
        "_request",
        "_response",
        "_stall_s",
        "_watch",
        "committed",
        "last",
    )

    def __init__(
        self, request: web.BaseRequest, dialect: Dialect, outcome: Outcome, watch: Watchdog, stall_s: float
    ) -> None:
        self._request = request
        self._dialect = dialect
        self._outcome = outcome
        self._watch = watch
        self._stall_s = stall_s
        self._response: web.StreamResponse | None = None
        self._commented = False
        self.committed = False
        self.last = False  # close the connection afterwards, so that the client comes back to whoever listens then

    @property
    def started(self) -> bool:
        """Whether the status is out."""
        return self._response is not None

    @property
    def response(self) -> web.StreamResponse:
        """What the server needs back. Only after something was sent."""
        if self._response is None:
            raise RuntimeError("a request is over and nothing was answered")
        return self._response

    async def comment(self, text: str) -> None:
        """A progress line, which every SSE client ignores. The first one sends the status and the headers."""
        await self.pass_comment(f": vramp {_one_line(text)}\n\n".encode())

    async def pass_comment(self, data: bytes) -> None:
        """An upstream's own comment, as it came."""
        if self._response is None:
            await self._start({}, waiting=True)
        self._commented = True
        await self._send(data)

    async def begin_stream(self, headers: Mapping[str, str]) -> None:
        """Send the headers of an event stream, or where comments have gone before, what headers can no longer say."""
        if self._response is None:
            await self._start(headers)
        elif self._commented:
            self._commented = False
            await self._send(closing_comment(self._outcome))

    async def write(self, data: bytes) -> None:
        """Model output. After it nothing else may be tried."""
        self.committed = True
        await self._send(data)

    async def begin_body(self, status: int, headers: Mapping[str, str]) -> None:
        """Send the headers of an answer that is no event stream."""
        self.committed = True
        self._response = web.StreamResponse(status=status, headers=self._outcome.headers(headers))
        await self._prepare()

    async def whole(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Answer at once, with a length."""
        self.committed = True
        transport = self._request.transport
        if body and transport is not None and self._is_plain():
            self._response = Written(status=status)
            self._outcome.status = status
            self._outcome.bytes_out += len(body)
            head = head_of(status, self._outcome.headers(headers))
            framed = f"{head}Content-Length: {len(body)}\r\n{_dates.now()}".encode("utf-8", "surrogateescape")
            self._watch.limit(self._stall_s, ClientStalled)
            transport.write(framed + body)
            await self._request.writer.drain()
            self._watch.lift()
            return
        self._response = web.Response(status=status, headers=self._outcome.headers(headers), body=body)
        self._outcome.bytes_out += len(body)
        await self._prepare()
        await self.finish()

    def _is_plain(self) -> bool:
        """Whether nothing but a head and a body is to be said: neither an old client nor the end of the connection."""
        request = self._request
        return (
            request.version == HttpVersion11
            and request.keep_alive
            and not self.last
            and request.method != hdrs.METH_HEAD
        )

    async def finish(self) -> None:
        """End the response. Idempotent."""
        self._watch.limit(self._stall_s, ClientStalled)
        await self.response.write_eof()
        self._watch.lift()

    async def fail(self, error: CallError) -> None:
        """Tell the error in the form that is still possible, and end."""
        self._outcome.error = error.code or error.type
        if self._response is None:
            headers = {"content-type": JSON, **error_headers(error)}
            await self.whole(status_for(self._dialect, error), headers, self._envelope(error))
            return
        if self._response.content_type == EVENT_STREAM:
            await self._send(event_for(self._dialect, error, self._outcome.request_id))
            await self.finish()
            return
        # Half of a body that has a length or is one JSON: an end that looks regular would be a lie. Cut it off.
        self.abort()

    def abort(self) -> None:
        """Drop the connection with whatever is buffered for it."""
        transport = self._request.transport
        if transport is not None:
            transport.abort()

    def _envelope(self, error: CallError) -> bytes:
        return body_for(self._dialect, error, self._outcome.request_id)

    async def _start(self, passed: Mapping[str, str], *, waiting: bool = False) -> None:
        headers = self._outcome.headers({**STREAM_HEADERS, **passed}, waiting=waiting)
        self._response = web.StreamResponse(headers=headers)
        await self._prepare()

    async def _prepare(self) -> None:
        response = self.response
        self._outcome.status = response.status
        response.headers["server"] = "vramp"
        if self.last:
            response.force_close()
        await response.prepare(self._request)

    async def _send(self, data: bytes) -> None:
        self._outcome.bytes_out += len(data)
        self._watch.limit(self._stall_s, ClientStalled)
        await self.response.write(data)


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
