"""Half an hour of everything: does it grow? Memory, descriptors, threads, and requests that never end.

    make soak                               30 minutes
    python -m loadtests.soak --minutes 2

Four simulated models with room for two, so that loads and evictions never stop, and a small one for embeddings. Clients
chat, stream, embed, send nonsense, ask for what does not exist, and leave: while they wait, before the first token, in
mid-stream. At the end nothing may be in flight, descriptors and threads no more than before, memory flat, one usage
row for each request, and one more request must work.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path

import aiohttp
import msgspec
import psutil
import uvloop

from loadtests import bench
from loadtests.say import Say

CLIENTS = 48
SAMPLE_S = 1.0
QUIET_S = 12.0  # after the load: idle connections to engines are kept 4 s in the fast lane, up to 8 s in the other
GROWTH_BYTES = 3_000_000  # of the second half: less is the allocator's noise
SPARE_DESCRIPTORS = 8  # the last request's connection, and what the proxy opens in its first minute
SPARE_THREADS = min(32, (os.cpu_count() or 1) + 4)  # asyncio's executor starts that many, as they are needed
MODELS = ("a", "b", "c", "d")
CONFIG = """
[server]
api_keys = ["literal:sk-soak"]

[devices]
nvidia = false
simulated = [{ name = "sim0", memory = "2GiB" }]

[observe]
access_log = "access.log"

[[backends]]
name = "sim"
kind = "simulated"

[[models]]
id = "embed"
backend = "sim"
task = "embed"
memory_bytes = "100MiB"
simulated = { load_s = 0.3, ttft_ms = 5 }
""" + "".join(
    f"""
[[models]]
id = "{name}"
backend = "sim"
memory_bytes = "900MiB"
simulated = {{ load_s = 0.3, ttft_ms = 5, tokens_per_s = 500 }}
"""
    for name in MODELS
)


class Sample(msgspec.Struct, frozen=True):
    """One look at the server's own processes, engines left out."""

    at_s: float
    rss_bytes: int
    descriptors: int
    threads: int


class Figures(msgspec.Struct, frozen=True):
    """What the soak saw."""

    outcomes: dict[str, int]
    first: Sample
    last: Sample
    growth_bytes: float  # of memory in the second half, by least squares
    in_flight: int
    rows: int  # of usage, each of another request
    doubled_rows: int = 0

    def faults(self) -> list[str]:
        """What may not be, in words."""
        found = [f"{count} x {what}" for what, count in self.outcomes.items() if what.startswith("wrong")]
        if self.growth_bytes > GROWTH_BYTES:
            found.append(f"memory grew by {self.growth_bytes / 1e6:.1f} MB in the second half")
        if self.last.descriptors > self.first.descriptors + SPARE_DESCRIPTORS:
            found.append(f"descriptors: {self.first.descriptors} before, {self.last.descriptors} after")
        if self.last.threads > self.first.threads + SPARE_THREADS:
            found.append(f"threads: {self.first.threads} before, {self.last.threads} after")
        requests = sum(self.outcomes.values())
        unheard = self.outcomes.get("left", 0)  # some left before their request was there
        if not requests - unheard <= self.rows <= requests or self.doubled_rows:
            found.append(f"{self.rows} usage rows of {requests} requests, {self.doubled_rows} doubled")
        if self.in_flight:
            found.append(f"{self.in_flight} requests never ended")
        return found


# ------------------------------------------------------------------- the clients


class Client:
    """One user after another on a few connections. `outcomes` counts what became of each request."""

    def __init__(self, session: aiohttp.ClientSession, url: str, seed: int, outcomes: Counter[str]) -> None:
        self._session, self._url, self._outcomes = session, url, outcomes
        self._random = random.Random(seed)
        self._habits = (self.chat, self._stream) * 2 + (self._embed, self._leave, self._nonsense, self._unknown)

    async def run(self, until_s: float) -> None:
        """Requests until then. Whatever goes wrong is counted, not raised."""
        while time.monotonic() < until_s:
            habit = self._random.choice(self._habits)
            try:
                await habit()
            except (aiohttp.ClientError, OSError) as error:
                self._outcomes[f"wrong: {habit.__name__}: {type(error).__name__}"] += 1

    def _body(self, *, stream: bool = False, tokens: int = 8) -> dict[str, object]:
        message = {"role": "user", "content": "Hello " * self._random.randint(1, 400)}
        model = self._random.choices(MODELS, (8, 4, 2, 1))[0]
        return {"model": model, "messages": [message], "max_tokens": tokens, "stream": stream}

    def _post(self, body: object, path: str = "chat/completions") -> aiohttp.client._RequestContextManager:
        return self._session.post(f"{self._url}/v1/{path}", json=body)

    def _count(self, what: str, status: int, *expected: int) -> None:
        self._outcomes[what if status in expected else f"wrong: {what}: {status}"] += 1

    async def chat(self) -> None:
        """One plain answer."""
        async with self._post(self._body()) as answer:
            await answer.read()
            self._count("chat", answer.status, 200)

    async def _stream(self) -> None:
        async with self._post(self._body(stream=True, tokens=20)) as answer:
            whole = await answer.read()
            self._count("stream", answer.status if whole.endswith(b"data: [DONE]\n\n") else 0, 200)

    async def _embed(self) -> None:
        """Tokens, which are packed with those of others who ask meanwhile: each must get the usage of its own."""
        tokens = [7] * self._random.randint(1, 100)
        async with self._post({"model": "embed", "input": tokens}, "embeddings") as answer:
            found = await answer.json()
            its_own = answer.status != 200 or found["usage"]["prompt_tokens"] == len(tokens)
            self._count("embed", answer.status if its_own else 0, 200)

    async def _leave(self) -> None:
        """At some moment: in the queue, while loading, before the first token, in mid-stream."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._random.choice((0.001, 0.01, 0.1, 0.3))):
                async with self._post(self._body(stream=self._random.random() < 0.7, tokens=200)) as answer:
                    await answer.read()
        self._outcomes["left"] += 1

    async def _nonsense(self) -> None:
        body, kind = b'{"model": "a", "messages": 3', {"content-type": "application/json"}
        async with self._session.post(f"{self._url}/v1/chat/completions", data=body, headers=kind) as answer:
            await answer.read()
            self._count("nonsense", answer.status, 400)

    async def _unknown(self) -> None:
        async with self._post(self._body() | {"model": "nobody"}) as answer:
            await answer.read()
            self._count("unknown model", answer.status, 404)


# ------------------------------------------------------------------- the watching


def look(subject: bench.Subject, began: float) -> Sample:
    """The keeper's and the proxy's memory, descriptors and threads."""
    own = ours(subject)
    return Sample(
        time.monotonic() - began,
        sum(each.memory_info().rss for each in own),
        sum(each.num_fds() for each in own),
        sum(each.num_threads() for each in own),
    )


def ours(subject: bench.Subject) -> list[psutil.Process]:
    """The server's own processes. Engines come and go; one that is just going has no command any more."""
    found = []
    for each in subject.tree():
        with contextlib.suppress(psutil.Error):
            if is_ours(each.cmdline()):
                found.append(each)
    return found


