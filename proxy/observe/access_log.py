"""The access log: one JSON line per request, whoever asked for whatever. It may lose lines, and says how many."""

from __future__ import annotations

from operator import attrgetter

from ext.json_lines import line
from proxy.observe.lines import LineWriter
from proxy.observe.outcome import Outcome

MOST_PENDING = 20_000
_WRITTEN = tuple(each for each in Outcome.__struct_fields__ if each not in ("started_s", "rate_limits", "grant"))
_NAMES = ("time", *_WRITTEN)
_values = attrgetter(*_WRITTEN)


class AccessLog:
    """`target` is "stdout", "off" or a path, which is appended to. Raises OSError when the path cannot be opened."""

    def __init__(self, target: str) -> None:
        path = None if target == "stdout" else target
        self._writer = None if target == "off" else LineWriter("the access log", path, line_of, MOST_PENDING)

    def write(self, outcome: Outcome) -> None:
        """Take one line."""
        if self._writer is not None:
            self._writer.put(outcome)

    def reopen(self) -> None:
        """Open the file anew, after logrotate moved it."""
        if self._writer is not None:
            self._writer.reopen()

    async def close(self) -> None:
        """Write what is pending, as far as that is possible soon. Idempotent."""
        if self._writer is not None:
            await self._writer.close()


def line_of(at: float, outcome: Outcome) -> bytes:
    """What is known of a request that ended `at` this wall-clock time."""
    return line(_NAMES, (round(at, 3), *_values(outcome)), sparse=True)
