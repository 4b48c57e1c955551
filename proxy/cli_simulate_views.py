"""Tables and bars of `vramp simulate` and `vramp plan`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from msgspec import UNSET
from rich.console import Console, Group, RenderableType
from rich.progress import Progress
from rich.table import Table

from scheduler.simulate.contest import Result, Row, Trial
from scheduler.simulate.whatif import Forecast

LONG_RUN: Final = 2_000  # requests in all from which a bar is worth its line
HEADINGS: Final = (
    "policy", "on time", "of B2", "load / B1", "loads", "load s", "p50 s", "p99 s", "worst s", "gap", "run s",
)  # fmt: skip
WAKE_HEADINGS: Final = ("wakes", "wake s")
PLAN_HEADINGS: Final = (
    "machine", "on time", "refused", "loads", "load s", "wakes", "wake s", "p50 s", "p99 s", "worst s",
)  # fmt: skip


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr for a run of some length, where there is somebody to look at it."""
    if total < LONG_RUN or not sys.stderr.isatty():
        yield lambda _: None
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("simulating", total=total)
        yield lambda count: bar.advance(task, count)


def contest_view(trial: Trial, results: Sequence[Result]) -> RenderableType:
    """A line a policy; where the trace has several classes, their shares below."""
    memory, deadline = trial.memory_bytes / 2**30, trial.deadline_s
    title = f"{results[0].row.trace}: {len(trial.requests)} requests, {memory:g} GiB, on time within {deadline:g} s"
    sleeps = results[0].row.wakes is not UNSET
    table = _table(title, (*HEADINGS, *WAKE_HEADINGS) if sleeps else HEADINGS)
    for result in results:
        table.add_row(*_cells(result.row), *_wakes(result.row), style="bold" if result.row.default else "")
    classes = sorted({name for result in results for name in result.share_by_class})
    if len(classes) < 2:
        return table
    shares = _table("share on time per class", ("policy", *classes))
    for result in results:
        shares.add_row(_name(result.row), *(f"{result.share_by_class[name]:.3f}" for name in classes))
    return Group(table, shares)


def plan_view(trace: str, forecasts: Sequence[Forecast]) -> RenderableType:
    """A line a machine."""
    table = _table(f"{trace}: {forecasts[0].requests} requests", PLAN_HEADINGS)
    for each in forecasts:
        waits = (f"{wait:.1f}" for wait in (each.wait_p50_s, each.wait_p99_s, each.wait_worst_s))
        loads = (str(each.loads), f"{each.load_seconds:.0f}", str(each.wakes), f"{each.wake_seconds:.0f}")
        table.add_row(each.machine, f"{each.on_time_share:.3f}", str(each.refused), *loads, *waits)
    return table


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    return table


def _name(row: Row) -> str:
    return row.policy if row.setting is None else f"{row.policy} ({row.setting})"


def _cells(row: Row) -> tuple[str, ...]:
    ratios = ("" if ratio is None else f"{ratio:.3f}" for ratio in (row.on_time_over_b2, row.load_cost_over_b1))
    waits = (f"{wait:.1f}" for wait in (row.wait_p50_s, row.wait_p99_s, row.wait_worst_s))
    gap = "" if row.service_gap is None else f"{row.service_gap:.0f}"
    loads = (str(row.loads), f"{row.load_seconds:.0f}")
    return (_name(row), f"{row.on_time_share:.3f}", *ratios, *loads, *waits, gap, f"{row.run_s:.2f}")


def _wakes(row: Row) -> tuple[str, ...]:
    if row.wakes is UNSET or row.wake_seconds is UNSET:
        return ()
    return str(row.wakes), f"{row.wake_seconds:.0f}"
