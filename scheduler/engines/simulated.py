"""The simulated engine kind: a real process with real HTTP, and text that says it is simulated.

For trying vramp where no engine can be installed, and for tests that need an engine to be slow, to crash, to talk
garbage or to hang. Its memory is declared, not used; `declared_memory` reads it off the process.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence

import aiohttp

from scheduler.engines import reaper
from scheduler.engines.base import Progress, SpawnSpec
from scheduler.engines.probing import probe_openai
from scheduler.engines.sleeping import SleepControls

FAULTS = ("none", "slow", "crash", "garbage", "hang", "corrupt")  # corrupt: says something else once it has slept
MEMORY_VAR = "VRAMP_SIMULATED_MEMORY_BYTES"
PROBE_HEADERS = {"x-vramp-probe": "1"}  # a probe is no user's request: it meets no fault and is not counted
LOADED = re.compile(r"loaded (\d+) %")


class SimulatedKind:
    """How one model is simulated. `fault` sets in after `fault_after` good answers; see `simulated_server`."""

    name = "simulated"

    def __init__(
        self,
        *,
        model: str,
        memory_bytes: int,
        task: str = "generate",
        ttft_ms: float = 50.0,
        tokens_per_s: float = 200.0,
        load_s: float = 1.0,
        max_sequences: int = 32,
        fault: str = "none",
        fault_after: int = 0,
    ) -> None:
        if fault not in FAULTS:
            raise ValueError(f"model {model}: fault is {fault!r}; use one of {', '.join(FAULTS)}")
        self.model, self.task, self.memory_bytes = model, task, memory_bytes
        self.sleep_controls = SleepControls(model, PROBE_HEADERS) if task == "generate" else None
        self._options = {
            "--model": model,
            "--task": task,
            "--ttft-ms": ttft_ms,
            "--tokens-per-s": tokens_per_s,
            "--load-s": load_s,
            "--max-sequences": max_sequences,
            "--fault": fault,
            "--fault-after": fault_after,
        }

    def spawn_spec(self, port: int, device_env: Mapping[str, str]) -> SpawnSpec:
        """The command line for a start on this loopback port."""
        argv = [sys.executable, "-m", "scheduler.engines.simulated_server", "--port", str(port)]
        argv += [f"{name}={value}" for name, value in self._options.items()]
        return SpawnSpec(argv=tuple(argv), env={**device_env, MEMORY_VAR: str(self.memory_bytes)})

    def progress(self, line: str) -> Progress | None:
        """Reads `loaded N %`."""
        found = LOADED.search(line)
        return Progress(int(found[1]) / 100, "loading (simulated)") if found else None

    def explain(self, log_tail: Sequence[str]) -> str | None:
        """Its last line says it."""
        return log_tail[-1] if log_tail else None

    async def probe(self, session: aiohttp.ClientSession, base_url: str) -> bool:
        """One token, or one embedding, free of faults."""
        return await probe_openai(session, base_url, self.model, self.task, PROBE_HEADERS)


def declared_memory(pid: int) -> int:
    """Bytes that a simulated engine says it holds; 0 for any other process and for one that has gone."""
    return int(reaper.environment(pid).get(MEMORY_VAR, "0"))
