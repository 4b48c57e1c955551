"""Stand-ins with real sockets or the real interface: an upstream that can misbehave, and a scheduler under the hand."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any

from aiohttp import web

from scheduler.driver import Lease, Refused
from scheduler.model import RefusalCode, Ticket
from tests.patience import PATIENCE_S

Behaviour = Callable[[web.BaseRequest, bytes], Awaitable[web.StreamResponse]]


def chat_answer(text: str = "Hello.", model: str = "m") -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
    }


def chunk(text: str | None, finish: str | None = None) -> bytes:
    delta = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    data = {"id": "c", "object": "chat.completion.chunk", "choices": [choice]}
    return b"data: " + json.dumps(data).encode() + b"\n\n"


USAGE_CHUNK = b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2,"total_tokens":9}}\n\n'
DONE = b"data: [DONE]\n\n"
STREAM = chunk("Hel") + chunk("lo.") + chunk(None, "stop") + USAGE_CHUNK + DONE


class FakeUpstream:
    """A server on a free port. `behave` answers; every request is kept, and every abort by the proxy is seen."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.behave: Behaviour = plain()
        self.arrived = asyncio.Event()
        self.aborted = asyncio.Event()
        self.aborts = 0
        self.written = 0
        self.base_url = ""
        self._server: asyncio.Server | None = None
        self._protocol: web.Server | None = None

    async def __aenter__(self) -> FakeUpstream:
        self._protocol = web.Server(self._handle, handler_cancellation=True)
        self._server = await asyncio.get_running_loop().create_server(self._protocol, "127.0.0.1", 0, ssl=self._tls)
        self.base_url = f"{'https' if self._tls else 'http'}://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        assert self._protocol is not None
        self._server.close()
        await self._protocol.shutdown(0.1)

    @property
    def connections(self) -> int:
        assert self._protocol is not None
        return len(self._protocol.connections)

    @property
    def last_body(self) -> Any:
        return json.loads(self.requests[-1][2])

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        self.requests.append((request.path, {name.lower(): value for name, value in request.headers.items()}, body))
        self.arrived.set()
        try:
            return await self.behave(request, body)
        except (asyncio.CancelledError, ConnectionError) as error:
            self.aborts += 1
            self.aborted.set()
            # Whoever left between two writes left all the same; aiohttp would log it as a fault of the handler.
            raise asyncio.CancelledError from error


def plain(
    body: bytes | None = None, status: int = 200, content_type: str = "application/json", **headers: str
) -> Behaviour:
    async def behave(request: web.BaseRequest, _: bytes) -> web.StreamResponse:
        data = json.dumps(chat_answer()).encode() if body is None else body
        return web.Response(status=status, body=data, headers={"content-type": content_type, **headers})

    return behave


def stream(*pieces: bytes, then: Callable[[web.BaseRequest], Awaitable[object]] | None = None) -> Behaviour:
    """An event stream in these pieces, as separate as the kernel lets them be; `then` runs before the end."""

    async def behave(request: web.BaseRequest, _: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for piece in pieces or (STREAM,):
            await response.write(piece)
            await asyncio.sleep(0)
        if then is not None:
            await then(request)
        return response

    return behave


async def die(request: web.BaseRequest) -> None:
    """What a killed engine looks like from outside."""
    assert request.transport is not None
    request.transport.close()
    await asyncio.sleep(0)
    raise ConnectionResetError("dead")


async def hang(request: web.BaseRequest, _: bytes = b"") -> web.StreamResponse:
    """Never answers; ends only by the proxy's leaving."""
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def until(holds: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    """Return once something that has no event of its own holds; fail after the limit."""
    async with asyncio.timeout(timeout_s):
        while not holds():
            await asyncio.sleep(0.001)


class FakeWaiting:
    """`scheduler.driver.Waiting`, granted or refused by the test."""

    def __init__(self, scheduler: FakeScheduler, ticket: Ticket) -> None:
        self.scheduler = scheduler
        self.ticket = ticket
        self.future: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        self.closed = 0
        self.usage: tuple[int, int] | None = None

    def __enter__(self) -> FakeWaiting:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closed += 1
        self.scheduler.closed.append(self.ticket.id)

    async def granted(self) -> Lease:
        return await asyncio.shield(self.future)

    def used(self, prompt_tokens: int, output_tokens: int) -> None:
        self.usage = prompt_tokens, output_tokens

    async def describe(self) -> str:
        return f"loading {self.ticket.model}, 62 %, 2 before you, about 3 s"

    def grant(self, base_url: str, queue_s: float = 0.0, load_s: float = 0.0) -> None:
        self.future.set_result(Lease("engine-1", base_url, queue_s, load_s))

    def refuse(self, code: RefusalCode, retry_after_s: float | None = None) -> None:
        self.future.set_exception(Refused(code, f"refused: {code.value}", retry_after_s))
        self.future.exception()


class FakeScheduler:
    """Grants at once on `base_url`, refuses with `refusal`, or where neither is set leaves tickets in `waiting`."""

    def __init__(self, base_url: str | None = None) -> None:
        self.base_url = base_url
        self.refusal: tuple[RefusalCode, float | None] | None = None
        self.waiting: list[FakeWaiting] = []
        self.closed: list[int] = []
        self.engine_died = False
        self.submitted = asyncio.Event()
        self._ids = 0

    @property
    def tickets(self) -> list[Ticket]:
        return [each.ticket for each in self.waiting]

    @property
    def all_returned_once(self) -> bool:
        return all(each.closed == 1 for each in self.waiting)

    async def lost(self, engine_id: str) -> bool:
        died, self.engine_died = self.engine_died, False
        return died

    def new_ticket_id(self) -> int:
        self._ids += 1
        return self._ids

    def lease_now(self, ticket: Ticket) -> Lease | None:
        if self.base_url is None or self.refusal is not None:
            return None
        self.lease(ticket)
        return Lease("engine-1", self.base_url, 0.0, 0.0)

    def give_back(self, ticket_id: int, prompt_tokens: int | None = None, output_tokens: int | None = None) -> None:
        lent = next(each for each in self.waiting if each.ticket.id == ticket_id)
        if prompt_tokens is not None and output_tokens is not None:
            lent.used(prompt_tokens, output_tokens)
        lent.__exit__(None, None, None)

    def lease(self, ticket: Ticket) -> FakeWaiting:
        waiting = FakeWaiting(self, ticket)
        self.waiting.append(waiting)
        self.submitted.set()
        if self.refusal is not None:
            waiting.refuse(*self.refusal)
        elif self.base_url is not None:
            waiting.grant(self.base_url)
        return waiting
