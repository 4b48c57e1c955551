"""From bytes to a `Call`: read what deciding needs, and refuse at the door what no engine could answer.

Refusing here costs microseconds; the same 400 from an engine may cost a model load first. Only fields that decide
something are typed. Unknown ones are left to the engine, which knows its own; messages are counted, never decoded.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping
from typing import Annotated

import msgspec

from ext.body_scan import Spans, scan
from proxy.dialects.call import Call, Endpoint
from proxy.dialects.splice import depth_exceeds, refuse_duplicate
from proxy.errors import InvalidRequest
from scheduler.model import LatencyClass

Positive = Annotated[int, msgspec.Meta(ge=1)]
NotNegative = Annotated[int, msgspec.Meta(ge=0)]
BYTES_PER_TOKEN = 4  # of English and code, JSON around it included; only ever an estimate
MOST_SESSION = 128  # characters
PREFIX_BYTES = 1024  # of a body: some 250 tokens, more than a dozen blocks of an engine's prefix cache
SPLICED = ("model", "stream_options", "priority")
_NULL = msgspec.Raw(b"null")


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Body(msgspec.Struct):
    """What every path may say."""

    model: str | None = None
    priority: int | None = None


class _Stream(_Body):
    stream: bool | None = None
    stream_options: _StreamOptions | None = None


class _Chat(_Stream, kw_only=True):
    messages: list[msgspec.Raw]
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    n: Positive | None = None


class _Completion(_Stream):
    prompt: msgspec.Raw = _NULL  # engines know more kinds of it than OpenAI's
    prompt_embeds: msgspec.Raw = _NULL  # vLLM's, in its place
    max_tokens: NotNegative | None = None  # 0 with `echo` scores a prompt
    n: Positive | None = None


class _Responses(_Stream):
    input: msgspec.Raw = _NULL
    previous_response_id: msgspec.Raw = _NULL
    previous_input_messages: msgspec.Raw = _NULL  # vLLM's
    conversation: msgspec.Raw = _NULL
    prompt: msgspec.Raw = _NULL
    instructions: msgspec.Raw = _NULL
    max_output_tokens: Positive | None = None


class _Messages(_Stream, kw_only=True):
    messages: list[msgspec.Raw]
    max_tokens: NotNegative  # Anthropic's API demands it, and so do the engines that speak it, after a load


class _CountTokens(_Body, kw_only=True):
    messages: list[msgspec.Raw]


class _Embeddings(_Body):
    input: str | list[msgspec.Raw] | None = None
    messages: msgspec.Raw = _NULL  # vLLM's, in its place: a chat to embed
    dimensions: Positive | None = None


class _Pairs(_Body):
    """One thing and what it is compared with, under the names that engines have for the two."""

    query: msgspec.Raw = _NULL
    queries: msgspec.Raw = _NULL  # vLLM's, as text_ and data_ are
    text_1: msgspec.Raw = _NULL
    data_1: msgspec.Raw = _NULL
    documents: msgspec.Raw = _NULL
    items: msgspec.Raw = _NULL
    texts: msgspec.Raw = _NULL  # llama.cpp's
    text_2: msgspec.Raw = _NULL
    data_2: msgspec.Raw = _NULL


_SHAPES: dict[str, type[_Body]] = {
    "/v1/chat/completions": _Chat,
    "/v1/completions": _Completion,
    "/v1/responses": _Responses,
    "/v1/messages": _Messages,
    "/v1/messages/count_tokens": _CountTokens,
    "/v1/embeddings": _Embeddings,
    **dict.fromkeys(("/v1/rerank", "/rerank", "/v1/score", "/score"), _Pairs),
}
_ONE = ("query", "queries", "text_1", "data_1")
_OTHERS = ("documents", "items", "texts", "text_2", "data_2")
_RERANKED = (_ONE, _OTHERS)
_SCORED = (("text_1", *_ONE), ("text_2", *_OTHERS))
# What a call must have something in: in one of each row, or it has nothing to ask. The 400 names the first. The
# others stand in for it somewhere, or may one day: to refuse what an engine answers is worse than a load for nothing.
_NEEDED: dict[str, tuple[tuple[str, ...], ...]] = {
    "/v1/chat/completions": (("messages",),),
    "/v1/completions": (("prompt", "prompt_embeds"),),
    "/v1/responses": (
        ("input", "previous_response_id", "previous_input_messages", "conversation", "prompt", "instructions"),
    ),
    "/v1/messages": (("messages",),),
    "/v1/messages/count_tokens": (("messages",),),
    "/v1/embeddings": (("input", "messages"),),
    "/v1/rerank": _RERANKED,
    "/rerank": _RERANKED,
    "/v1/score": _SCORED,
    "/score": _SCORED,
}
# Where null is nothing and an empty list is not: some templates make a prompt of no messages, as that of gpt-oss does.
_LISTS_MAY_BE_EMPTY = frozenset({"/v1/responses"})
_DECODERS = {path: msgspec.json.Decoder(shape) for path, shape in _SHAPES.items()}
_PLAIN = msgspec.json.Decoder(_Body)
_WHERE = re.compile(r" - at `\$\.?(.*)`$")
_MISSING = re.compile(r"missing required field `(\w+)`")


class Defaults(msgspec.Struct, frozen=True):
    """What holds where a call says nothing, and how deep its JSON may nest."""

    model: str | None = None
    latency_class: LatencyClass = LatencyClass.STANDARD
    max_depth: int = 256


_DEFAULTS = Defaults()


def decode(endpoint: Endpoint, headers: Mapping[str, str], body: bytes, defaults: Defaults = _DEFAULTS) -> Call:
    """The call that these bytes are. Raises `InvalidRequest` naming the field. Microseconds for the ordinary body."""
    scanned = scan(body, defaults.max_depth)
    if scanned is not None:
        call = decode_short(endpoint, headers, scanned, len(body), defaults)
    else:
        _check_text(body, defaults.max_depth)
        fields = _read(endpoint, body)
        for name in SPLICED:
            refuse_duplicate(body, name)
        call = _call(endpoint, headers, fields, len(body), defaults)
    call.body = body
    return call


def decode_short(
    endpoint: Endpoint, headers: Mapping[str, str], scanned: tuple[bytes, Spans], size: int, defaults: Defaults
) -> Call:
    """The call of a body of `size` bytes that `ext.body_scan` has been over. The body itself is not in it."""
    call = _call(endpoint, headers, _read(endpoint, scanned[0]), size, defaults)
    call.spans = scanned[1]
    return call


def _call(endpoint: Endpoint, headers: Mapping[str, str], fields: _Body, size: int, defaults: Defaults) -> Call:
    return Call(
        endpoint=endpoint,
        body=b"",
        model=_model(fields.model, defaults.model),
        names_model=bool(fields.model),
        stream=bool(getattr(fields, "stream", None)),
        wants_usage=_wants_usage(fields),
        prompt_tokens_estimate=estimated_tokens(size),
        max_output_tokens=_max_output(fields),
        latency_class=_latency_class(headers.get("x-vramp-class"), defaults.latency_class),
        deadline_ms=_deadline(headers.get("x-vramp-deadline-ms")),
        session=session_of(headers),
        priority=fields.priority,
        lacks=_lacks(endpoint.path, fields),
    )


def _lacks(path: str, fields: _Body) -> str:
    """The member that nothing is in, nor in what could stand in for it; "" where there is none."""
    rows, lists = _NEEDED.get(path, ()), path not in _LISTS_MAY_BE_EMPTY
    return next((row[0] for row in rows if all(_is_empty(getattr(fields, name), lists) for name in row)), "")


def _is_empty(value: msgspec.Raw | list[msgspec.Raw] | str | None, lists: bool) -> bool:
    if not isinstance(value, msgspec.Raw):
        return value is None or value == []  # whether a text is empty the short form does not say
    text = bytes(value)
    return text == b"null" or (lists and text[:1] == b"[" and not text[1:-1].strip())


def session_of(headers: Mapping[str, str]) -> str:
    """What the caller calls its conversation: any text, of which the beginning counts; "" where it says nothing."""
    return headers.get("x-vramp-session", "")[:MOST_SESSION]


def prefix_of(body: bytes) -> int:
    """The same number for bodies that begin alike: a program's system prompt and tools come before what differs. 0
    where there is too little of it to be worth reading once. Half a microsecond."""
    return (zlib.crc32(body[:PREFIX_BYTES]) or 1) if len(body) >= PREFIX_BYTES else 0


def estimated_tokens(size: int) -> int:
    """Prompt tokens of a body of `size` bytes, roughly."""
    return max(1, size // BYTES_PER_TOKEN)


def _check_text(body: bytes, max_depth: int) -> None:
    if not body.isascii():
        try:
            body.decode()
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"The body is not UTF-8: {error.reason} at byte {error.start}.") from None
    if depth_exceeds(body, max_depth):
        raise InvalidRequest(f"The body nests deeper than {max_depth} levels ([limits] max_json_depth).")


def _read(endpoint: Endpoint, body: bytes) -> _Body:
    try:
        return _DECODERS.get(endpoint.path, _PLAIN).decode(body)
    except msgspec.ValidationError as error:
        message, param = _explain(str(error))
        raise InvalidRequest(message, param=param) from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"The body is not JSON: {error}.", code="invalid_json") from None
    except RecursionError:
        raise InvalidRequest("The body nests too deep.") from None


def _explain(problem: str) -> tuple[str, str | None]:
    missing = _MISSING.search(problem)
    if missing is not None:
        return f"Missing required field '{missing[1]}'.", missing[1]
    where = _WHERE.search(problem)
    if where is None or not where[1]:
        return f"The body must be a JSON object: {problem}.", None
    what = problem[: where.start()].replace("`", "")
    return f"Invalid '{where[1]}': {what[0].lower()}{what[1:]}.", where[1]


def _model(asked: str | None, default: str | None) -> str:
    model = asked or default
    if not model:
        raise InvalidRequest("Missing required field 'model': name one of GET /v1/models.", param="model")
    return model


def _wants_usage(fields: _Body) -> bool:
    options: _StreamOptions | None = getattr(fields, "stream_options", None)
    return options is not None and bool(options.include_usage)


def _max_output(fields: _Body) -> int | None:
    for name in ("max_completion_tokens", "max_output_tokens", "max_tokens"):
        value: int | None = getattr(fields, name, None)
        if value is not None:
            return value * (getattr(fields, "n", None) or 1)
    return None


def _latency_class(said: str | None, default: LatencyClass) -> LatencyClass:
    if said is None:
        return default
    try:
        return LatencyClass[said.strip().upper()]
    except KeyError:
        names = ", ".join(each.name.lower() for each in LatencyClass)
        raise InvalidRequest(f"Header x-vramp-class is not one of {names}.", param="x-vramp-class") from None


def _deadline(said: str | None) -> float | None:
    if said is None:
        return None
    try:
        value = float(said)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:  # NaN fails both
        name = "x-vramp-deadline-ms"
        raise InvalidRequest(f"Header {name} is not a positive number of milliseconds.", param=name)
    return value
