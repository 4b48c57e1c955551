"""Usage: one row for every call of a known caller, however it ended. What is charged and reported is made of these.

Rows are JSON lines with always the same fields, appended in batches off the path (`proxy.observe.lines`). Unlike a
log, they are not dropped: while the file cannot be written they stay in memory, and when `MOST_PENDING` are there, new
calls are refused with 503 until it can. Nobody is served unrecorded, nobody waits for a disk, and memory is bounded;
the calls in flight at that moment still find room.

A row may be missing only after a crash (what came within the last `FLUSH_S`) or a stop with an unwritable file, which
the log then counts.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from operator import attrgetter

import msgspec

from ext.json_lines import line
from proxy.errors import Unavailable
from proxy.observe.lines import RETRY_S, LineLog, LineWriter
from proxy.observe.metrics import UsageRows
from proxy.observe.outcome import Outcome

log = logging.getLogger("vramp.usage")

MOST_PENDING = 50_000  # about 25 MB
ROOM_IN_FLIGHT = 50_000  # above those, for calls that began before: more than descriptors allow


class Row(msgspec.Struct, frozen=True):
    """One call. `time` is when it ended, in Unix seconds; waits are in seconds; tokens null where nobody counted."""

    time: float
    request_id: str
    tenant: str
    path: str
    model: str
    backend: str
    latency_class: str
    stream: bool
    status: int
    error: str | None
    attempts: int
    prompt_tokens: int | None
    cached_tokens: int | None
    output_tokens: int | None
    queue_s: float
    load_s: float
    upstream_s: float
    duration_s: float


NAMES = Row.__struct_fields__
values_of = attrgetter(*NAMES[1:])  # all but the time


class UsageLog(LineLog):
    """`target` is "off" or a path, which is appended to. Raises OSError where that cannot be."""

    def __init__(self, target: str) -> None:
        room = MOST_PENDING + ROOM_IN_FLIGHT
        super().__init__(None if target == "off" else LineWriter("usage", target, room), row_of)
        self._pending = self.writer.pending if self.writer is not None else deque[bytes]()
        self._told: int | None = None  # the batch that the log was told of
        self.on_full: Callable[[], None] = lambda: None  # whoever begins calls sets it

    @property
    def full(self) -> bool:
        """Whether new calls are to be refused."""
        return len(self._pending) >= MOST_PENDING

    def refusal(self) -> Unavailable:
        """Of a call that comes while this is `full`. The log is told once in each batch: a writer that is only slow has
        failed at nothing, and would say nothing."""
        if self.writer is not None and self._told != self.writer.batches:
            self._told = self.writer.batches
            log.warning("new calls are refused: %d usage rows wait to be written", len(self._pending))
        words = "Usage cannot be written in time ([store] usage), and nobody is served unrecorded. The log says more."
        return Unavailable(words, code="usage_unwritable", retry_after_s=RETRY_S)

    def write(self, outcome: Outcome) -> None:
        """Take the row of a call that ended, if its caller is known."""
        if outcome.tenant:
            super().write(outcome)

    def take(self, line: bytes) -> None:
        """Take a row that is made already."""
        super().take(line)
        if self.full:
            self.on_full()

    def rows(self) -> UsageRows | None:
        """How well rows are written; None where none are."""
        if self.writer is None:
            return None
        return UsageRows(len(self._pending), self.writer.failures, self.writer.dropped)


def row_of(at: float, outcome: Outcome) -> bytes:
    """The row of a call that ended `at` this wall-clock time, as a line."""
    return line(NAMES, (at, *values_of(outcome)))
