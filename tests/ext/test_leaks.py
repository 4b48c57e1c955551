"""A million cycles of coming, giving up and leaving must not move the memory that this process occupies."""

import gc

import psutil
import pytest

CYCLES = 1_000_000
ALLOWED_BYTES = 4 << 20  # noise of the allocator; one leaked ticket per cycle would be twenty times that

pytestmark = [pytest.mark.slow, pytest.mark.native, pytest.mark.timeout(300)]


def semaphore_cycle(twins):
    semaphore = twins.WeightedSemaphore(10, classes=2)

    def cycle(i):
        holder = semaphore.try_acquire(10)
        first = semaphore.park(4, priority=1, deadline_s=i + 0.5)
        second = semaphore.park(5, priority=0)
        semaphore.cancel(first) if i % 2 else semaphore.expire(i + 0.5)
        semaphore.release(holder)
        semaphore.release(second)

    return cycle


def queue_cycle(twins):
    queue = twins.FairQueue(limit=10)

    def cycle(i):
        queue.push(i, f"tenant {i % 5000}", 5, float(i), deadline_s=i + 0.5, prefix=i % 3)
        queue.push(-i - 1, "other", 50, float(i), latency_class=4)
        queue.cancel(i) if i % 2 else queue.take(10, 1, float(i))
        queue.take(100, 9, float(i))

    return cycle


def backlog_cycle(twins):
    backlog = twins.Backlog()

    def cycle(i):
        backlog.add(float(i), i + 10.0)
        backlog.add(float(i), i + 2.0)
        backlog.remove(float(i), i + 10.0) if i % 3 else backlog.remove(float(i), i + 2.0)
        if i % 100 == 99:
            for k in range(i - 99, i + 1):
                backlog.remove(float(k), k + 2.0 if k % 3 else k + 10.0)

    return cycle


def scanner_cycle(twins):
    scanner = twins.EventScanner(withhold_usage=True, max_event_bytes=100)
    pieces = [
        b'data: {"choices":[{"a":1}]',
        b'}\n\ndata: {"choices":[],"usage":{"a":1}}\n\n',
        b"x" * 150,
        b"\n\n",
        b"data: ",
    ]

    def cycle(i):
        scanner.feed(pieces[i % 5])

    return cycle


def counters_cycle(twins):
    counters = twins.RateCounters()

    def cycle(i):
        meter = counters.meter(f"key {i % 1000}", 10, 100, 1)
        counters.reserve(meter, None, 5, 0, float(i)).settle(3, float(i))
        counters.reserve(meter, meter, 101, 0, float(i))

    return cycle


@pytest.mark.parametrize("make", [semaphore_cycle, queue_cycle, backlog_cycle, scanner_cycle, counters_cycle])
def test_a_million_cycles_leave_memory_flat(twins, make):
    process, cycle = psutil.Process(), make(twins)
    cycles = CYCLES if twins.kind == "native" else CYCLES // 10
    for i in range(cycles // 10):
        cycle(i)
    gc.collect()
    before = process.memory_info().rss
    for i in range(cycles // 10, cycles + cycles // 10):
        cycle(i)
    gc.collect()
    assert process.memory_info().rss - before < ALLOWED_BYTES
