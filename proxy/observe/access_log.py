"""One JSON line per request, written off the hot path: in batches, by a thread, within a bound.

A line waits in memory for at most `FLUSH_S`. Where the disk or the pipe does not keep up, lines are dropped and counted
rather than requests delayed or memory grown; the next batch says how many.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import Any

import orjson

from proxy.observe.outcome import Outcome

log = logging.getLogger("vramp.access")

FLUSH_S = 0.2
MOST_PENDING = 20_000
STDOUT = 1


class AccessLog:
    """`target` is "stdout", "off" or a path, which is appended to. Use it on one event loop and close it at the end."""

    def __init__(self, target: str) -> None:
        self._path = target if target not in ("stdout", "off") else None
        self._off = target == "off"
        self._fd = self._open() if self._path else STDOUT
        self._pending: list[tuple[float, Outcome]] = []
        self._dropped = 0
        self._flushing: asyncio.Task[None] | None = None

    def write(self, outcome: Outcome) -> None:
        """Take one line. A list append; the first of a batch also starts its timer."""
        if self._off:
            return
        if len(self._pending) >= MOST_PENDING:
            self._dropped += 1
            return
        self._pending.append((time.time(), outcome))
        if self._flushing is None:
            self._flushing = asyncio.get_running_loop().create_task(self._flush_later(), name="access log")

    def reopen(self) -> None:
        """Open the file anew, after logrotate moved it."""
        if self._path:
            old, self._fd = self._fd, self._open()
            os.close(old)

    async def close(self) -> None:
        """Write what is pending and close the file."""
        if self._flushing is not None:
            self._flushing.cancel()
            await asyncio.gather(self._flushing, return_exceptions=True)
        await self._flush()
        if self._path:
            os.close(self._fd)

    def _open(self) -> int:
        return os.open(str(self._path), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)

    async def _flush_later(self) -> None:
        while self._pending:
            await asyncio.sleep(FLUSH_S)
            await self._flush()
        self._flushing = None

    async def _flush(self) -> None:
        batch, self._pending = self._pending, []
        dropped, self._dropped = self._dropped, 0
        lines = [_line(at, outcome) for at, outcome in batch]
        if dropped:
            lines.append(orjson.dumps({"dropped_lines": dropped}) + b"\n")
        if lines:
            await asyncio.shield(asyncio.to_thread(_write_all, self._fd, b"".join(lines)))


def _line(at: float, outcome: Outcome) -> bytes:
    fields: dict[str, Any] = {"time": round(at, 3)}
    for name in outcome.__struct_fields__:
        value = getattr(outcome, name)
        if name == "started_s" or value is None or value == "":
            continue
        fields[name] = round(value, 4) if isinstance(value, float) else value
    return orjson.dumps(fields) + b"\n"


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[os.write(fd, rest) :]
    except OSError as error:
        log.warning("the access log cannot be written: %s", error)
