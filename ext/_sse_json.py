"""What the event scanner wants from the JSON of the few events that are not ordinary. Shared by both twins.

The scanner calls this only when the bytes say that a usage object, a finish reason or an error is there, about twice
per stream. Fields stay raw bytes: who bills reads them exactly as they were sent.
"""

from __future__ import annotations

import re
from typing import NamedTuple, TypeVar

import msgspec

_T = TypeVar("_T")
_LINE_END = re.compile(rb"\r\n|\r|\n")
_NOTHING = msgspec.Raw(b"")


class _Inner(msgspec.Struct):
    usage: msgspec.Raw = _NOTHING
    error: msgspec.Raw = _NOTHING


class _Event(msgspec.Struct):
    """The members that chat chunks, Anthropic, Responses and Gemini events have where they have them."""

    type: msgspec.Raw = _NOTHING
    choices: msgspec.Raw = _NOTHING
    candidates: msgspec.Raw = _NOTHING
    usage: msgspec.Raw = _NOTHING
    usage_metadata: msgspec.Raw = msgspec.field(default=_NOTHING, name="usageMetadata")
    error: msgspec.Raw = _NOTHING
    delta: msgspec.Raw = _NOTHING
    response: msgspec.Raw = _NOTHING  # Responses: response.completed, response.failed
    message: msgspec.Raw = _NOTHING  # Anthropic: message_start


class _Choice(msgspec.Struct):
    finish_reason: str | None = None
    gemini_reason: str | None = msgspec.field(default=None, name="finishReason")


class _Delta(msgspec.Struct):
    stop_reason: str | None = None


class Details(NamedTuple):
    """What an event holds beside output. `only_usage`: a chat chunk without choices, sent for its usage alone."""

    usage: bytes | None = None
    finish_reason: str | None = None
    error: bytes | None = None
    only_usage: bool = False


def details(payload: bytes) -> Details:
    """Look into one event's JSON; nothing is found in what is not JSON. Never raises for bad input."""
    event = _decode(payload, _Event)
    if event is None:
        return Details()
    usage = _usage(event)
    empty = bytes(event.choices).translate(None, b" \t\r\n") == b"[]"
    return Details(usage, _finish_reason(event), _error(event, payload), only_usage=usage is not None and empty)


def joined(event: bytes) -> bytes:
    """The data of an event that has several `data` lines: their values with LF between, as the HTML standard has it."""
    lines = [line for line in _LINE_END.split(event) if line == b"data" or line.startswith(b"data:")]
    return b"\n".join(line[5:].removeprefix(b" ") for line in lines)


def _usage(event: _Event) -> bytes | None:
    inner = _decode(event.response, _Inner) or _decode(event.message, _Inner) or _Inner()
    for raw in (event.usage, event.usage_metadata, inner.usage):
        if bytes(raw).startswith(b"{"):
            return bytes(raw)
    return None


def _error(event: _Event, payload: bytes) -> bytes | None:
    inner = _decode(event.response, _Inner) or _Inner()
    for raw in (event.error, inner.error):
        if bytes(raw).startswith((b"{", b'"')) and bytes(raw) != b'""':
            return bytes(raw)
    return payload if bytes(event.type) == b'"error"' else None


def _finish_reason(event: _Event) -> str | None:
    choices = _decode(event.choices, list[_Choice]) or _decode(event.candidates, list[_Choice]) or []
    for choice in choices:
        if choice.finish_reason or choice.gemini_reason:
            return choice.finish_reason or choice.gemini_reason
    delta = _decode(event.delta, _Delta)
    return delta.stop_reason if delta else None


def _decode(raw: bytes | msgspec.Raw, shape: type[_T]) -> _T | None:
    try:
        return msgspec.json.decode(raw, type=shape) if raw else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
