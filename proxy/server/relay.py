"""From the upstream's answer to the client, bytes untouched: the event stream, the plain body, the refusal.

Reading and writing alternate in one task: a chunk is written before the next is read, so a slow client pauses its own
upstream and holds no more than two socket buffers and one read buffer of ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from ext.sse import EventScanner
from proxy.config import TimeoutsConfig
from proxy.dialects.call import Call, Dialect
from proxy.dialects.endpoints import WITH_STREAM_OPTIONS
from proxy.dialects.envelope import read_foreign
from proxy.errors import CallError, NotFound, UpstreamFailed, UpstreamTimedOut
from proxy.observe.outcome import Outcome
from proxy.providers.base import Broken, Upstream
from proxy.server.answer import EVENT_STREAM, Answer
from proxy.server.watchdog import Watchdog

# An answer up to this size is read whole before the client sees any of it: until then it can fail over.
WHOLE_BODY = 1 << 20
ERROR_BODY = 64 << 10
TAIL = 4096  # of a larger answer, where its usage is: servers write it last

_PASSED = frozenset(
    {"content-type", "content-encoding", "retry-after", "retry-after-ms", "x-should-retry", "request-id"}
)
_PASSED_PREFIXES = ("openai-", "x-ratelimit-", "anthropic-ratelimit-")
_USAGE = re.compile(rb'"usage"\s*+:\s*+(\{[^{}]*+(?:\{[^{}]*+\}[^{}]*+)*+\})')


class UpstreamRefused(CallError):
    """The upstream's own error. `raw` is its body where that is a whole envelope of the caller's dialect."""

    def __init__(self, message: str, status: int, raw: bytes | None, headers: Mapping[str, str]) -> None:
        super().__init__(message, status=status)
        self.raw = raw
        self.headers = headers


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """Token counts in any of the dialects' words."""

    prompt_tokens: int | None = None
    input_tokens: int | None = None
    completion_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None
    input_tokens_details: _PromptDetails | None = None
    cache_read_input_tokens: int | None = None


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _Body(msgspec.Struct):
    usage: Usage | None = None
    choices: list[_Choice] | None = None
    stop_reason: str | None = None


_usage = msgspec.json.Decoder(Usage)
_body = msgspec.json.Decoder(_Body)


def passed_headers(upstream: Upstream) -> dict[str, str]:
    """The upstream's headers that a client may see. The rest are of its connection or of its innards."""
    return {
        name: value
        for name, value in ((name.lower(), value) for name, value in upstream.headers.items())
        if name in _PASSED or name.startswith(_PASSED_PREFIXES)
    }


