"""What an engine kind must say of itself. A kind knows how to start one model and how to ask whether it lives;
`scheduler.engines.supervisor` does the starting, watching and stopping for all kinds alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import aiohttp
import msgspec

from scheduler.engines.sleeping import SleepControls


class SpawnSpec(msgspec.Struct, frozen=True):
    """How to start one engine: `argv` for a plain start, `env` on top of ours.

    `warm` asks for a fork from the warm launcher of the interpreter `argv[0]`; `argv` is then
    `python -m MODULE ARGS...`, which the launcher runs in the fork as Python would. The launcher itself is started
    with `launcher_env`: what must be set before the imports, the same for all engines of that interpreter.
    """

    argv: tuple[str, ...]
    env: dict[str, str]
    cwd: str | None = None
    warm: bool = False
    launcher_env: dict[str, str] = {}


class Progress(msgspec.Struct, frozen=True):
    """What a log line tells of a start: `fraction` 0 to 1, `note` for people."""

    fraction: float
    note: str


class EngineKind(Protocol):
    """One way of running a model locally. One file each; whoever configures engines chooses among them."""

    name: str
    sleep_controls: SleepControls | None  # None: an engine of this kind cannot sleep

    def spawn_spec(self, port: int, device_env: Mapping[str, str]) -> SpawnSpec:
        """The command line for a start on this loopback port."""
        ...

    def progress(self, line: str) -> Progress | None:
        """Reads one log line of a start."""
        ...

    def explain(self, log_tail: Sequence[str]) -> str | None:
        """Why a start failed, with a remedy, from its last log lines; None when they do not tell."""
        ...

    async def probe(self, session: aiohttp.ClientSession, base_url: str) -> bool:
        """One real request (one token, one embedding). True: ready. False: not yet.

        Raises ProbeError when the answer shows that it never will be.
        """
        ...


class ProbeError(Exception):
    """The engine answers, and its answer says that it will never serve this model."""


class EngineExit(Exception):
    """The engine ended before it was ready. Carries the last log lines for the people who wait."""

    def __init__(self, reason: str, log_tail: Sequence[str], *, out_of_memory: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.out_of_memory = out_of_memory
        self.log_tail = list(log_tail)
