"""Five times more than the engines can do: what they can do is done, the rest is told so at once.

    python -m loadtests.overload                    64 slots of 0.5 s, 640 requests a second for 20 seconds

The engine is a simulated one in a process of its own. Requests are sent when they are due, whatever became of earlier
ones. Goodput counts good answers while the load ran, over what the slots could have answered in that time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from typing import cast

import msgspec
import uvloop

from loadtests import bench

SLOTS, SERVICE_S, RATE = 64, 0.5, 640.0
QUEUE = 64  # one round of the slots: it keeps them busy, and nobody waits for longer than an answer takes
WARM_S = 3.0  # until the slots and the queue are full
REFUSED = b"503"  # 429 is for limits of the caller's own, and there are none
CONFIG = f"""
[server]
api_keys = ["literal:sk-bench"]

[devices]
nvidia = false
simulated = [{{ name = "sim0", memory = "2GiB" }}]

[observe]
access_log = "off"

[[backends]]
name = "sim"
kind = "simulated"

[[models]]
id = "m"
backend = "sim"
memory_bytes = "1GiB"
max_sequences = {SLOTS}
max_queue = {QUEUE}
simulated = {{ load_s = 0.1, ttft_ms = {SERVICE_S * 1000:g}, tokens_per_s = 1000000 }}
"""
BODY = b'{"model":"m","messages":[{"role":"user","content":"Hi"}],"max_tokens":1}'
REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer sk-bench\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
)


class Figures(msgspec.Struct):
    """Of the time that was measured. Seconds; `wrong` are answers that are neither good nor a true refusal."""

    seconds: float
    offered: int = 0
    good: int = 0
    wrong: int = 0
    answer_s: list[float] = []
    refusal_s: list[float] = []

    @property
    def goodput(self) -> float:
        """As a share of what the slots can do."""
        return self.good / (SLOTS / SERVICE_S * self.seconds)


class Call(asyncio.Protocol):
    """A connection: one request at a time, and whoever waits for its answer."""

    def __init__(self) -> None:
        self._got = bytearray()
        self._answer: asyncio.Future[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    async def ask(self) -> bytes:
        """The head of the answer."""
        self._got.clear()
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(REQUEST)
        return await self._answer

    def data_received(self, data: bytes) -> None:
        self._got += data
        head, mark, body = bytes(self._got).partition(b"\r\n\r\n")
        if not mark or self._answer is None or self._answer.done():
            return
        length = head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]
        if len(body) >= int(length or b"0"):
            self._answer.set_result(head)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(b"")

    def close(self) -> None:
        """No more requests."""
        self._transport.close()


class Clients:
    """Connections that are free, most recently used first; more are opened as they are needed."""

    def __init__(self, port: int, figures: Figures) -> None:
        self._port = port
        self._figures = figures
        self._free: list[Call] = []
        self._loop = asyncio.get_running_loop()
        self.counting = False

    async def ask(self) -> None:
        """One request, and what became of it."""
        if not self._free:
            _, opened = await self._loop.create_connection(Call, "127.0.0.1", self._port)
            self._free.append(opened)
        call, counted = self._free.pop(), self.counting
        began = time.perf_counter()  # uvloop's own clock stands still within a turn
        head = await call.ask()
        took = time.perf_counter() - began
        if head:
            self._free.append(call)
        status = head[9:12]
        if self.counting and status == b"200":  # answers of the time, whenever they were asked for
            self._figures.good += 1
            self._figures.answer_s.append(took)
        if not counted:
            return
        self._figures.offered += 1
        if status == REFUSED and b"\r\nretry-after:" in head.lower():
            self._figures.refusal_s.append(took)
        elif status != b"200":
            self._figures.wrong += 1

    def close(self) -> None:
        """Close those that are free."""
        for call in self._free:
            call.close()


async def overload(subject: bench.Subject, core: set[int], seconds: float, rate: float) -> Figures:
    """Warm up, measure, wait for what is under way. The engine goes to `core`."""
    figures = Figures(seconds)
    clients, loop = Clients(subject.port, figures), asyncio.get_running_loop()
    server = subject.tree()
    await clients.ask()  # loads the model
    for each in subject.tree():
        if each not in server:  # the engine, which was started on its keeper's core
            each.cpu_affinity(list(core))
    asked: set[asyncio.Task[None]] = set()
    began, sent = loop.time(), 0
    while (passed := loop.time() - began) < WARM_S + seconds:
        clients.counting = passed >= WARM_S
        while sent < passed * rate:
            sent += 1
            task = loop.create_task(clients.ask())
            asked.add(task)
            task.add_done_callback(asked.discard)
        await asyncio.sleep(0.001)
    clients.counting = False
    await asyncio.gather(*asked)
    await clients.ask()  # and it still answers
    clients.close()
    return figures


def quantile(values: list[float], share: float) -> float:
    """0 of nothing."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def report(figures: Figures) -> str:
    """What is printed at the end."""
    waits = figures.refusal_s
    after = ", ".join(f"p{share * 100:g} {quantile(waits, share) * 1e3:.1f} ms" for share in (0.5, 0.95, 0.99))
    return (
        f"{figures.offered} requests in {figures.seconds:g} s: {figures.good} good answers, goodput "
        f"{figures.goodput:.1%} of {SLOTS} slots of {SERVICE_S:g} s; {len(waits)} refused with Retry-After, "
        f"after {after}; {figures.wrong} others."
    )


def main() -> None:
    """Measure and print; exits with 1 if an answer was neither good nor a true refusal."""
    parser = argparse.ArgumentParser(description="Offer vramp five times what its engine can do.")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rate", type=float, default=RATE, help="requests a second")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    theirs, ours = bench.cores()
    os.sched_setaffinity(0, ours)
    with bench.vramp(CONFIG, theirs) as subject:
        figures = uvloop.run(overload(subject, ours, asked.seconds, asked.rate))
    print(json.dumps(msgspec.to_builtins(figures)) if asked.json else report(figures))
    sys.exit(1 if figures.wrong else 0)


if __name__ == "__main__":
    main()
