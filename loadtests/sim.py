"""The published comparison: every policy on the shared traces against the optimum, and the load cost of evictions.

    python loadtests/sim.py FOLDER        the folder with the trace files

Prints Markdown, as docs/scheduling.md keeps it.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from scheduler.policies.fifo import Fifo
from scheduler.simulate.arrival_order import load_cost
from scheduler.simulate.bounds import load_cost_bound
from scheduler.simulate.contest import POLICIES, Trial, bounds_of, measure
from scheduler.simulate.engine import REFERENCE, GiB
from scheduler.simulate.traces import TraceError, read_trace

LMSYS, SERVEGEN = "lmsys27_first300s.csv", "servegen_tail_requests_day2_10h.csv"
ORDER_ROWS = (
    (LMSYS, 300, 72, 10), (LMSYS, 300, 72, 30), (LMSYS, 300, 144, 10), (LMSYS, 300, 144, 30), (LMSYS, 300, 288, 10),
    (SERVEGEN, 300, 144, 30), (SERVEGEN, 300, 288, 30),
)  # fmt: skip
EVICTION_ROWS = (
    (LMSYS, 300, 72), (LMSYS, 300, 144), (LMSYS, 300, 288),
    (SERVEGEN, 600, 144), (SERVEGEN, 600, 288), (SERVEGEN, 600, 576),
)  # fmt: skip
ORDERINGS = [policy for policy in POLICIES if policy.name in ("fifo", "collate", "slack", "vramp")]
EVICTIONS = [  # the default's own is adaptive
    policy
    for policy in POLICIES
    if policy.name not in ("fifo", "collate", "slack", "adaptive") and policy.setting != "share"
]


def trial(folder: Path, name: str, until_s: float, memory_gib: int, deadline_s: float) -> Trial:
    return Trial(name, read_trace(folder / name, until_s), REFERENCE, memory_gib * GiB, deadline_s)


def orderings(folder: Path) -> None:
    print("| trace, memory, deadline | policy | on time | of B2 | p50 s | p99 s | of collate's | worst s |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, until_s, memory, deadline_s in ORDER_ROWS:
        each = trial(folder, name, until_s, memory, deadline_s)
        bounds = bounds_of(each)
        rows = [measure(each, policy, bounds, lambda _: None).row for policy in ORDERINGS]
        p99 = next(row.wait_p99_s for row in rows if row.policy == "collate")
        for row in rows:
            label = row.policy + (f", {row.setting}" if row.setting else "")
            waits = f"{row.wait_p50_s:.1f} | {row.wait_p99_s:.1f} | {row.wait_p99_s / p99:.2f} | {row.wait_worst_s:.0f}"
            where = f"{name.partition('_')[0]} {until_s} s, {memory} GiB, {deadline_s} s"
            print(f"| {where} | {label} | {row.on_time_share:.3f} | {row.on_time_over_b2:.3f} | {waits} |", flush=True)


def evictions(folder: Path) -> None:
    print("| trace, memory | " + " | ".join(policy.name for policy in EVICTIONS) + " |")
    print("| --- |" + " ---: |" * len(EVICTIONS))
    ratios: list[list[float]] = [[] for _ in EVICTIONS]
    for name, until_s, memory in EVICTION_ROWS:
        each = trial(folder, name, until_s, memory, 10.0)
        bound = load_cost_bound(each.requests, {spec.name: spec for spec in each.specs()}, each.memory_bytes)
        for policy, found in zip(EVICTIONS, ratios, strict=True):
            found.append(load_cost(each.core(Fifo(), policy.eviction()), each.requests) / bound)
        cells = " | ".join(f"{found[-1]:.2f}" for found in ratios)
        print(f"| {name.partition('_')[0]} {until_s} s, {memory} GiB | {cells} |", flush=True)
    means = " | ".join(f"{math.exp(sum(map(math.log, found)) / len(found)):.3f}" for found in ratios)
    print(f"| geometric mean | {means} |")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: make sim TRACES=FOLDER, the folder with " + LMSYS + " and " + SERVEGEN)
    folder = Path(sys.argv[1])
    try:
        evictions(folder)
        print()
        orderings(folder)
    except TraceError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
