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


_NOBODY = _Inner()
_event = msgspec.json.Decoder(_Event)
_inner = msgspec.json.Decoder(_Inner)
_choices = msgspec.json.Decoder(list[_Choice])
_delta = msgspec.json.Decoder(_Delta)


class Details(NamedTuple):
    """What an event holds beside output. `only_usage`: a chat chunk without choices, sent for its usage alone."""

    usage: bytes | None = None
    finish_reason: str | None = None
    error: bytes | None = None
    only_usage: bool = False


def details(payload: bytes) -> Details:
    """Look into one event's JSON; nothing is found in what is not JSON. Never raises for bad input."""
    event = _decode(_event, payload)
    if event is None:
        return Details()
    response = _decode(_inner, event.response) or _NOBODY
    usage = _usage(event, response)
    only_usage = usage is not None and bytes(event.choices).translate(None, b" \t\r\n") == b"[]"
    return Details(usage, _finish_reason(event), _error(event, response, payload), only_usage)


def joined(event: bytes) -> bytes:
    """The data of an event that has several `data` lines: their values with LF between, as the HTML standard has it."""
    lines = [line for line in _LINE_END.split(event) if line == b"data" or line.startswith(b"data:")]
    return b"\n".join(line[5:].removeprefix(b" ") for line in lines)


def _usage(event: _Event, response: _Inner) -> bytes | None:
    message = _decode(_inner, event.message) or _NOBODY
    for raw in (event.usage, event.usage_metadata, response.usage, message.usage):
        if raw and (said := bytes(raw)).startswith(b"{"):
            return said
    return None


def _error(event: _Event, response: _Inner, payload: bytes) -> bytes | None:
    for raw in (event.error, response.error):
        if raw and (said := bytes(raw)).startswith((b"{", b'"')) and said != b'""':
            return said
    return payload if event.type and bytes(event.type) == b'"error"' else None


def _finish_reason(event: _Event) -> str | None:
    for choice in _decode(_choices, event.choices) or _decode(_choices, event.candidates) or ():
        if choice.finish_reason or choice.gemini_reason:
            return choice.finish_reason or choice.gemini_reason
    delta = _decode(_delta, event.delta)
    return delta.stop_reason if delta else None


def _decode(decoder: msgspec.json.Decoder[_T], raw: bytes | msgspec.Raw) -> _T | None:
    try:
        return decoder.decode(raw) if raw else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
