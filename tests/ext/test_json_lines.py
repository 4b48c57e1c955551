"""Both twins write the same lines, and the lines say what the values are."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ext import _json_lines_py as pure
from tests.ext.conftest import load

NAMES = ("a", "second", "c_3")
VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.floats(-10, 10)
    | st.text(max_size=8)
    | st.text('abc \x7f\t"\\/', max_size=8)
)  # fmt: skip


@pytest.mark.native
@given(values=st.tuples(VALUES, VALUES, VALUES), sparse=st.booleans())
@example((0.00005, 0.00015, -0.00005), False)  # halves go to the even step
@example((1e11, -1e11, 99999999999.99999), False)
@example((-0.0, 0.0, 1.5), True)
def test_both_twins_write_the_same_line(values: Any, sparse: bool) -> None:
    native = load("native").module("json_lines")
    assert native.line(NAMES, values, sparse) == pure.line(NAMES, values, sparse)


def test_a_line_says_what_its_values_are(twins: Any) -> None:
    line = twins.module("json_lines").line
    values = ('an "odd" tëxt', 0.123456, None)
    assert line(NAMES, values) == '{"a":"an \\"odd\\" tëxt","second":0.1235,"c_3":null}\n'.encode()
    assert json.loads(line(NAMES, ("x", 3, True))) == {"a": "x", "second": 3, "c_3": True}
    assert line(NAMES, (1760000000.125, 0.0, "")) == b'{"a":1760000000.125,"second":0.0,"c_3":""}\n'


def test_no_text_and_no_number_is_refused(twins: Any) -> None:
    line = twins.module("json_lines").line
    for value in ("\udcff", "a\ud800b", 2**70, -(2**70)):
        assert json.loads(line(("a",), (value,))) == {"a": value}


def test_a_sparse_line_leaves_out_what_is_not_there(twins: Any) -> None:
    line = twins.module("json_lines").line
    assert line(NAMES, (None, "", 0), True) == b'{"c_3":0}\n'
    assert line(NAMES, ("", None, ""), True) == b"{}\n"


def test_names_and_values_must_be_as_many(twins: Any) -> None:
    with pytest.raises(ValueError, match="shorter"):
        twins.module("json_lines").line(NAMES, (1, 2))
