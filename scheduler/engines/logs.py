"""Logs of engines: a folder per model, a file per start, the last few kept, and their ends read for people."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

KEPT = 5
TAIL_BYTES = 64 << 10
READ_LIMIT = 256 << 10
# What vLLM, PyTorch, llama.cpp and the kernel's allocator say when there is less memory than they need. Not "Killed":
# the kernel's own killer writes nothing into an engine's log.
OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|[Cc](?:an't|annot) allocate memory|\bMemoryError\b|failed to allocate .*buffer"
    r"|(?:Free|Available) memory on (?:device|node) .* on (?:startup|kv cache allocation) is less"
)


def new_log(log_dir: Path, model: str, engine_id: str) -> Path:
    """The path for one start's log; older ones of the model are removed until `KEPT` remain, this one included."""
    folder = log_dir / quote(model, safe="").replace(".", "%2E")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for old in sorted(folder.glob("*.log"))[: 1 - KEPT]:
        with contextlib.suppress(FileNotFoundError):
            old.unlink()
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
    path = folder / f"{stamp}-{quote(engine_id, safe='')}.log"
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    return path


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a log; empty when it is empty or gone."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            text = file.read(TAIL_BYTES).decode(errors="replace")
    except OSError:
        return []
    return [line for line in re.split(r"[\r\n]+", text) if line][-lines:]


def tells_of_want(lines: Iterable[str]) -> bool:
    """Whether a log says that there was too little memory."""
    return any(OUT_OF_MEMORY.search(line) is not None for line in lines)


class Follower:
    """Reads what was added to a log since the last look. A progress bar's carriage return ends a line too."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = ""

    def lines(self) -> list[str]:
        """Complete lines that are new; at most 256 KiB at a time. Raises OSError."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            added = file.read(READ_LIMIT)
        self._offset += len(added)
        *complete, self._rest = re.split(r"[\r\n]+", self._rest + added.decode(errors="replace"))
        return [line for line in complete if line]
