"""What an upstream's answer says of itself: its usage, why it ended, whether it is whole, what its error is.

Functions of values, so that both lanes read an answer alike: the relay of `relay.py` and the fast lane of `fast.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from ext.body_scan import read_answer
from ext.sse import EventScanner
from proxy.dialects.call import Call, Dialect
from proxy.dialects.endpoints import WITH_STREAM_OPTIONS
from proxy.dialects.envelope import read_foreign
from proxy.errors import CallError, NotFound, UpstreamFailed
from proxy.observe.outcome import Outcome

TAIL = 4096  # of an answer too large to be held, where its usage is: servers write it last

PASSED = frozenset(
    {"content-type", "content-encoding", "retry-after", "retry-after-ms", "x-should-retry", "request-id"}
)
PASSED_PREFIXES = ("openai-", "x-ratelimit-", "anthropic-ratelimit-")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")  # which aiohttp's parser lets an upstream say, and nobody may
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


def passed_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The upstream's headers that a client may see. The rest are of its connection or of its innards."""
    passed = {}
    for name, value in headers.items():
        lower = name.lower()
        if (lower in PASSED or lower.startswith(PASSED_PREFIXES)) and not _CONTROL.search(value):
            passed[lower] = value
    return passed


def withholds_usage(call: Call) -> bool:
    """Whether the chunk with a stream's usage is kept from the client, who did not ask for it."""
    return call.endpoint.path in WITH_STREAM_OPTIONS and not call.wants_usage


def begun(scanner: EventScanner) -> bool:
    """Whether a stream has said more than comments."""
    return scanner.events > 0 or scanner.oversized


def is_whole(call: Call, scanner: EventScanner) -> bool:
    """Whether the stream said that it is over. Responses streams end with their usage, the others with a reason."""
    told = scanner.done or scanner.finish_reason is not None or scanner.error is not None or scanner.oversized
    return told or (call.endpoint.dialect is Dialect.RESPONSES and scanner.usage is not None)


def record_stream(outcome: Outcome, scanner: EventScanner) -> None:
    """Take what a stream said so far. Never raises."""
    outcome.finish_reason = scanner.finish_reason
    if scanner.error is not None:
        outcome.error = "upstream_error_event"
    for usage in (scanner.first_usage, scanner.usage):  # Anthropic counts its input in the first only
        if usage is not None:
            _record_usage(outcome, usage)


def record_body(outcome: Outcome, body: bytes) -> None:
    """Take what a plain answer says, or the end of one that was too large to hold. Never raises."""
    said = read_answer(body)
    if said is not None:
        prompt, cached, output, outcome.finish_reason = said
        _note(outcome, prompt, cached, output)
        return
    try:
        read = _body.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        tails = _USAGE.findall(body[-TAIL:])
        if tails:
            _record_usage(outcome, tails[-1])
        return
    outcome.finish_reason = read.stop_reason or (read.choices[0].finish_reason if read.choices else None)
    if read.usage is not None:
        _take(outcome, read.usage)


def _record_usage(outcome: Outcome, raw: bytes) -> None:
    try:
        _take(outcome, _usage.decode(raw))
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return  # a server's odd idea of usage costs us a number, not the client its answer


def _take(outcome: Outcome, usage: Usage) -> None:
    details = usage.prompt_tokens_details or usage.input_tokens_details
    cached = details.cached_tokens if details else None
    _note(
        outcome,
        usage.input_tokens if usage.prompt_tokens is None else usage.prompt_tokens,
        usage.cache_read_input_tokens if cached is None else cached,
        usage.output_tokens if usage.completion_tokens is None else usage.completion_tokens,
    )


def _note(outcome: Outcome, prompt: int | None, cached: int | None, output: int | None) -> None:
    """What is not said leaves what was said before."""
    if prompt is not None:
        outcome.prompt_tokens = prompt
    if cached is not None:
        outcome.cached_tokens = cached
    if output is not None:
        outcome.output_tokens = output


def is_like_json(body: bytes) -> bool:
    """Whether it begins as every answer does. A parse would cost more, and refuse the NaN that engines write."""
    return body.startswith((b"{", b"[")) or body.lstrip().startswith((b"{", b"["))


def check_body(call: Call, headers: Mapping[str, str], body: bytes) -> None:
    """Raises `UpstreamFailed` where a whole answer is none that a client could read."""
    if not is_like_json(body) and "content-encoding" not in headers:
        raise UpstreamFailed(f"The engine of '{call.model}' answered with something that is not JSON.")


def refusal_of(
    call: Call, status: int, headers: Mapping[str, str], body: bytes, *, where: str, local: bool
) -> CallError:
    """The upstream's error as one of ours; `headers` are those that pass. A valid envelope is kept, to go untouched."""
    seen = read_foreign(call.endpoint.dialect, body)
    if status in (401, 403) and not local:
        return UpstreamFailed(
            f"Backend {where} refused our API key ({status}): check its api_key.", code="upstream_credentials"
        )
    if status == 404 and not seen.valid and local:
        return NotFound(f"The engine of '{call.model}' has no {call.endpoint.path}.")
    message = seen.message or f"{where} answered {status} without saying why."
    if status < 400 or (status >= 500 and status not in (503, 504) and not seen.valid):
        return UpstreamFailed(message)
    refused = UpstreamRefused(message, status, body if seen.valid else None, headers)
    refused.type = seen.type or ("server_error" if status >= 500 else "invalid_request_error")
    refused.code = seen.code
    return refused
