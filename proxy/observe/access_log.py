"""The access log: one JSON line per request, whoever asked for whatever. It may lose lines, and says how many."""

from __future__ import annotations

from operator import attrgetter

from ext.json_lines import line
from proxy.observe.lines import LineLog, LineWriter
from proxy.observe.outcome import Outcome

MOST_PENDING = 20_000
_WRITTEN = tuple(each for each in Outcome.__struct_fields__ if each not in ("started_s", "rate_limits", "grant"))
NAMES = ("time", *_WRITTEN)
values_of = attrgetter(*_WRITTEN)  # all but the time


class AccessLog(LineLog):
    """`target` is "stdout", "off" or a path, which is appended to. Raises OSError when the path cannot be opened."""

    def __init__(self, target: str) -> None:
        path = None if target == "stdout" else target
        super().__init__(None if target == "off" else LineWriter("the access log", path, MOST_PENDING), line_of)


def line_of(at: float, outcome: Outcome) -> bytes:
    """What is known of a request that ended `at` this wall-clock time."""
    return line(NAMES, (round(at, 3), *values_of(outcome)), sparse=True)