class Relay:
    """Carries one upstream's answer over. Nothing is kept between attempts but what `Outcome` records."""

    def __init__(self, call: Call, answer: Answer, outcome: Outcome, watch: Watchdog, timeouts: TimeoutsConfig) -> None:
        self._call = call
        self._answer = answer
        self._outcome = outcome
        self._watch = watch
        self._idle_s = timeouts.idle_s
        self._idle_error = UpstreamTimedOut(
            f"The model's server sent nothing for {timeouts.idle_s:g} s ([timeouts] idle_s).", code="upstream_idle"
        )

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
        scanner = EventScanner(withhold_usage=self._withholds_usage())
        try:
            async for chunk in upstream.chunks():
                events = scanner.feed(chunk)
                if events and not scanner.events:
                    await answer.pass_comment(events)  # the upstream's sign of life is no output yet
                elif events:
                    if not answer.committed:
                        self._first_byte(asked_s)
                        await answer.begin_stream(passed_headers(upstream))
                    await answer.write(events)
                self._watch.limit(self._idle_s, self._idle_error)
            rest = scanner.flush()
        finally:
            self._record_stream(scanner)
        if not self._complete(scanner):
            raise Broken("the stream ended in the middle")
        if rest:
            await answer.write(rest)
        await answer.finish()

    def _withholds_usage(self) -> bool:
        return self._call.endpoint.path in WITH_STREAM_OPTIONS and not self._call.wants_usage

    def _complete(self, scanner: EventScanner) -> bool:
        """Whether the stream said that it is over. Responses streams end with their usage, the others with a reason."""
        told = scanner.done or scanner.finish_reason is not None or scanner.error is not None or scanner.oversized
        return told or (self._call.endpoint.dialect is Dialect.RESPONSES and scanner.usage is not None)

    def _record_stream(self, scanner: EventScanner) -> None:
        self._outcome.finish_reason = scanner.finish_reason
        if scanner.error is not None:
            self._outcome.error = "upstream_error_event"
        for usage in (scanner.first_usage, scanner.usage):  # Anthropic counts its input in the first only
            if usage is not None:
                self._record_usage(usage)

    async def _carry_body(self, upstream: Upstream, asked_s: float) -> None:
        answer, headers = self._answer, passed_headers(upstream)
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
        if not answer.committed and not _like_json(body) and "content-encoding" not in headers:
            raise UpstreamFailed(f"The engine of '{self._call.model}' answered with something that is not JSON.")
        self._record_body(body)
        if answer.committed:
            await answer.finish()
        else:
            await answer.whole(upstream.status, headers, body)

    async def _begin_large(self, upstream: Upstream, headers: dict[str, str], held: list[bytes]) -> None:
        length = upstream.headers.get("content-length")
        await self._answer.begin_body(upstream.status, headers | ({"content-length": length} if length else {}))
        for chunk in held:
            await self._answer.write(chunk)

    def _first_byte(self, asked_s: float) -> None:
        now = self._watch.now()
        self._outcome.upstream_s = now - asked_s
        self._outcome.first_byte_s = now - self._outcome.started_s

    def _record_body(self, body: bytes) -> None:
        try:
            read = _body.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            tails = _USAGE.findall(body[-TAIL:])
            if tails:
                self._record_usage(tails[-1])
            return
        self._outcome.finish_reason = read.stop_reason or (read.choices[0].finish_reason if read.choices else None)
        if read.usage is not None:
            self._take(read.usage)

    def _record_usage(self, raw: bytes) -> None:
        try:
            self._take(_usage.decode(raw))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return  # a server's odd idea of usage costs us a number, not the client its answer

    def _take(self, usage: Usage) -> None:
        outcome = self._outcome
        outcome.prompt_tokens = _first(usage.prompt_tokens, usage.input_tokens, outcome.prompt_tokens)
        outcome.output_tokens = _first(usage.completion_tokens, usage.output_tokens, outcome.output_tokens)
        details = usage.prompt_tokens_details or usage.input_tokens_details
        cached = details.cached_tokens if details else None
        outcome.cached_tokens = _first(cached, usage.cache_read_input_tokens, outcome.cached_tokens)

    async def refusal(self, upstream: Upstream, *, where: str, local: bool) -> CallError:
        """The upstream's error as one of ours. Its valid envelope is kept to be passed on untouched."""
        body = await _bounded(upstream, ERROR_BODY)
        status = upstream.status
        seen = read_foreign(self._call.endpoint.dialect, body)
        if status in (401, 403) and not local:
            return UpstreamFailed(
                f"Backend {where} refused our API key ({status}): check its api_key.", code="upstream_credentials"
            )
        if status == 404 and not seen.valid and local:
            return NotFound(f"The engine of '{self._call.model}' has no {self._call.endpoint.path}.")
        message = seen.message or f"{where} answered {status} without saying why."
        if status < 400 or (status >= 500 and status not in (503, 504) and not seen.valid):
            return UpstreamFailed(message)
        refused = UpstreamRefused(message, status, body if seen.valid else None, passed_headers(upstream))
        refused.type = seen.type or ("server_error" if status >= 500 else "invalid_request_error")
        refused.code = seen.code
        return refused


def _like_json(body: bytes) -> bool:
    """Whether it begins as every answer does. A parse would cost more, and refuse the NaN that engines write."""
    return body.lstrip()[:1] in (b"{", b"[")


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


async def _bounded(upstream: Upstream, limit: int) -> bytes:
    body = bytearray()
    async for chunk in upstream.chunks():
        body += chunk
        if len(body) > limit:
            return b""  # no error envelope is that large
    return bytes(body)
