from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.dialects.splice import depth_exceeds, refuse_duplicate, splice, value_span
from proxy.errors import InvalidRequest

MODEL = {"model": b'"new"'}


@pytest.mark.parametrize(
    ("body", "spliced"),
    [
        (b'{"model":"old","x":1}', b'{"model":"new","x":1}'),
        (b'{"x":1,"model":"old"}', b'{"x":1,"model":"new"}'),
        (b' \n{"x" : [{"model": 1}] ,\t"model" :\r\n"old" }\n', b' \n{"x" : [{"model": 1}] ,\t"model" :\r\n"new" }\n'),
        (b'{"x":{"model":"in"},"model":"old"}', b'{"x":{"model":"in"},"model":"new"}'),
        (b'{"model":"old","x":{"model":"in"}}', b'{"model":"new","x":{"model":"in"}}'),
        (b'{"x":{"model":"in"}}', b'{"model":"new","x":{"model":"in"}}'),
        (b'{"x":"\\"model\\":\\"in\\"","model":"old"}', b'{"x":"\\"model\\":\\"in\\"","model":"new"}'),
        (b'{"x\\"model":"in","model":"old"}', b'{"x\\"model":"in","model":"new"}'),
        (b'{"x\\"model":"in"}', b'{"model":"new","x\\"model":"in"}'),
        (b'{"x":"model","model":"old"}', b'{"x":"model","model":"new"}'),
        (b'{"mod\\u0065l":"old","x":"\\u006d"}', b'{"mod\\u0065l":"new","x":"\\u006d"}'),
        (b'{"model":"o\\"l\\\\","x":1}', b'{"model":"new","x":1}'),
        (b'{"model":null}', b'{"model":"new"}'),
        (b"{}", b'{"model":"new"}'),
        (b"{ }", b'{"model":"new" }'),
        (b'{"model":{"a":[1,{"b":"}"}]},"x":1}', b'{"model":"new","x":1}'),
    ],
)  # fmt: skip
def test_only_the_top_level_value_changes(body: bytes, spliced: bytes) -> None:
    assert splice(body, MODEL) == spliced


def test_several_changes_at_once_keep_every_other_byte() -> None:
    body = b'{"priority":-5,"model":"a","stream_options":{"include_usage":false}, "t": 1.0e5}'
    changes = {"model": b'"b"', "stream_options": b'{"include_usage":true}', "priority": b"0"}
    assert splice(body, changes) == b'{"priority":0,"model":"b","stream_options":{"include_usage":true}, "t": 1.0e5}'


def test_nothing_to_change_is_the_same_object() -> None:
    body = b'{"model":"a"}'
    assert splice(body, {}) is body


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"a","model":"b"}',
        b'{"model":"a","x":1,"model":"a"}',
        b'{"model":"a","mod\\u0065l":"b"}',
        b'{"mod\\u0065l":"a","\\u006dodel":"b"}',
    ],
)
def test_a_key_given_twice_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="given twice") as caught:
        refuse_duplicate(body, "model")
    assert caught.value.param == "model"


@pytest.mark.parametrize("body", [b'{"model":"a","x":{"model":"b"}}', b'{"model":"\\u0061","x":[{"model":"b"}]}'])
def test_a_key_inside_another_value_is_no_duplicate(body: bytes) -> None:
    refuse_duplicate(body, "model")


NAMES = st.sampled_from(["model", "x", 'x"model', "stream_options", "modèl", "model\\", "priority"])
TEXT = st.text(alphabet='ab"\\{}[]:, \né🙂\x1b', max_size=8)
VALUES = st.recursive(
    st.sampled_from([None, True, 0, -1.5e300, 10**30]) | TEXT | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


@given(
    body=st.dictionaries(NAMES, VALUES, max_size=5),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 0, 2]),
    name=st.sampled_from(["model", "stream_options", "priority"]),
)
def test_any_object_is_spliced_as_a_parser_would(
    body: dict[str, Any], ascii_only: bool, indent: int | None, name: str
) -> None:
    raw = json.dumps(body, ensure_ascii=ascii_only, indent=indent).encode()
    span = value_span(raw, name)
    assert (span is not None) == (name in body)
    if span is not None:
        assert json.loads(raw[slice(*span)]) == body[name]
    assert json.loads(splice(raw, {name: b'{"new":1}'})) == body | {name: {"new": 1}}


@pytest.mark.parametrize(
    ("body", "deep"),
    [
        (b"[" * 10 + b"]" * 10, False),
        (b"[" * 11 + b"]" * 11, True),
        (b'{"a":[' * 5 + b"]}" * 5, False),
        (b'["' + b"[" * 100 + b'"]', False),
        (b'["\\"' + b"[" * 100 + b'"]', False),
        (b"[[],[],[],[],[],[],[],[],[],[],[],[]]", False),
        (b"[" * 1_000_000, True),
    ],
)
def test_depth_counts_brackets_outside_strings(body: bytes, deep: bool) -> None:
    assert depth_exceeds(body, 10) is deep


def test_a_long_string_without_an_end_costs_linear_time() -> None:
    body = b'{"x":"' + b'\\"' * 500_000 + b"[" * 500
    assert not depth_exceeds(body, 10)
    assert not depth_exceeds(body + b"\\", 10)
