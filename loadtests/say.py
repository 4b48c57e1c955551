"""Progress of the long load tests."""

from __future__ import annotations

import sys


class Say:
    """Progress on stderr: one line that is rewritten at a terminal, a line now and then elsewhere."""

    def __init__(self, who: str) -> None:
        self._who = who
        self._told = -1.0
        self._terminal = sys.stderr.isatty()

    def __call__(self, what: str, share: float) -> None:
        if self._terminal:
            print(f"\r\x1b[K{self._who}: {what} ({share:.0%})", end="", file=sys.stderr, flush=True)
        elif share >= self._told + 0.25 or share < self._told:
            self._told = share
            print(f"{self._who}: {what} ({share:.0%})", file=sys.stderr, flush=True)
