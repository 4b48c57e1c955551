"""What the simulated engine says, counts and embeds: all of it a function of the request, none of it by chance."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any
from zlib import crc32

TOKEN = re.compile(r"\s?\w{1,6}|\s?[^\w\s]|\s")
VOCABULARY = 50_000
DIMENSIONS = 64
QUOTED_TOKENS = 12
FILLER = " This text is simulated."


def tokens(text: str) -> list[str]:
    """Pieces that join to the text again."""
    return TOKEN.findall(text)


def token_id(token: str) -> int:
    """A number that is always the same for the same piece."""
    return crc32(token.encode()) % VOCABULARY


def named(ids: list[int]) -> str:
    """A text of as many tokens, which can be had back from their ids only as numbers."""
    return "".join(f" {each}" for each in ids)


def prompt_of(body: dict[str, Any]) -> str:
    """All text of a request, whichever dialect it is in."""
    found = (body.get(key) for key in ("system", "instructions", "messages", "input", "prompt"))
    return "\n".join(_texts([part for part in found if part is not None]))


def last_words(body: dict[str, Any]) -> str:
    """What was said last, which is what the answer quotes."""
    said = [text for key in ("messages", "input", "prompt") for text in _texts(body.get(key))]
    return said[-1] if said else ""


def answer(model: str, said: str) -> Iterator[str]:
    """The tokens of an answer: it says that it is simulated and quotes what was said. Ends by itself."""
    quote = "".join(tokens(said)[:QUOTED_TOKENS]).strip()
    yield from tokens(f'[simulated {model}] No model ran. You said: "{quote}".')


def endless() -> Iterator[str]:
    """What follows when an answer must not end (`ignore_eos`, `min_tokens`)."""
    return itertools.cycle(tokens(FILLER))


def embedding(text: str, dimensions: int = DIMENSIONS) -> list[float]:
    """A unit vector: the sum of one vector per word, so texts that share words are near each other."""
    total = [0.0] * dimensions
    for word in text.lower().split() or [""]:
        stream = hashlib.shake_128(word.encode()).digest(dimensions)
        total = [value + byte - 127.5 for value, byte in zip(total, stream, strict=True)]
    norm = math.sqrt(math.fsum(value * value for value in total)) or 1.0
    return [value / norm for value in total]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list) and value and all(type(each) is int for each in value):
        yield named(value)  # a prompt of token ids
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, dict):
        yield from _texts(value.get("content", value.get("text")))
