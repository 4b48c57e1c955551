"""What native buys: `ext` against its pure twins, and against what one would take from the standard library.

Prints a Markdown table: nanoseconds of CPU time per operation (best of several rounds, all in one run on one machine),
and how many times the native twin is faster. Takes about a minute. An idle machine gives steadier figures.
"""

from __future__ import annotations

import asyncio
import gc
import json
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from types import ModuleType
from typing import Any

from ext import _backlog_py, _fair_queue_py, _rate_counters_py, _sse_py, _weighted_semaphore_py, backend

DEPTHS = (1, 1_000, 100_000)
ROUNDS = 7
PLENTY = 1 << 40
CHUNK = (
    b'data: {"id":"chatcmpl-8f14e45fceea167a5a36dedd4bea2543","object":"chat.completion.chunk","created":1760000000,'
    b'"model":"meta-llama/Llama-3.1-8B-Instruct","choices":[{"index":0,"delta":{"content":" scheduling"},'
    b'"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
)

Measured = tuple[float, int]  # seconds of CPU, operations
Bench = Callable[[], Measured]


def best(bench: Bench, rounds: int = ROUNDS) -> float:
    """Nanoseconds per operation in the best of the rounds."""
    figures = []
    for _ in range(rounds):
        gc.collect()
        gc.disable()
        seconds, operations = bench()
        gc.enable()
        figures.append(seconds / operations * 1e9)
    return min(figures)


