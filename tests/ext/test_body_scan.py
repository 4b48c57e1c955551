"""The body scan agrees with decoding the whole body, or leaves it to that."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ext._body_scan import read_answer, scan
from ext._body_scan_py import scan as pure_scan
from proxy.dialects import decode as decoding
from proxy.dialects.call import Call
from proxy.dialects.endpoints import ENDPOINTS
from proxy.dialects.splice import splice, value_span
from proxy.errors import InvalidRequest
from proxy.observe.outcome import Outcome
from proxy.server import record

pytestmark = pytest.mark.native

NAMES = (
    "model", "messages", "stream", "stream_options", "priority", "max_tokens", "max_completion_tokens", "n", "input",
    "dimensions", "max_output_tokens", "temperature", "mod", "models", "tools", "prompt",
    "prompt_embeds", "previous_response_id", "previous_input_messages", "conversation", "instructions",
    "query", "queries", "text_1", "data_1", "documents", "items", "texts", "text_2", "data_2",
)  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)
LIKELY = st.fixed_dictionaries(
    {},
    optional={
        "model": st.sampled_from(["m", "größer", 'a"b', ""]) | VALUES,
        "messages": st.just([{"role": "user", "content": 'say "usage": {} \\ [}'}]) | VALUES,
        "stream": st.booleans() | VALUES,
        "stream_options": st.just({"include_usage": True}) | VALUES,
        "priority": st.integers(-3, 3),
        "max_tokens": st.integers(-1, 100),
        "n": st.integers(0, 3),
        "input": st.text() | st.lists(st.text()),
        "prompt": VALUES,
        "prompt_embeds": VALUES,
        "query": VALUES,
        "documents": VALUES,
        "tools": VALUES,
    },
)
BODIES = st.builds(
    lambda fields, ascii_, indent: json.dumps(fields, ensure_ascii=ascii_, indent=indent).encode("utf-8", "replace"),
    LIKELY | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), VALUES, max_size=6),
    st.booleans(),
    st.sampled_from([None, 1]),
)


def decoded(path: str, body: bytes, scanner: Any, monkeypatch: pytest.MonkeyPatch) -> Call | str:
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "scan", scanner)
        try:
            call = decoding.decode(ENDPOINTS[path], {}, body, decoding.Defaults(model="default"))
        except InvalidRequest as error:
            return error.message
    call.spans = None
    return call


@given(body=BODIES, path=st.sampled_from(list(ENDPOINTS)))
def test_a_scanned_body_is_decoded_as_a_whole_one_is(body: bytes, path: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        assert decoded(path, body, scan, patch) == decoded(path, body, pure_scan, patch)


@given(body=BODIES, cut=st.integers(0, 400), new=st.binary(max_size=3))
def test_a_damaged_body_is_never_taken_for_a_good_one(body: bytes, cut: int, new: bytes) -> None:
    damaged = body[: cut % (len(body) + 1)] + new + body[cut % (len(body) + 1) + 1 :]
    with pytest.MonkeyPatch.context() as patch:
        assert decoded("/v1/completions", damaged, scan, patch) == decoded("/v1/completions", damaged, pure_scan, patch)


@pytest.mark.parametrize("odd", ['"', "\\", "\\n", "\x1f", "\x00", "\x7f", "é", "😀", "\udc80"])
def test_what_is_odd_is_seen_wherever_it_is_in_a_long_text(odd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for at in (*range(150), 1000):
        text = "a" * at + odd + "a" * (150 - at % 150)
        body = b'{"model":"m","prompt":"%b","n":1}' % text.encode("utf-8", "surrogateescape")
        path = "/v1/completions"
        assert decoded(path, body, scan, monkeypatch) == decoded(path, body, pure_scan, monkeypatch)
        assert (scan(body, 8) is None) == (odd in ('"', "\\", "\x1f", "\x00", "\udc80"))


@given(body=BODIES)
def test_splicing_by_spans_is_splicing_by_search(body: bytes) -> None:
    scanned = scan(body, 256)
    if scanned is None:
        return
    spans = scanned[1]
    for name in ("model", "stream_options", "priority"):
        assert spans.get(name) == value_span(body, name)
    changes = {"model": b'"other"', "stream_options": b"{}"}
    assert splice(body, changes, spans) == splice(body, changes)
    assert msgspec.json.decode(splice(body, changes, spans))["model"] == "other"


@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"{}", b"[]", b"null", b'"a"', b"{", b'{"a"', b'{"a":', b'{"a":1', b'{"a":1,}', b'{"a":1}}',
        b'{"a":01}', b'{"a":+1}', b'{"a":1.}', b'{"a":.5}', b'{"a":1e}', b'{"a":-}', b'{"a":tru}', b'{"a":truex}',
        b'{"a":NaN}', b'{"a":"\n"}', b'{"a":"\\x"}', b'{"a":"\\u12g4"}', b'{"a":"\\u12"}', b'{"a":"\x00"}',
        b"{a:1}", b"{'a':1}", b'{"a":[1,]}', b'{"a":[1 2]}', b'{"a":[}', b'{"a":{"b"}}', b'{"a":{"b":1,}}',
        b'{"a":{1:2}}', b'{"a":1}\x00', b'\xef\xbb\xbf{"a":1}', b'{"a":"\xff"}', b'{"a":"\xc0\xaf"}',
        b'{"a":"\xed\xa0\x80"}', b'{"a":"\xf4\x90\x80\x80"}', b'{"a":"\xe2\x82"}', b'{"model":"a","model":"b"}',
        b'{"mod\\u0065l":"a"}', b'{"priority":1,"x":2,"priority":3}',
    ],
)  # fmt: skip
def test_what_is_not_ordinary_is_left_to_the_decoder(body: bytes) -> None:
    assert scan(body, 256) is None


def test_depth_counts_as_the_limit_says() -> None:
    assert scan(b'{"a":' + b"[" * 255 + b"]" * 255 + b"}", 256) is not None
    assert scan(b'{"a":' + b"[" * 256 + b"]" * 256 + b"}", 256) is None
    assert scan(b'{"a":' + b"[" * 100_000, 1024) is None


def test_the_short_form_stays_short() -> None:
    body = json.dumps({"messages": ["x" * 1000] * 100, "model": "m", "input": "y" * 100_000, "x": [1] * 1000}).encode()
    scanned = scan(body, 256)
    assert scanned is not None
    assert scanned[0] == b'{"messages":[0],"model":"m","input":""}'
    assert scan(json.dumps({"model": "m" * 5000}).encode(), 256) is None


def test_the_short_form_says_what_nothing_is_in() -> None:
    for nothing in (b"[]", b"[ \n]"):
        scanned = scan(b'{"messages":%b,"input":%b,"prompt":%b,"prompt_embeds":null}' % ((nothing,) * 3), 256)
        assert scanned is not None
        assert scanned[0] == b'{"messages":[],"input":[],"prompt":[],"prompt_embeds":null}'
    scanned = scan(b'{"input":[[]],"prompt":"%b\\u00e9","prompt_embeds":{"a":[]}}' % (b"x" * 9999), 256)
    assert scanned is not None
    assert scanned[0] == b'{"input":[0],"prompt":0,"prompt_embeds":0}'


COUNTS = st.none() | st.integers(0, 2**40) | st.sampled_from([-1, 1.0, 1e3, "5", True])
DETAILS = st.none() | st.fixed_dictionaries({}, optional={"cached_tokens": COUNTS, "audio_tokens": COUNTS}) | VALUES
USAGE = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("prompt_tokens", "completion_tokens", "input_tokens", "output_tokens"), COUNTS),
        "cache_read_input_tokens": COUNTS,
        "prompt_tokens_details": DETAILS,
        "input_tokens_details": DETAILS,
        "total_tokens": VALUES,
    },
)
REASONS = st.none() | st.sampled_from(["stop", "length", "", "größer", 'a"b', 5])
CHOICES = st.lists(st.fixed_dictionaries({}, optional={"finish_reason": REASONS, "message": VALUES}), max_size=3)
ANSWERS = st.builds(
    lambda fields, ascii_, indent: json.dumps(fields, ensure_ascii=ascii_, indent=indent).encode("utf-8", "replace"),
    st.fixed_dictionaries(
        {},
        optional={
            "id": st.just('"usage":{"prompt_tokens":1}'),
            "choices": CHOICES | st.none() | VALUES,
            "usage": USAGE | st.none() | VALUES,
            "stop_reason": REASONS,
        },
    ),
    st.booleans(),
    st.sampled_from([None, 1]),
)


def recorded(body: bytes, *, natively: bool) -> Outcome:
    outcome = Outcome("r", "POST", "/", 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "read_answer", read_answer if natively else lambda _: None)
        record.record_body(outcome, body)
    return outcome


@given(body=ANSWERS, cut=st.integers(0, 400), new=st.binary(max_size=3), whole=st.booleans())
def test_an_answer_is_recorded_alike_by_reading_and_by_decoding(body: bytes, cut: int, new: bytes, whole: bool) -> None:
    if not whole:
        body = body[: cut % (len(body) + 1)] + new + body[cut % (len(body) + 1) + 1 :]
    assert recorded(body, natively=True) == recorded(body, natively=False)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"choices":[{"finish_reason":"stop","x":[1]},{}],"usage":{"prompt_tokens":7,"completion_tokens":2,'
         b'"prompt_tokens_details":{"cached_tokens":0}}}', (7, 0, 2, "stop")),
        (b'{"stop_reason":"end_turn","usage":{"input_tokens":1,"output_tokens":2,"cache_read_input_tokens":3}}',
         (1, 3, 2, "end_turn")),
        (b' {"usage":null,"choices":null} ', (None, None, None, None)),
        (b'{"usage":{"prompt_tokens":1},"usage":{"prompt_tokens":2}}', None),
        (b'{"usa\\u0067e":{"prompt_tokens":1}}', None),
        (b'{"usage":{"prompt_tokens":1.0}}', None),
        (b'{"usage":{"prompt_tokens":1}', None),
        (b"[]", None),
        (b"", None),
    ],
)  # fmt: skip
def test_what_an_ordinary_answer_says_is_read_without_decoding(body: bytes, said: Any) -> None:
    assert read_answer(body) == said
