"""What every request to the public listener goes through: opened, answered by something, settled once."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from random import getrandbits  # an id is no secret, and the system's own randomness costs a call into the kernel
from typing import Protocol, cast

import msgspec
import orjson
from aiohttp import web

from ext.occupancy import Occupancy
from proxy.accounting.usage import UsageLog
from proxy.catalog.catalog import Deployment
from proxy.config import TimeoutsConfig
from proxy.dialects.call import Dialect
from proxy.dialects.endpoints import dialect_of
from proxy.dialects.envelope import body_for
from proxy.errors import CallError, HeadersTooLarge, NotFound, Unavailable, UpstreamTimedOut
from proxy.gate import limits
from proxy.observe.access_log import AccessLog
from proxy.observe.metrics import Metrics
from proxy.observe.outcome import Outcome
from proxy.server import routes
from proxy.server.answer import JSON, Answer, ClientStalled
from proxy.server.journey import Journey, Leases
from proxy.server.routes import Route
from proxy.server.state import State
from proxy.server.watchdog import Watch, Watchdog

log = logging.getLogger("vramp.server")

LEFT = 499  # nginx's number for a client that closed first; it is logged, never sent
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Handler:
    """The request handler of the server.

    `state`, `draining` and `leaving` are changed by the methods only: whoever goes by them without looking each time is
    told by `on_change`.
    """

    def __init__(
        self,
        state: State,
        leases: Leases,
        metrics: Metrics,
        access_log: AccessLog,
        usage: UsageLog,
        *,
        residency: Callable[[Deployment], str],
    ) -> None:
        self.state = state
        self.draining = False
        self.leaving = False  # another proxy has the listeners: every connection ends with its next answer
        self._loop = asyncio.get_running_loop()  # kept, for asking costs a system call (Python 3.11)
        self.leases = leases
        self.metrics = metrics
        self.access_log = access_log
        self.usage = usage
        self._residency = residency
        self._created = int(time.time())
        self.flying = Occupancy()  # the requests that are being answered
        self.on_change: Callable[[], None] = lambda: None  # the fast lane sets it
        self._watch = Watch(self._loop)
        self._idle = asyncio.Event()
        metrics.in_flight = lambda: self.flying.taken
        usage.on_full = self._is_full

    @property
    def in_flight(self) -> int:
        """Requests that are being answered."""
        return self.flying.taken

    @property
    def ready(self) -> bool:
        """Whether new requests are welcome: what /readyz says on both listeners."""
        return not self.draining and not self.usage.full

    def configure(self, state: State) -> None:
        """New requests go by this."""
        self.state = state
        self.on_change()

    def drain(self) -> None:
        """New requests are refused from now on."""
        self.draining = True
        self.on_change()

    def leave(self) -> None:
        """Another process has the listeners: every connection ends with its next answer."""
        self.leaving = True
        self.on_change()

    def _is_full(self) -> None:
        self.on_change()

    async def until_idle(self) -> None:
        """Return when no request is in flight."""
        if self.flying.taken:
            self._idle.clear()
            self.flying.on_give = self._ended
            await self._idle.wait()

    def _ended(self) -> None:
        if not self.flying.taken:
            self.flying.on_give = None
            self._idle.set()

    def cut_off(self) -> None:
        """End every request in flight with an error that its client can read."""
        self._watch.expire(cut_off_error)

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request and settle it, however it ends."""
        tried = taken_over(request)
        if tried is None:
            outcome = open_outcome(
                request.headers, request.method, request.path, request.remote or "", self._loop.time()
            )
            self.begin()
        else:
            outcome = tried.outcome
        try:
            return await self._answered(request, outcome, tried.failure if tried else None)
        except ClientStalled:
            outcome.status, outcome.error = LEFT, "client_stalled"
            if request.transport is not None:
                request.transport.abort()  # close() would wait for a buffer that nobody takes
            raise ConnectionResetError("the client takes nothing") from None
        except (asyncio.CancelledError, ConnectionError):
            outcome.status, outcome.error = LEFT, outcome.error or "client_left"
            raise
        finally:
            self.end(outcome, self._loop.time())

    def begin(self) -> None:
        """A request is in flight. `end` follows, exactly once."""
        self.flying.take()

    def end(self, outcome: Outcome, now: float) -> None:
        """Settle a request, however it ended."""
        outcome.duration_s = now - outcome.started_s
        limits.settle(outcome, now)
        self.flying.give()
        self.metrics.finished(outcome)
        self.access_log.write(outcome)
        self.usage.write(outcome)

    async def _answered(
        self, request: web.BaseRequest, outcome: Outcome, tried: Exception | None
    ) -> web.StreamResponse:
        timeouts = self.state.config.timeouts
        watch = Watchdog(timeouts.total_s, partial(total_error, timeouts), self._loop, lazy=True)
        answer = Answer(request, dialect_of(request.path), outcome, watch, timeouts.write_stall_s)
        answer.last = self.draining or self.leaving
        tell = answer.fail
        self._watch.add(watch)
        try:
            with watch:
                route = self._admit(request)
                if route.endpoint is None or request.method == "OPTIONS":
                    await self._page(request, route, answer)
                else:
                    journey = Journey(self.state, self.leases, request, route.endpoint, answer, outcome, watch, tried)
                    tell = journey.fail
                    await journey.run()
        except CallError as error:
            with watch:
                await tell(error)
        except (asyncio.CancelledError, ConnectionError, ClientStalled):
            raise
        except Exception:
            log.exception("request %s failed in us", outcome.request_id)
            with watch:
                await answer.fail(CallError("An error of vramp itself; its log has the request id.", code="internal"))
        finally:
            self._watch.discard(watch)
        return answer.response

    def _admit(self, request: web.BaseRequest) -> Route:
        lines = request.raw_headers
        if sum(map(len, chain.from_iterable(lines))) + 4 * len(lines) > self.state.max_header:
            raise HeadersTooLarge(f"The headers are larger than {self.state.max_header} bytes ([limits] max_header).")
        route = routes.find(request.method, request.path)
        if route.endpoint is not None and not self.ready:
            if self.usage.full:
                raise self.usage.refusal()
            raise Unavailable("vramp is stopping or not up yet.", code="stopping", retry_after_s=1.0)
        return route

    async def _page(self, request: web.BaseRequest, route: Route, answer: Answer) -> None:
        if request.method == "OPTIONS":
            await answer.whole(204, {"allow": route.allow}, b"")
        elif route.page == routes.MODELS:
            self.state.keys.authenticate(request.headers)
            await answer.whole(200, {"content-type": JSON}, orjson.dumps(self._models(route.rest)))
        elif route.page == routes.READY and not self.ready:
            await answer.whole(503, {"content-type": "text/plain"}, b"stopping or not up yet\n")
        else:
            await answer.whole(200, {"content-type": "text/plain"}, b"ok\n")

    def _models(self, model_id: str) -> dict[str, object]:
        catalog = self.state.catalog
        if not model_id:
            entries = [catalog.entry(each, self._created, self._residency) for each in catalog.ids]
            return {"object": "list", "data": entries}
        entry = catalog.entry(model_id, self._created, self._residency)
        if entry is None:
            raise NotFound(f"There is no model '{model_id[:100]}'.", param="model", code="model_not_found")
        return entry

    def malformed(self, request: web.BaseRequest, error: CallError) -> web.Response:
        """The answer to bytes that are no HTTP request of ours; it has no path, so it wears OpenAI's envelope."""
        outcome = open_outcome(request.headers, request.method, request.path, request.remote or "", self._loop.time())
        outcome.status, outcome.error = error.status, error.code or error.type
        self.metrics.finished(outcome)
        self.access_log.write(outcome)
        headers = outcome.headers({"content-type": JSON, "server": "vramp"})
        body = body_for(Dialect.OPENAI, error, outcome.request_id)
        return web.Response(status=error.status, headers=headers, body=body)


