"""From the upstream's answer to the client, bytes untouched: the event stream, the plain body, the refusal.

Reading and writing alternate in one task: a chunk is written before the next is read, so a slow client pauses its own
upstream and holds no more than two socket buffers and one read buffer of ours.
"""

from __future__ import annotations

from functools import partial

from ext.sse import EventScanner
from proxy.config import TimeoutsConfig
from proxy.dialects.call import Call
from proxy.errors import CallError, UpstreamFailed, UpstreamTimedOut
from proxy.observe.outcome import Outcome
from proxy.providers.base import Broken, Upstream
from proxy.server.answer import EVENT_STREAM, Answer
from proxy.server.record import (
    TAIL,
    begun,
    check_body,
    is_whole,
    passed_headers,
    record_body,
    record_stream,
    refusal_of,
    withholds_usage,
)
from proxy.server.watchdog import Watchdog

# An answer up to this size is read whole before the client sees any of it: until then it can fail over.
WHOLE_BODY = 1 << 20
ERROR_BODY = 64 << 10


def idle_error(timeouts: TimeoutsConfig) -> UpstreamTimedOut:
    """The end of an answer that has gone silent."""
    return UpstreamTimedOut(
        f"The model's server sent nothing for {timeouts.idle_s:g} s ([timeouts] idle_s).", code="upstream_idle"
    )


class Relay:
    """Carries one upstream's answer over. Nothing is kept between attempts but what `Outcome` records."""

    def __init__(self, call: Call, answer: Answer, outcome: Outcome, watch: Watchdog, timeouts: TimeoutsConfig) -> None:
        self._call = call
        self._answer = answer
        self._outcome = outcome
        self._watch = watch
        self._idle_s = timeouts.idle_s
        self._idle_error = partial(idle_error, timeouts)

    async def carry(self, upstream: Upstream, asked_s: float) -> None:
        """Carry a 2xx answer to its end. `asked_s`: when it was asked for. Raises `Broken` or a `CallError`."""
        content_type = upstream.headers.get("content-type", "")
        events = content_type.startswith(EVENT_STREAM) and "content-encoding" not in upstream.headers
        if events:
            await self._carry_events(upstream, asked_s)
        elif self._answer.started:
            raise UpstreamFailed(f"The model's server answered a stream with {content_type or 'no content type'}.")
        else:
            await self._carry_body(upstream, asked_s)

    async def _carry_events(self, upstream: Upstream, asked_s: float) -> None:
        answer = self._answer
        scanner = EventScanner(withhold_usage=withholds_usage(self._call))
        try:
            async for chunk in upstream.chunks():
                events = scanner.feed(chunk)
                if events and not begun(scanner):
                    await answer.pass_comment(events)  # the upstream's sign of life is no output yet
                elif events:
                    if not answer.committed:
                        self._first_byte(asked_s)
                        await answer.begin_stream(passed_headers(upstream.headers))
                    await answer.write(events)
                self._watch.limit(self._idle_s, self._idle_error)
            rest = scanner.flush()
        finally:
            record_stream(self._outcome, scanner)
        if not is_whole(self._call, scanner):
            raise Broken("the stream ended in the middle")
        if rest:
            if not answer.committed:
                self._first_byte(asked_s)
                await answer.begin_stream(passed_headers(upstream.headers))
            await answer.write(rest)
        await answer.finish()

    async def _carry_body(self, upstream: Upstream, asked_s: float) -> None:
        answer, headers = self._answer, passed_headers(upstream.headers)
        if body := upstream.arrived():
            self._first_byte(asked_s)
            await self._whole(upstream.status, headers, body)
            return
        held: list[bytes] = []
        size = 0
        async for chunk in upstream.chunks():
            if size == 0:
                self._first_byte(asked_s)
            size += len(chunk)
            if answer.committed:
                await answer.write(chunk)
                held = [b"".join(held)[-TAIL:], chunk]
            else:
                held.append(chunk)
                if size > WHOLE_BODY:
                    await self._begin_large(upstream, headers, held)
            self._watch.limit(self._idle_s, self._idle_error)
        body = b"".join(held)
        if answer.committed:
            record_body(self._outcome, body)
            await answer.finish()
        else:
            await self._whole(upstream.status, headers, body)

    async def _whole(self, status: int, headers: dict[str, str], body: bytes) -> None:
        check_body(self._call, headers, body)
        record_body(self._outcome, body)
        await self._answer.whole(status, headers, body)

    async def _begin_large(self, upstream: Upstream, headers: dict[str, str], held: list[bytes]) -> None:
        length = upstream.headers.get("content-length")
        self._answer.begin_body(upstream.status, headers, None if length is None else int(length))
        for chunk in held:
            await self._answer.write(chunk)

    def _first_byte(self, asked_s: float) -> None:
        now = self._watch.now()
        self._outcome.upstream_s = now - asked_s
        self._outcome.first_byte_s = now - self._outcome.started_s

    async def refusal(self, upstream: Upstream, *, where: str, local: bool) -> CallError:
        """The upstream's error as one of ours. Its valid envelope is kept to be passed on untouched."""
        body = await _bounded(upstream, ERROR_BODY)
        headers = passed_headers(upstream.headers)
        return refusal_of(self._call, upstream.status, headers, body, where=where, local=local)


async def _bounded(upstream: Upstream, limit: int) -> bytes:
    body = bytearray()
    async for chunk in upstream.chunks():
        body += chunk
        if len(body) > limit:
            return b""  # no error envelope is that large
    return bytes(body)
