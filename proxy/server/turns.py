"""Accepting in turns, where several processes accept from one socket.

All of them are woken for a connection, and the one that is awake already wins: left to themselves, one process gets
nearly all connections of a burst, and keeps them. So whoever has taken one leaves the next to the others for `PAUSE_S`.
What is still there after that it takes itself, for another process may hang: one, then two, then four ..., so that a
burst is divided and a flood is not held up.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

PAUSE_S = 0.002
MOST = 64  # connections at once
NO_DESCRIPTORS_S = 1.0  # until it is tried again when no descriptor is left


class Turns:
    """Watches a listening socket, and closes it at the end. `accept` takes so many connections at most and says how
    many there were, or -1 when there is no descriptor for one."""

    def __init__(self, listening: socket.socket, accept: Callable[[int], int]) -> None:
        self._loop = asyncio.get_running_loop()
        self._listening = listening
        self._accept = accept
        self._most = 1
        self._pause: asyncio.TimerHandle | None = None  # none: it is watched
        self._loop.add_reader(listening, self._ready)

    def close(self) -> None:
        """Take nothing more. Idempotent."""
        if self._pause is not None:
            self._pause.cancel()
        if self._listening.fileno() >= 0:
            self._loop.remove_reader(self._listening)
            self._listening.close()

    def _ready(self) -> None:
        self._most = 1
        if taken := self._accept(1):
            self._loop.remove_reader(self._listening)
            self._leave_to_others(taken)

    def _look_again(self) -> None:
        if taken := self._accept(self._most):
            self._leave_to_others(taken)
            return
        self._pause = None
        self._loop.add_reader(self._listening, self._ready)

    def _leave_to_others(self, taken: int) -> None:
        if taken == self._most:
            self._most = min(2 * self._most, MOST)
        self._pause = self._loop.call_later(NO_DESCRIPTORS_S if taken < 0 else PAUSE_S, self._look_again)