def is_ours(command: list[str]) -> bool:
    """Whether a process is the keeper, the proxy or a worker of it, and no engine."""
    return any(part.startswith(("proxy.", "scheduler.engines.keeper")) for part in command)


def growth(samples: list[Sample]) -> float:
    """Bytes that the second half of the samples gains, along its least-squares line."""
    half = samples[len(samples) // 2 :]
    mean_at = sum(each.at_s for each in half) / len(half)
    mean_rss = sum(each.rss_bytes for each in half) / len(half)
    spread = sum((each.at_s - mean_at) ** 2 for each in half)
    slope = sum((each.at_s - mean_at) * (each.rss_bytes - mean_rss) for each in half) / spread if spread else 0.0
    return slope * (half[-1].at_s - half[0].at_s)


async def in_flight(session: aiohttp.ClientSession, admin_url: str) -> int:
    """Requests that the server believes to be under way."""
    async with session.get(f"{admin_url}/admin/api/status") as answer:
        status = await answer.json()
    return sum(int(model.get("in_flight") or 0) + int(model.get("waiting") or 0) for model in status["models"])


async def soak(subject: bench.Subject, seconds: float, say: Say) -> Figures:
    """Load, look, wait until it is quiet, look again."""
    outcomes: Counter[str] = Counter()
    url, began = f"http://127.0.0.1:{subject.port}", time.monotonic()
    key = {"Authorization": "Bearer sk-soak"}
    async with aiohttp.ClientSession(headers=key, connector=aiohttp.TCPConnector(limit=0)) as session:
        one = Client(session, url, 0, outcomes)
        for _ in range(20):
            await one.chat()
        await asyncio.sleep(1.0)
        first, samples = look(subject, began), []
        ends = time.monotonic() + seconds
        clients = [asyncio.create_task(Client(session, url, n, outcomes).run(ends)) for n in range(1, CLIENTS + 1)]
        while (left_s := ends - time.monotonic()) > 0:
            await asyncio.sleep(min(SAMPLE_S, left_s))
            samples.append(look(subject, began))
            say(f"{outcomes.total()} requests, {samples[-1].rss_bytes / 1e6:.1f} MB", 1.0 - max(0.0, left_s) / seconds)
        await asyncio.gather(*clients)
    async with aiohttp.ClientSession(headers=key) as session:
        await asyncio.sleep(QUIET_S)
        left = await in_flight(session, f"http://127.0.0.1:{subject.admin_port}")
        await Client(session, url, 0, outcomes).chat()
    await asyncio.sleep(1.0)
    ids = usage_ids(Path(subject.folder, ".state", "usage.jsonl"))
    rows = len(set(ids))
    return Figures(dict(outcomes), first, look(subject, began), growth(samples), left, rows, len(ids) - rows)


def usage_ids(file: Path) -> list[str]:
    """The request of each row."""
    return [str(json.loads(line)["request_id"]) for line in file.read_text(encoding="utf-8").splitlines()]


def report(figures: Figures) -> str:
    """What is printed at the end."""
    first, last = figures.first, figures.last
    lines = [
        f"{sum(figures.outcomes.values())} requests: "
        + ", ".join(f"{count} {what}" for what, count in sorted(figures.outcomes.items())),
        f"RSS {first.rss_bytes / 1e6:.1f} MB before, {last.rss_bytes / 1e6:.1f} MB after, "
        f"{figures.growth_bytes / 1e6:+.2f} MB in the second half; descriptors {first.descriptors} and "
        f"{last.descriptors}; threads {first.threads} and {last.threads}; {figures.in_flight} in flight; "
        f"{figures.rows} usage rows",
    ]
    return "\n".join([*lines, *(f"FAULT: {fault}" for fault in figures.faults())])


def main() -> None:
    """Soak and print; exits with 1 if anything grew, was lost or answered wrongly."""
    parser = argparse.ArgumentParser(description="Everything at once for a long time, and whether anything grows.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    workers = ("--workers", str(asked.workers)) if asked.workers > 1 else ()
    with bench.vramp(CONFIG, bench.everywhere(), *workers) as subject:
        figures = uvloop.run(soak(subject, asked.minutes * 60, Say("soak")))
    print(json.dumps(msgspec.to_builtins(figures)) if asked.json else f"\n{report(figures)}")
    sys.exit(1 if figures.faults() else 0)


if __name__ == "__main__":
    main()
