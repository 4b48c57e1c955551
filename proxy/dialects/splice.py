"""The three places where a body's bytes may change: `model`, `stream_options` and `priority`, at the top level.

Everything else stays as the client wrote it, so nothing can be re-serialised wrongly (floats, key order, escapes,
numbers beyond 64 bits) and prefix caches upstream see the bytes they saw before. The body has been decoded before it
comes here: it is one JSON object, in UTF-8, of bounded depth. That is why a search with regular expressions may stand
in for a parser; it is linear in the body (possessive quantifiers never step back).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import accumulate, islice

import msgspec
import orjson

from proxy.errors import InvalidRequest

# A string without an end reaches to the end of the body: failing there instead would make every later quote start over.
_TEXT = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)'
_STRING = re.compile(_TEXT, re.DOTALL)
_TOKEN = re.compile(_TEXT + rb"|[\[\]{},]", re.DOTALL)
_COLON = re.compile(rb"[ \t\r\n]*+:[ \t\r\n]*+")
_SCALAR = re.compile(rb"[^ \t\r\n,}\]]++")
_SPACE = re.compile(rb"[ \t\r\n]*+")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_DEPTH_STEP = bytes.maketrans(b"[{]}", b"\2\2\0\0")

# Keys can hide behind escapes; ours are of lower-case letters and "_", U+005F to U+0079.
_ESCAPED = re.compile(rb"\\u00[567]")

Span = tuple[int, int]

_BACKSLASH = ord("\\")


def depth_exceeds(body: bytes, limit: int) -> bool:
    """Whether brackets nest deeper than `limit`. Free for the ordinary body, which has fewer brackets than that."""
    if body.count(b"[") + body.count(b"{") <= limit:
        return False
    brackets = _STRING.sub(b"", body).translate(_DEPTH_STEP, _NOT_BRACKETS)
    return max(accumulate(step - 1 for step in brackets), default=0) > limit


class _Top(msgspec.Struct):
    model: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    stream_options: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    priority: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_top = msgspec.json.Decoder(_Top)


def refuse_duplicate(body: bytes, name: str) -> None:
    """Raises `InvalidRequest` when the top-level key `name` is there twice.

    Parsers differ on which of two wins: what says two things is refused before anything is decided on it.
    """
    if len(list(islice(_plain_values(body, name), 2))) > 1 or _may_hide_keys(body):
        _walk(body, name)


def value_span(body: bytes, name: str) -> Span | None:
    """Where the value of the top-level key `name` lies, None if the key is absent. Raises as `refuse_duplicate`.

    Fast when the key is there, is written plainly once in the whole body and no key can be written with escapes:
    then that one place is it. Otherwise the tokens of the body are walked once.
    """
    if getattr(_top.decode(body), name) is msgspec.UNSET:
        return None
    places = list(islice(_plain_values(body, name), 2))
    if len(places) != 1 or _may_hide_keys(body):
        return _walk(body, name)
    return places[0], _value_end(body, places[0])


def _plain_values(body: bytes, name: str) -> Iterator[int]:
    """Where a value begins whose key is plainly written `name`, at any depth. Escaped quotes are inside of a string.

    `find` skips what is no key at a tenth of what a regular expression takes, which looks at every byte.
    """
    key = b'"%s"' % name.encode()
    at = body.find(key)
    while at >= 0:
        colon = _COLON.match(body, at + len(key))
        if colon is not None and not (at and body[at - 1] == _BACKSLASH):
            yield colon.end()
        at = body.find(key, at + len(key) - 1)  # the closing quote may open the next


def _may_hide_keys(body: bytes) -> bool:
    """Whether some string writes letters of ours as escapes."""
    return b"\\u00" in body and _ESCAPED.search(body) is not None


def _must(match: re.Match[bytes] | None) -> re.Match[bytes]:
    """Decoding came before, so a miss is a bug of ours; it must not become a wrong splice."""
    if match is None:
        raise RuntimeError("splicing something that is not JSON")
    return match


def _value_end(body: bytes, start: int) -> int:
    opener = body[start : start + 1]
    if opener in (b"{", b"["):
        return _nested_end(body, start)
    return _must((_STRING if opener == b'"' else _SCALAR).match(body, start)).end()


def _nested_end(body: bytes, start: int) -> int:
    depth = 0
    for token in _TOKEN.finditer(body, start):
        mark = token.group()
        if mark in (b"{", b"["):
            depth += 1
        elif mark in (b"}", b"]"):
            depth -= 1
            if not depth:
                return token.end()
    raise RuntimeError("splicing something that is not JSON")


def _walk(body: bytes, name: str) -> Span | None:
    found: Span | None = None
    depth, key_next = 0, True
    for token in _TOKEN.finditer(body):
        mark = token.group()
        if mark in (b"{", b"["):
            depth += 1
        elif mark in (b"}", b"]"):
            depth -= 1
        elif depth == 1 and mark == b",":
            key_next = True
        elif depth == 1 and key_next:
            key_next = False
            if msgspec.json.decode(mark) == name:
                if found is not None:
                    raise InvalidRequest(f"'{name}' is given twice; give it once.", param=name, code="duplicate_field")
                start = _must(_COLON.match(body, token.end())).end()
                found = start, _value_end(body, start)
    return found


def edits_of(spans: Mapping[str, Span], changes: Mapping[str, bytes]) -> list[tuple[int, int, bytes]]:
    """(start, end, new bytes), in order, that replace these top-level values, or put them in front where the key is
    absent. `spans` are those of `ext.body_scan`.
    """
    edits = [(*spans[name], value) for name, value in changes.items() if name in spans]
    added = [orjson.dumps(name) + b":" + value for name, value in changes.items() if name not in spans]
    if added:
        edits.append((*spans[""], b",".join(added) + b","))  # a scanned object is never empty
    edits.sort()
    return edits


def splice(body: bytes, changes: dict[str, bytes], spans: Mapping[str, Span] | None = None) -> bytes:
    """The body with these top-level values (JSON) replaced, or put in front where the key is absent.

    `spans`: where they lie, if a scan found that already.
    """
    if not changes:
        return body
    if spans is not None:
        return _edited(body, edits_of(spans, changes))
    edits: list[tuple[int, int, bytes]] = []
    added: list[bytes] = []
    for name, value in changes.items():
        span = value_span(body, name)
        if span is None:
            added.append(orjson.dumps(name) + b":" + value)
        else:
            edits.append((*span, value))
    if added:
        edits.append(_insertion(body, added))
    return _edited(body, sorted(edits))


def _edited(body: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    for start, end, value in reversed(edits):
        body = body[:start] + value + body[end:]
    return body


def _insertion(body: bytes, added: list[bytes]) -> tuple[int, int, bytes]:
    at = body.index(b"{") + 1
    after_space = _must(_SPACE.match(body, at)).end()
    empty = body[after_space : after_space + 1] == b"}"
    return at, at, b",".join(added) + (b"" if empty else b",")
