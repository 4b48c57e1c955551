"""Errors in the caller's language: as a body before the first byte, as an event of the stream after it.

Clients branch on status, `type` and `code`, and the SDKs read `retry-after`, `retry-after-ms` and `x-should-retry`
before they try again on their own.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import orjson

from proxy.dialects.call import Dialect
from proxy.errors import CallError

# Anthropic names its errors by status. 529 is its own word for "overloaded", and its SDK treats it so.
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def anthropic_type(status: int) -> str:
    """The `type` of an Anthropic error with this status."""
    return _ANTHROPIC_TYPES.get(status, "invalid_request_error" if 400 <= status < 500 else "api_error")


def status_for(dialect: Dialect, error: CallError) -> int:
    """The status to answer with: the error's own, but for Anthropic's 529."""
    return 529 if dialect is Dialect.ANTHROPIC and error.status == 503 else error.status


def body_for(dialect: Dialect, error: CallError, request_id: str) -> bytes:
    """The envelope as JSON."""
    if dialect is Dialect.ANTHROPIC:
        inner = {"type": anthropic_type(error.status), "message": error.message}
        return orjson.dumps({"type": "error", "error": inner, "request_id": request_id})
    fields = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return orjson.dumps({"error": fields})


def event_for(dialect: Dialect, error: CallError, request_id: str) -> bytes:
    """The error as the last event of a stream. Chat streams then end without `[DONE]`: nothing was completed."""
    if dialect is Dialect.RESPONSES:
        fields = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
        return b"event: error\ndata: " + orjson.dumps(fields) + b"\n\n"
    prefix = b"event: error\ndata: " if dialect is Dialect.ANTHROPIC else b"data: "
    return prefix + body_for(dialect, error, request_id) + b"\n\n"


def retry_headers(error: CallError) -> dict[str, str]:
    """What tells an SDK whether and when to try again. A 4xx of ours will be the same next time, so it says no."""
    if error.retry_after_s is not None:
        seconds = max(error.retry_after_s, 0.0)
        return {
            "retry-after": str(max(1, math.ceil(seconds))),
            "retry-after-ms": str(max(1, math.ceil(seconds * 1000))),
            "x-should-retry": "true",
        }
    return {"x-should-retry": "false"} if 400 <= error.status < 500 and error.status != 429 else {}


class _OpenAIError(msgspec.Struct):
    message: str
    type: str | None = None
    param: Any = None
    code: str | int | None = None


class _OpenAIEnvelope(msgspec.Struct):
    error: _OpenAIError


class _AnthropicError(msgspec.Struct):
    type: str
    message: str


class _AnthropicEnvelope(msgspec.Struct):
    type: str
    error: _AnthropicError


class _LooseBody(msgspec.Struct):
    """What servers that follow no dialect put into an error body: FastAPI's `detail`, a bare `error` or `message`."""

    detail: Any = None
    error: Any = None
    message: Any = None


_openai = msgspec.json.Decoder(_OpenAIEnvelope)
_anthropic = msgspec.json.Decoder(_AnthropicEnvelope)
_loose = msgspec.json.Decoder(_LooseBody)
_keys = msgspec.json.Decoder(dict[str, dict[str, msgspec.Raw]])


class Foreign(msgspec.Struct, frozen=True):
    """What could be read of another server's error body. `valid`: it is whole in the dialect and may pass untouched."""

    valid: bool
    message: str | None = None
    type: str | None = None
    code: str | None = None


def read_foreign(dialect: Dialect, body: bytes) -> Foreign:
    """Read an upstream's error body. Never raises: HTML, nothing and garbage are a `Foreign` that knows nothing."""
    try:
        if dialect is Dialect.ANTHROPIC:
            envelope = _anthropic.decode(body)
            return Foreign(envelope.type == "error", envelope.error.message, envelope.error.type)
        error = _openai.decode(body).error
        whole = {"message", "type", "param", "code"} <= _keys.decode(body)["error"].keys()
        return Foreign(whole, error.message, error.type, None if error.code is None else str(error.code))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Foreign(False, _loose_message(body))


def _loose_message(body: bytes) -> str | None:
    try:
        loose = _loose.decode(body)
        for value in (loose.detail, loose.error, loose.message):
            if value is not None:
                return _words(value)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    return None


def _words(value: Any) -> str:
    if isinstance(value, dict) and isinstance(value.get("message"), str):
        return str(value["message"])
    return value if isinstance(value, str) else orjson.dumps(value).decode()[:500]
