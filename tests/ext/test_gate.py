"""The gate's digest: the published values of SipHash-2-4 with 128 bits."""

from __future__ import annotations

import pytest

from ext._gate import siphash

pytestmark = pytest.mark.native

KEY = bytes(range(16))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "a3817f04ba25a8e66df67214c7550293"),
        (1, "da87c1d86b99af44347659119b22fc45"),
        (50, "a590d3ee4fbf04e3247e0d27f286423f"),
    ],
)
def test_the_digest_is_that_of_the_reference(size: int, expected: str) -> None:
    assert siphash(bytes(range(size)), KEY).hex() == expected


def test_every_byte_and_the_key_matter() -> None:
    texts = [bytes(range(size)) for size in range(64)] + [b"\x00" * size for size in range(64)]
    texts += [bytes([*range(at), 255, *range(at + 1, 40)]) for at in range(40)]
    assert len({siphash(text, KEY) for text in texts}) == len(set(texts))
    assert siphash(b"text", KEY) != siphash(b"text", KEY[::-1])
    with pytest.raises(ValueError, match="use 16"):
        siphash(b"text", b"short")