def cpu(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


# -- the weighted semaphore


def uncontended(module: ModuleType, operations: int = 100_000) -> Measured:
    semaphore = module.WeightedSemaphore(1000, 100)
    acquire, release = semaphore.try_acquire, semaphore.release

    def run() -> None:
        for _ in range(operations):
            release(acquire(7))

    return cpu(run), operations


def counting(module: ModuleType, operations: int = 100_000) -> Measured:
    capacity = module.Capacity(1000, 100)
    take, give = capacity.try_take, capacity.give

    def run() -> None:
        for _ in range(operations):
            take(7)
            give(7)

    return cpu(run), operations


def asyncio_uncontended(operations: int = 20_000) -> Measured:
    async def run() -> None:
        semaphore = asyncio.Semaphore(100)
        for _ in range(operations):
            await semaphore.acquire()
            semaphore.release()

    return cpu(lambda: asyncio.run(run())), operations


def wake(module: ModuleType, waiters: int) -> Measured:
    """One release that lets all waiters in. Small depths are repeated, as one call is too short to time."""
    repeats = max(1, 10_000 // waiters)
    ready = []
    for _ in range(repeats):
        semaphore = module.WeightedSemaphore(waiters)
        holder = semaphore.try_acquire(waiters)
        for _ in range(waiters):
            semaphore.park(1)
        ready.append((semaphore.release, holder))

    def run() -> None:
        for release, holder in ready:
            release(holder)

    return cpu(run), repeats * waiters


def asyncio_wake(waiters: int) -> Measured:
    """The first of so many waiting tasks, one release each; their own turn of the loop is in it.

    At most 500 of them: each release walks past those that are woken already, so all would take minutes.
    """
    woken = min(500, waiters)

    async def main() -> float:
        semaphore = asyncio.Semaphore(0)
        tasks = [asyncio.ensure_future(semaphore.acquire()) for _ in range(waiters)]
        await asyncio.sleep(0)
        start = time.process_time()
        for _ in range(woken):
            semaphore.release()
        await asyncio.gather(*tasks[:woken])
        seconds = time.process_time() - start
        for task in tasks[woken:]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return seconds

    return asyncio.run(main()), woken


def park_and_cancel(module: ModuleType, waiters: int, operations: int = 20_000) -> Measured:
    """One comes and goes behind `waiters` others."""
    semaphore = module.WeightedSemaphore(10)
    semaphore.try_acquire(10)
    for _ in range(waiters):
        semaphore.park(1)
    park, cancel = semaphore.park, semaphore.cancel

    def run() -> None:
        for _ in range(operations):
            cancel(park(1))

    return cpu(run), operations


# -- the fair queue


def tickets(waiting: int, operations: int, batch: int) -> tuple[list[tuple[int, str]], list[list[tuple[int, str]]]]:
    """Numbers and tenants, made before the clock runs: those that wait, and the batches that come."""
    tenants = [f"tenant {i}" for i in range(min(1000, waiting))]
    made = [(number, tenants[number % len(tenants)]) for number in range(waiting + operations)]
    return made[:waiting], [made[at : at + batch] for at in range(waiting, waiting + operations, batch)]


def queue_steady(module: ModuleType, waiting: int, operations: int = 20_000) -> Measured:
    """Push and take, a batch of up to 100 at a time, with so many tickets of up to 1,000 tenants waiting."""
    batch = min(100, waiting)
    queue = module.FairQueue(limit=waiting + batch)
    push, take = queue.push, queue.take
    there, coming = tickets(waiting, operations, batch)
    for number, tenant in there:
        push(number, tenant, 100, 0.0)

    def run() -> None:
        for arrivals in coming:
            for number, tenant in arrivals:
                push(number, tenant, 100, 0.0)
            take(PLENTY, batch, 0.0)

    return cpu(run), operations


def heap_steady(waiting: int, operations: int = 20_000) -> Measured:
    """A heap by class and arrival and a dict to cancel by: no tenants, no ageing, no budget, no prefixes."""
    batch = min(100, waiting)
    there, coming = tickets(waiting, operations, batch)
    heap = [(2, number) for number, _ in there]
    weights = {number: 100 for number, _ in there}

    def run() -> None:
        for arrivals in coming:
            for number, _ in arrivals:
                weights[number] = 100
                heappush(heap, (2, number))
            taken: list[int] = []
            while len(taken) < batch:
                _, number = heappop(heap)
                if weights.pop(number, None) is not None:
                    taken.append(number)

    return cpu(run), operations


def backlog_steady(module: ModuleType, n: int, operations: int = 50_000) -> Measured:
    """n wait; one comes, the oldest goes, and what all gain is asked for."""
    backlog = module.Backlog()
    add, remove, gain = backlog.add, backlog.remove, backlog.gain
    for i in range(n):
        add(float(i), i + 10.0)

    def run() -> None:
        for i in range(operations):
            add(float(n + i), n + i + 10.0)
            remove(float(i), i + 10.0)
            gain(i + 10.0, i + 15.0, 0.4, 2.0)

    return cpu(run), operations


# -- the scanner and the counters


def scan(module: ModuleType, per_feed: int, events: int = 64_000) -> Measured:
    scanner, data = module.EventScanner(), CHUNK * per_feed
    feed = scanner.feed

    def run() -> None:
        for _ in range(events // per_feed):
            feed(data)

    seconds = cpu(run)
    assert scanner.output_events == events // per_feed * per_feed
    return seconds, events // per_feed * per_feed


def json_scan(per_feed: int, events: int = 16_000) -> Measured:
    data = CHUNK * per_feed

    def run() -> None:
        for _ in range(events // per_feed):
            for event in data.split(b"\n\n"):
                if event:
                    json.loads(event[6:])

    return cpu(run), events // per_feed * per_feed


def reserve(module: ModuleType, keys: int, operations: int = 50_000) -> Measured:
    """Reserved of a key's meter, headers made, settled."""
    counters = module.RateCounters()
    call, meters = counters.reserve, [counters.meter(f"key {i}", 6000, 1_000_000, 10) for i in range(keys)]

    def run() -> None:
        for i in range(operations):
            call(meters[i % keys], None, 50, 50, i * 0.01).settle(70, i * 0.01)

    return cpu(run), operations


def deque_reserve(keys: int, operations: int = 50_000) -> Measured:
    """A deque of times per key, a sliding minute: requests only, and memory for each."""
    names, used = [f"key {i}" for i in range(keys)], {}

    def call(name: str, now: float) -> bool:
        times = used.setdefault(name, deque())
        while times and times[0] <= now - 60:
            times.popleft()
        if len(times) >= 6000:
            return False
        times.append(now)
        return True

    def run() -> None:
        for i in range(operations):
            call(names[i % keys], i * 1e-3)

    return cpu(run), operations


# -- the table

Row = tuple[str, float, float, float | None, str]


def three(
    name: str,
    bench: Callable[..., Measured],
    native: ModuleType,
    pure: ModuleType,
    other: Bench | None,
    what: str,
    *args: Any,
) -> Row:
    """One operation, measured three ways."""
    figures = [best(lambda module=module: bench(module, *args)) for module in (native, pure)]  # type: ignore[misc]
    return name, figures[0], figures[1], best(other, 3) if other else None, what


def rows() -> Iterator[Row]:
    """Every line of the table, measured as it is asked for."""
    sem, sem_py = backend.module("weighted_semaphore"), _weighted_semaphore_py
    queue, queue_py = backend.module("fair_queue"), _fair_queue_py
    log, log_py = backend.module("backlog"), _backlog_py
    sse, sse_py = backend.module("sse"), _sse_py
    rate, rate_py = backend.module("rate_counters"), _rate_counters_py
    yield three("acquire + release, uncontended", uncontended, sem, sem_py, asyncio_uncontended, "asyncio.Semaphore")
    yield three("take + give, counting only", counting, sem, sem_py, None, "")
    for n in DEPTHS:
        yield three(f"wake, of {n:,} at once", wake, sem, sem_py, lambda n=n: asyncio_wake(n), "asyncio.Semaphore", n)
    for n in DEPTHS:
        yield three(f"park + cancel behind {n:,}", park_and_cancel, sem, sem_py, None, "", n)
    for n in DEPTHS:
        yield three(
            f"push + take, {n:,} waiting", queue_steady, queue, queue_py, lambda n=n: heap_steady(n), "heapq + dict", n
        )
    for n in DEPTHS:
        yield three(f"backlog: add + remove + gain, {n:,} waiting", backlog_steady, log, log_py, None, "", n)
    for n in (1, 200):
        yield three(f"scan an event, {n} per read", scan, sse, sse_py, lambda n=n: json_scan(n), "json.loads", n)
    for n in DEPTHS:
        yield three(
            f"reserve + settle, {n:,} keys", reserve, rate, rate_py, lambda n=n: deque_reserve(n), "dict + deque", n
        )


def main() -> None:
    """Measure, and print line by line."""
    if backend.REASONS:
        raise SystemExit(f"the native modules are what this measures, but the backend is {backend.describe()}")
    print(f"Python {platform.python_version()}, {platform.machine()}; ns of CPU per operation\n")
    print("| operation | native | pure twin | otherwise | pure / native | otherwise / native |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, native, pure, other, what in rows():
        otherwise = f"{other:,.0f} ({what})" if other else "-"
        ratio = f"{other / native:.1f}" if other else "-"
        print(f"| {name} | {native:,.0f} | {pure:,.0f} | {otherwise} | {pure / native:.1f} | {ratio} |", flush=True)
        if name.startswith("scan"):
            print(f"| ... as GB/s | {len(CHUNK) / native:.2f} | {len(CHUNK) / pure:.2f} |  |  |  |", flush=True)


if __name__ == "__main__":
    main()
