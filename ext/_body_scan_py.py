"""The body scan: what is needed of a JSON body, found in one pass over bytes that stay where they are.

`scan` answers a *short form* of the body, and where the members lie that may be spliced. The short form is JSON that
says of the members we know what the body says, and nothing else: the others are left out. Where only a value's type
matters an array is `[]` or, with something in it, `[0]`, and a text `""`; where only its being there does, what is no
array and not null is `0`. So a decoder gives the same for the short form as for the body, and reads a hundred
bytes instead of a hundred thousand.

`scan` answers None for all that is not ordinary: what is not one whole JSON object in UTF-8, nests deeper than allowed,
is empty, writes a key of the top level with escapes, or gives a spliced member twice. Then whoever asked decodes the
whole body, and finds out what is wrong with it or that nothing is.

`read_answer` is for answers: what one says of itself. It answers None likewise.

In pure Python nothing beats decoding the whole body with a decoder written in C, so this twin always says that.
Callers that behave alike with both twins are the specification (`proxy.dialects.decode`, `proxy.server.record`).
"""

from __future__ import annotations

Span = tuple[int, int]
Spans = dict[str, Span]
Said = tuple[int | None, int | None, int | None, str | None]


def scan(body: bytes | memoryview, max_depth: int) -> tuple[bytes, Spans] | None:
    """(short form, spans of `model`, `stream_options` and `priority`, and at "" where a member may be put first).

    Costs about a memory scan of the body. `max_depth` counts the object itself.
    """
    return None


def read_answer(body: bytes) -> Said | None:
    """(prompt tokens, cached tokens, output tokens, why it ended) of a whole answer, each None where it is not said."""
    return None