class Tried(msgspec.Struct, frozen=True):
    """A request that the fast lane began, and how its first attempt failed. It is in flight already."""

    outcome: Outcome
    failure: Exception


class Handed(msgspec.Struct, frozen=True):
    """A connection that the fast lane hands over, of a client at `remote`, with what was `read` of it.

    If that is one whole request and nothing else, the lane takes the connection back (`take_back`) with the next.
    `refusal`: what was read is no request, for this reason.
    """

    read: bytes
    tried: Tried | None
    remote: str
    take_back: Callable[[socket.socket, bytes, str], None] | None
    refusal: CallError | None = None


class TakesOver(Protocol):
    """A connection that came from the fast lane."""

    tried: Tried | None


def taken_over(request: web.BaseRequest) -> Tried | None:
    """What the fast lane left of this request; once, for it is of a connection's first request only."""
    connection = cast("TakesOver | None", request.protocol)
    if connection is None:
        return None
    tried, connection.tried = connection.tried, None
    return tried


def given_request_id(headers: Mapping[str, str]) -> str | None:
    """The client's own id where it is harmless."""
    given = headers.get("x-request-id")
    return given if given and _SANE_ID.fullmatch(given) else None


def new_request_id() -> str:
    """An id for a request that came without one."""
    return f"req-{getrandbits(96):024x}"


def open_outcome(headers: Mapping[str, str], method: str, path: str, remote: str, now: float) -> Outcome:
    """The record of a request that begins now (loop time)."""
    return Outcome(
        request_id=given_request_id(headers) or new_request_id(),
        method=method,
        path=path,
        started_s=now,
        remote=remote,
    )


def total_error(timeouts: TimeoutsConfig) -> UpstreamTimedOut:
    """The end of a request that takes too long, whatever it waits for."""
    return UpstreamTimedOut(f"The request took longer than {timeouts.total_s:g} s ([timeouts] total_s).")


def cut_off_error() -> Unavailable:
    """The end of a request that a stop does not wait for."""
    return Unavailable("vramp is stopping; the request was cut off.", code="stopping", retry_after_s=1.0)
