"""Coverage-guided fuzzing of the event scanner with atheris; docs/ext.md has the command. Not part of the suite.

Coverage is that of the pure twin; the native one must answer every feed alike, and both what a whole read answers.
"""

from __future__ import annotations

import re
import sys
from itertools import pairwise

import atheris

with atheris.instrument_imports(include=["ext._sse_py", "ext._sse_json"]):
    from ext import _sse_py
from ext import _sse

FACTS = ("events", "output_events", "usage", "first_usage", "finish_reason", "error", "done", "oversized")


def facts(scanner: object) -> list[object]:
    return [getattr(scanner, name) for name in FACTS]


def events_and_done(stream: bytes) -> tuple[int, bool]:
    """The simple way: split all lines, group them at the empty ones."""
    groups: list[list[bytes]] = [[]]
    for line in re.split(rb"\r\n|\r|\n", stream.removeprefix(b"\xef\xbb\xbf")):
        if not line:
            groups.append([])
        elif line == b"data" or line.startswith(b"data:"):
            groups[-1].append(line[5:].removeprefix(b" "))
    return sum(map(bool, groups)), [b"[DONE]"] in groups


def fuzz_one(data: bytes) -> None:
    provider = atheris.FuzzedDataProvider(data)
    withhold, limit = provider.ConsumeBool(), provider.ConsumeIntInRange(1, 300)
    places = [provider.ConsumeIntInRange(0, 400) for _ in range(provider.ConsumeIntInRange(0, 6))]
    stream = provider.ConsumeBytes(400)
    cuts = [0, *sorted(min(place, len(stream)) for place in places), len(stream)]
    pure, native = _sse_py.EventScanner(withhold, limit), _sse.EventScanner(withhold, limit)
    whole = _sse.EventScanner(withhold, limit)
    passed = b""
    for first, last in pairwise(cuts):
        answer = native.feed(stream[first:last])
        assert answer == pure.feed(stream[first:last])
        assert facts(native) == facts(pure)
        assert repr(native) == repr(pure)
        assert int(re.search(r"(\d+) bytes pending", repr(native))[1]) <= limit
        passed += answer
    rest = native.flush()
    assert rest == pure.flush()
    assert passed + rest == whole.feed(stream) + whole.flush()
    assert facts(native) == facts(pure) == facts(whole)
    if not native.oversized:
        assert (native.events, native.done) == events_and_done(stream)


if __name__ == "__main__":
    atheris.Setup(sys.argv, fuzz_one)
    atheris.Fuzz()
