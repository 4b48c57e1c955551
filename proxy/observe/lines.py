"""A line per request in a file, written off the hot path: in batches, by a thread of its own, within a bound.

A line waits in memory for about `FLUSH_S`. A batch is one write to a file opened for appending, so several processes
may share a file and no line is cut by another's; to a pipe it is several, each of whole lines. Where the disk is full
or a pipe is not read, lines stay in memory and are tried again every `RETRY_S`, and requests go on; above the bound
lines are dropped and counted, rather than requests delayed or memory grown, and a later batch says how many.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from select import PIPE_BUF

import orjson

from proxy.observe.outcome import Outcome

FLUSH_S = 0.2
RETRY_S = 1.0
CLOSE_S = 2.0  # what `close` waits for a pipe that nobody reads
STDOUT = 1

Encode = Callable[[float, Outcome], bytes]


class LineWriter:
    """Appends to `path`, making it and its folder, or to standard output where it is None. Raises OSError.

    One thread takes (`put` and the others) and one writes: a deque between them needs no lock. The thread is a daemon,
    for one that hangs in a full pipe must not keep the process from ending.

    A thread that lets the interpreter go waits for a busy loop to give it back. So it does that a few times in a batch,
    never once for so many lines: lines would come faster than it takes them.
    """

    def __init__(self, name: str, path: str | None, most_pending: int) -> None:
        self.pending: deque[bytes] = deque()
        self.dropped = 0
        self.failures = 0  # attempts to write
        self.batches = 0  # that were taken to be written
        self._log = logging.getLogger("vramp.lines")
        self._name = name
        self._path = path
        self._most_pending = most_pending
        self._fd = self._open() if path else STDOUT
        self._unwritten = b""
        self._failing = False
        self._dropped_told = 0
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._reopen = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, line: bytes) -> None:
        """Take one line: at most one wake-up a batch."""
        if len(self.pending) >= self._most_pending:
            self.dropped += 1
            return
        self.pending.append(line)
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
        Path(str(self._path)).parent.mkdir(parents=True, exist_ok=True)
        return os.open(str(self._path), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)

    def _run(self) -> None:
        closing = False
        while not closing:
            self._wake.wait()
            self._wake.clear()  # first: whatever comes from now on, a line or the end, wakes us again
            closing = self._closed.wait(FLUSH_S)  # seen before taking, so that the last batch holds every line
            self._take()
            while not self._written() and not closing:
                closing = self._closed.wait(RETRY_S)
        lost = self._unwritten.count(b"\n") + len(self.pending)
        if lost:
            self._log.error("%s: %d lines are lost: the file could not be written", self._name, lost)
        if self._path:
            os.close(self._fd)

    def _take(self) -> None:
        self.batches += 1
        lines = [self.pending.popleft() for _ in range(len(self.pending))]
        dropped = self.dropped
        if dropped > self._dropped_told:
            lines.append(orjson.dumps({"dropped_lines": dropped - self._dropped_told}) + b"\n")
            self._dropped_told = dropped
        self._unwritten = b"".join(lines)

    def _written(self) -> bool:
        """Write what is unwritten; False where it has to be tried again."""
        try:
            self._open_anew()
            while self._unwritten:
                self._unwritten = _rest(self._unwritten, os.write(self._fd, self._piece()))
        except OSError as error:
            self.failures += 1
            if not self._failing:
                self._log.error("%s cannot be written and is kept in memory: %s", self._name, error)
            self._failing = True
            return False
        if self._failing:
            self._log.warning("%s can be written again", self._name)
            self._failing = False
        return True

    def _piece(self) -> bytes:
        """As much as stays in one piece though others write there as well: to a file all, to a pipe `PIPE_BUF`."""
        if len(self._unwritten) <= PIPE_BUF or not stat.S_ISFIFO(os.fstat(self._fd).st_mode):
            return self._unwritten
        whole = self._unwritten.rfind(b"\n", 0, PIPE_BUF) + 1
        return self._unwritten[: whole or None]

    def _open_anew(self) -> None:
        if self._reopen:
            old, self._fd = self._fd, self._open()
            self._reopen = False
            os.close(old)


class LineLog:
    """A log of lines that may be off: without a writer nothing is kept.

    `encode` makes a line of a wall-clock time and an outcome, at once: natively that costs less than to keep the
    outcome and to read it again when it is out of the caches, while requests wait for the interpreter.
    """

    def __init__(self, writer: LineWriter | None, encode: Encode) -> None:
        self.writer = writer
        self._encode = encode

    def write(self, outcome: Outcome) -> None:
        """Take the line of a request that ended."""
        if self.writer is not None:
            self.take(self._encode(time.time(), outcome))

    def take(self, line: bytes) -> None:
        """Take a line that is made already."""
        if self.writer is not None:
            self.writer.put(line)

    def reopen(self) -> None:
        """Open the file anew, after logrotate moved it."""
        if self.writer is not None:
            self.writer.reopen()

    async def close(self) -> None:
        """Write what is pending, as far as that is possible soon. Idempotent."""
        if self.writer is not None:
            await self.writer.close()


def _rest(lines: bytes, written: int) -> bytes:
    """What is left after so many bytes. A line that was cut short is ended, and goes again as a whole.

    Another process may have written in between: two halves would then be two lines that nobody can read.
    """
    if written == len(lines):
        return b""
    whole = lines.rfind(b"\n", 0, written) + 1
    return (b"\n" if whole < written else b"") + lines[whole:]
