"""One policy on one trace, as a row of figures; and the policies by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from pathlib import Path

import msgspec

from scheduler.core import Core
from scheduler.eviction.adaptive import Adaptive
from scheduler.eviction.base import Eviction
from scheduler.eviction.delay import ExpectedDelay
from scheduler.eviction.gdsf import Gdsf
from scheduler.eviction.idle_load_time import IdleLoadTime
from scheduler.eviction.landlord import Landlord
from scheduler.eviction.lfu import Lfu
from scheduler.eviction.lru import Lru
from scheduler.model import ModelSpec
from scheduler.ordering import Ordering
from scheduler.policies.collate import Collate
from scheduler.policies.fifo import Fifo
from scheduler.policies.regret import SHARE_FIRST, TAIL_HELD, Regret
from scheduler.policies.slack import Slack
from scheduler.simulate.arrival_order import load_cost
from scheduler.simulate.bounds import load_cost_bound, on_time_bound
from scheduler.simulate.engine import Engine, device
from scheduler.simulate.gap import largest_service_gap
from scheduler.simulate.run import Outcome, Simulation, endless_settings
from scheduler.simulate.traces import Request

SLOTS_A_DEADLINE = 15  # of B2: finer is tighter and slower
LEAST_SLOT_S = 0.5
EDGE_S = 1e-9  # sums of floats: a wait of exactly the deadline is on time


class Policy(msgspec.Struct, frozen=True):
    """How to make one entrant. `setting` names a setting of the default policy."""

    name: str
    ordering: Callable[[], Ordering]
    eviction: Callable[[], Eviction]
    setting: str | None = None
    default: bool = False


POLICIES = (
    Policy("fifo", Fifo, Lru),
    Policy("collate", Collate, Lru),
    Policy("slack", Slack, Gdsf),
    Policy("lru", Collate, Lru),
    Policy("lfu", Collate, Lfu),
    Policy("gdsf", Collate, Gdsf),
    Policy("landlord", Collate, Landlord),
    Policy("idle_load_time", Collate, IdleLoadTime),
    Policy("delay", Collate, ExpectedDelay),
    Policy("adaptive", Collate, Adaptive),
    Policy("vramp", lambda: Regret(TAIL_HELD), Adaptive, "tail", default=True),
    Policy("vramp", lambda: Regret(SHARE_FIRST), Adaptive, "share"),
)
NAMES = tuple(dict.fromkeys(policy.name for policy in POLICIES))


class Trial(msgspec.Struct, frozen=True):
    """What all policies of a contest have in common."""

    trace: str
    requests: Sequence[Request]
    engine: Engine
    memory_bytes: int
    deadline_s: float
    anticipate: bool = False

    def specs(self) -> list[ModelSpec]:
        """The models of the trace."""
        return self.engine.specs(request.model for request in self.requests)

    def core(self, ordering: Ordering, eviction: Eviction, *, anticipate: bool = False) -> Core:
        """A fresh core over one device of the trial's memory."""
        sleep_memory = self.engine.sleep_memory_bytes
        settings = endless_settings(self.deadline_s, anticipate=anticipate, sleep_memory_bytes=sleep_memory)
        return Core([device(self.memory_bytes)], self.specs(), settings, ordering=ordering, eviction=eviction)


class Bounds(msgspec.Struct, frozen=True):
    """Of one trial: requests on time (B2) and load seconds in arrival order (B1)."""

    on_time: float
    load_cost_s: float


class Row(msgspec.Struct):
    """The figures of one policy; seconds and bytes. Ratios are null where there are no bounds; wakes are counted where
    engines sleep."""

    policy: str
    default: bool
    setting: str | None
    trace: str
    memory_bytes: int
    deadline_s: float
    requests: int
    on_time_share: float
    on_time_over_b2: float | None
    load_cost_over_b1: float | None
    loads: int
    load_seconds: float
    wait_p50_s: float
    wait_p99_s: float
    wait_worst_s: float
    service_gap: float | None
    run_s: float
    wakes: int | msgspec.UnsetType = msgspec.UNSET
    wake_seconds: float | msgspec.UnsetType = msgspec.UNSET


class Result(msgspec.Struct, frozen=True):
    """A row, and the share on time of every class that the trace has."""

    row: Row
    share_by_class: Mapping[str, float]


def bounds_of(trial: Trial) -> Bounds | None:
    """Both bounds, from the cache where they are known; None for engines that sleep, whose wakes they do not know.
    Raises NoSolver."""
    if trial.engine.sleep_memory is not None:
        return None
    models = {spec.name: spec for spec in trial.specs()}
    services = [trial.engine.service_s(request) for request in trial.requests]
    slot_s = max(LEAST_SLOT_S, trial.deadline_s / SLOTS_A_DEADLINE)
    return Bounds(
        on_time_bound(trial.requests, models, trial.memory_bytes, trial.deadline_s, services, slot_s),
        load_cost_bound(trial.requests, models, trial.memory_bytes),
    )


def measure(trial: Trial, policy: Policy, bounds: Bounds | None, progress: Callable[[int], None]) -> Result:
    """Run the policy: once with its ordering, and with bounds once in arrival order for its load cost alone."""
    begun = time.perf_counter()
    core = trial.core(policy.ordering(), policy.eviction(), anticipate=trial.anticipate)
    engine = trial.engine
    outcome = Simulation(core, engine.service_s, trial.requests, sleep_s=engine.sleep_s, progress=progress).run()
    cost_s = 0.0 if bounds is None else load_cost(trial.core(Fifo(), policy.eviction()), trial.requests)
    run_s = time.perf_counter() - begun
    waits = sorted(outcome.waits_s)
    on_time = sum(wait <= trial.deadline_s + EDGE_S for wait in waits)
    row = Row(
        policy=policy.name,
        default=policy.default,
        setting=policy.setting,
        trace=Path(trial.trace).name,
        memory_bytes=trial.memory_bytes,
        deadline_s=trial.deadline_s,
        requests=len(waits),
        on_time_share=on_time / len(waits),
        on_time_over_b2=None if bounds is None else on_time / bounds.on_time,
        load_cost_over_b1=None if bounds is None else cost_s / bounds.load_cost_s,
        loads=outcome.loads,
        load_seconds=outcome.load_seconds,
        wait_p50_s=percentile(waits, 0.5),
        wait_p99_s=percentile(waits, 0.99),
        wait_worst_s=waits[-1],
        service_gap=_gap(trial, outcome),
        run_s=run_s,
    )
    if engine.sleep_memory is not None:
        row.wakes, row.wake_seconds = outcome.wakes, outcome.wake_seconds
    return Result(row, _by_class(trial, outcome))


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of them does not exceed."""
    return ordered[max(0, ceil(share * len(ordered)) - 1)]


def _gap(trial: Trial, outcome: Outcome) -> float | None:
    if not any(request.tenant for request in trial.requests):
        return None
    return largest_service_gap(trial.requests, outcome.waits_s)


def _by_class(trial: Trial, outcome: Outcome) -> dict[str, float]:
    counts: dict[str, tuple[int, int]] = {}
    for request, wait in zip(trial.requests, outcome.waits_s, strict=True):
        name = request.latency_class.name.lower()
        on_time, everybody = counts.get(name, (0, 0))
        counts[name] = (on_time + (wait <= trial.deadline_s + EDGE_S), everybody + 1)
    return {name: on_time / everybody for name, (on_time, everybody) in counts.items()}
