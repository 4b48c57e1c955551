"""Many streams at once, held for minutes: none lost, none reordered, and what one of them takes in memory.

    python -m loadtests.streams           10,000 streams for five minutes, an event each 2 s
    python -m loadtests.streams --streams 1000 --seconds 20 --workers 1

Every event carries its number, so a stream that loses, doubles or reorders one is seen. Resident memory is read before
the streams (after some requests), while all are open, and when all have ended. A stream takes two descriptors of the
server: where the limit per process cannot be raised over 20,000, ten thousand of them need two workers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import sys
from typing import cast

import msgspec
import uvloop

from loadtests import bench, canned, client
from loadtests.say import Say

OPENED_A_SECOND = 250
SETTLE_S = 60.0  # within this what was freed goes back to the system, and idle connections upstream end
END_LIMIT_S = 30.0  # after its last event was due, a stream that has not ended is lost
WARM_REQUESTS_S = 2.0
_NUMBER = re.compile(rb'"content": "(\d{6})"')


class Held(msgspec.Struct):
    """What became of the streams."""

    begun: int = 0
    whole: int = 0
    lost: int = 0  # ended early, or not at all
    reordered: int = 0  # an event that was not the next one
    events: int = 0


class Figures(msgspec.Struct, frozen=True):
    """Of one run. Resident memory in bytes, all processes of the server together."""

    streams: int
    seconds: float
    held: Held
    idle: int
    open: int
    after: int

    @property
    def per_stream(self) -> float:
        """Bytes over idle that one open stream takes."""
        return (self.open - self.idle) / self.streams

    @property
    def left(self) -> float:
        """What stays when all have ended, as a share of idle."""
        return self.after / self.idle - 1.0


class Numbered(asyncio.Protocol):
    """One connection that asks for one stream and checks the number of each event."""

    def __init__(self, request: bytes, events: int, held: Held) -> None:
        self._request, self._events, self._held = request, events, held
        self._next = 0
        self._tail = b""
        self._over = False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        joined = self._tail + data
        end = 0
        for found in _NUMBER.finditer(joined):
            end = found.end()
            number = int(found[1])
            self._held.begun += self._next == 0
            self._held.reordered += number != self._next
            self._held.events += 1
            self._next = number + 1
        self._tail = joined[max(end, len(joined) - 64) :]
        if joined.endswith(canned.LAST):
            self._end(whole=self._next == self._events)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(whole=False)

    def give_up(self) -> None:
        """It should have ended."""
        self._end(whole=False)

    def _end(self, *, whole: bool) -> None:
        if self._over:
            return
        self._over = True
        self._held.whole += whole
        self._held.lost += not whole
        self._transport.close()
        if not self.ended.done():
            self.ended.set_result(None)


class Plan(msgspec.Struct, frozen=True):
    """How many streams, held for how long once the last is open, with an event of each so often."""

    streams: int
    seconds: float
    every_s: float

    @property
    def opening_s(self) -> float:
        """How long it takes to open them all."""
        return self.streams / OPENED_A_SECOND

    @property
    def events(self) -> int:
        """Of one stream, so that the first lasts until the last was held for long enough."""
        return max(2, round((self.seconds + self.opening_s) / self.every_s))

    @property
    def model(self) -> str:
        """The name that makes the fake upstream stream like this."""
        return f"sse-{self.events}-{round(self.every_s * 1000)}"


async def hold(subject: bench.Subject, plan: Plan, say: Say) -> Figures:
    """Open them all, hold them, let them end."""
    streams, events = plan.streams, plan.events
    request = canned.request(plan.model, stream=True)
    async with client.plain(subject.port, bench.CONNECTIONS):
        await asyncio.sleep(WARM_REQUESTS_S)
    await asyncio.sleep(1.0)
    idle, held, loop = rss(subject), Held(), asyncio.get_running_loop()
    opened: list[Numbered] = []
    for number in range(streams):
        _, one = await loop.create_connection(lambda: Numbered(request, events, held), "127.0.0.1", subject.port)
        opened.append(one)
        if number % 25 == 24:
            await asyncio.sleep(25 / OPENED_A_SECOND)
            say("opening", number / streams)
    most = 0
    ends = loop.time() + events * plan.every_s - plan.opening_s
    while (left_s := ends - loop.time()) > 0:
        await asyncio.sleep(min(2.0, left_s))
        most = max(most, rss(subject))
        say(f"{held.begun} streams are open, {held.events} events", 1.0 - left_s / plan.seconds)
    await asyncio.wait([each.ended for each in opened], timeout=plan.opening_s + END_LIMIT_S)
    for each in opened:
        each.give_up()
    await asyncio.sleep(SETTLE_S)
    return Figures(streams, plan.seconds, held, idle, most, rss(subject))


def rss(subject: bench.Subject) -> int:
    """Bytes resident in all processes of the server."""
    return int(subject.rss_mb() * 1e6)


def report(figures: Figures) -> str:
    """What is printed at the end."""
    held = figures.held
    return (
        f"{figures.streams} streams held for {figures.seconds:g} s: {held.whole} whole, {held.lost} lost, "
        f"{held.reordered} events out of order, {held.events} events.\n"
        f"RSS {figures.idle / 1e6:.1f} MB idle, {figures.open / 1e6:.1f} MB open "
        f"({figures.per_stream / 1e3:.1f} KB a stream), {figures.after / 1e6:.1f} MB after ({figures.left:+.0%})."
    )


def config(upstream_port: int, model: str) -> str:
    """The benchmark's, with the model that these streams ask for."""
    return f'{bench.bench_config(upstream_port)}\n[[models]]\nid = "{model}"\nbackend = "upstream"\n'


def main() -> None:
    """Measure and print; exits with 1 if a stream was lost or reordered."""
    parser = argparse.ArgumentParser(description="Hold many streams through vramp and check every event of them.")
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two events of a stream")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    theirs, ours = bench.cores()
    os.sched_setaffinity(0, ours)
    plan = Plan(asked.streams, asked.seconds, asked.every)
    with bench.printing_its_port(bench.UPSTREAM, ours) as upstream:
        workers = ("--workers", str(asked.workers)) if asked.workers > 1 else ()
        with bench.vramp(config(upstream.port, plan.model), theirs, *workers) as subject:
            figures = uvloop.run(hold(subject, plan, Say("streams")))
    print(json.dumps(msgspec.to_builtins(figures)) if asked.json else f"\n{report(figures)}")
    sys.exit(1 if figures.held.lost or figures.held.reordered else 0)


if __name__ == "__main__":
    main()
