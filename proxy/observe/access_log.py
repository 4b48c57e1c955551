"""One JSON line per request, written off the hot path: in batches, by a thread of its own, within a bound.

A line waits in memory for about `FLUSH_S`. Where the disk or the pipe does not keep up, lines are dropped and counted
rather than requests delayed or memory grown; a later batch says how many.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import deque
from typing import Any

import orjson

from proxy.observe.outcome import Outcome

log = logging.getLogger("vramp.access")

FLUSH_S = 0.2
CLOSE_S = 2.0  # what `close` waits for a pipe that nobody reads
MOST_PENDING = 20_000
STDOUT = 1
UNWRITTEN = frozenset({"started_s", "rate_limits", "grant"})


class AccessLog:
    """`target` is "stdout", "off" or a path, which is appended to. Raises OSError when the path cannot be opened.

    One thread writes (`write` and the others) and one takes: a deque between them needs no lock. The thread is a
    daemon, for one that hangs in a full pipe must not keep the process from ending.
    """

    def __init__(self, target: str) -> None:
        self._path = target if target not in ("stdout", "off") else None
        self._fd = self._open() if self._path else STDOUT
        self._pending: deque[tuple[float, Outcome]] = deque()
        self._dropped = 0
        self._dropped_told = 0
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._reopen = False
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
        self._off = target == "off"
        if not self._off:
            self._thread.start()

    def write(self, outcome: Outcome) -> None:
        """Take one line: a list append, and at most one wake-up a batch."""
        if self._off:
            return
        if len(self._pending) >= MOST_PENDING:
            self._dropped += 1
            return
        self._pending.append((time.time(), outcome))
        if not self._wake.is_set():
            self._wake.set()

    def reopen(self) -> None:
        """Open the file anew before the next batch, after logrotate moved it."""
        self._reopen = self._path is not None
        self._wake.set()

    async def close(self) -> None:
        """Write what is pending and end the thread, but do not wait longer than `CLOSE_S`. Idempotent."""
        self._closed.set()
        self._wake.set()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, CLOSE_S)

    def _open(self) -> int:
        return os.open(str(self._path), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)

    def _run(self) -> None:
        closing = False
        while not closing:
            self._wake.wait()
            self._wake.clear()  # first: whatever comes from now on, a line or the end, wakes us again
            closing = self._closed.wait(FLUSH_S)  # seen before taking, so that the last batch holds every line
            try:
                self._write_batch()
            except OSError as error:
                log.warning("the access log cannot be written: %s", error)
        if self._path:
            os.close(self._fd)

    def _write_batch(self) -> None:
        if self._reopen:
            self._reopen = False
            old, self._fd = self._fd, self._open()
            os.close(old)
        lines = [_line(*self._pending.popleft()) for _ in range(len(self._pending))]
        dropped = self._dropped
        if dropped > self._dropped_told:
            lines.append(orjson.dumps({"dropped_lines": dropped - self._dropped_told}) + b"\n")
            self._dropped_told = dropped
        rest = memoryview(b"".join(lines))
        while rest:
            rest = rest[os.write(self._fd, rest) :]


def _line(at: float, outcome: Outcome) -> bytes:
    fields: dict[str, Any] = {"time": round(at, 3)}
    for name in outcome.__struct_fields__:
        value = getattr(outcome, name)
        if name in UNWRITTEN or value is None or value == "":
            continue
        fields[name] = round(value, 4) if isinstance(value, float) else value
    return orjson.dumps(fields) + b"\n"
