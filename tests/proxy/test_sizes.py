"""Sizes as people write and read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.sizes import byte_size, format_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 << 30),
        ("512MiB", 512 << 20),
        ("1.5 GiB", 3 << 29),
        ("24gb", 24 * 10**9),
        ("64", 64),
        (64, 64),
        ("9007199254740993B", 9007199254740993),
    ],
)
def test_a_size_is_read(text: int | str, size: int) -> None:
    assert byte_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "4 gigs", "-1GiB", "1e9", "4GiB4", "٤GiB", "nan", -1])
def test_what_is_no_size_is_refused(text: int | str) -> None:
    with pytest.raises(ValueError, match="size"):
        byte_size(text)


@pytest.mark.parametrize(
    ("size", "text"), [(4 << 30, "4GiB"), (3 << 29, "1.5GiB"), (300, "300B"), (0, "0B"), (1 << 50, "1PiB")]
)
def test_a_size_is_shown_short(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 1 << 60))
def test_what_is_shown_is_read_back_to_a_twentieth_of_its_unit(size: int) -> None:
    assert abs(byte_size(format_size(size)) - size) <= size * 0.05 + 1
