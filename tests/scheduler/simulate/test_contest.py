"""Policies measured against each other and against what nobody can beat."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from scheduler.model import ModelSpec
from scheduler.policies.fifo import Fifo
from scheduler.simulate import bounds
from scheduler.simulate.arrival_order import load_cost
from scheduler.simulate.bounds import NoSolver, load_cost_bound, on_time_bound
from scheduler.simulate.contest import NAMES, POLICIES, Bounds, Trial, measure, percentile
from scheduler.simulate.engine import REFERENCE, GiB
from scheduler.simulate.gap import largest_service_gap
from scheduler.simulate.traces import Request

needs_solver = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("scipy"), reason="scipy is an extra (vramp[sim])"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds.tempfile, "gettempdir", lambda: str(tmp_path))


def traffic(seed: int, seconds: float = 60.0, models: int = 8) -> list[Request]:
    rng = random.Random(seed)
    now, out = 0.0, []
    while now < seconds:
        out.append(Request(now, f"m{min(models - 1, int(rng.expovariate(0.4)))}", 20, rng.randrange(300)))
        now += rng.expovariate(2.0)
    return out


def trial(seed: int = 1, memory_gib: int = 72) -> Trial:
    return Trial("t.csv", traffic(seed), REFERENCE, memory_gib * GiB, 10.0)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: f"{policy.name}-{policy.setting}")
def test_every_policy_serves_everybody_and_the_same_again(policy: object) -> None:
    rows = [measure(trial(), policy, None, lambda _: None).row for _ in range(2)]  # type: ignore[arg-type]
    rows[1].run_s = rows[0].run_s
    assert rows[0] == rows[1]
    assert rows[0].wait_worst_s < float("inf")
    assert rows[0].loads >= 8
    assert rows[0].load_seconds > 16.0
    assert rows[0].service_gap is None


def test_collate_beats_fifo_and_the_default_beats_both_where_memory_is_tight() -> None:
    shares = {
        (policy.name, policy.setting): measure(trial(), policy, None, lambda _: None).row.on_time_share
        for policy in POLICIES
        if policy.name in ("fifo", "collate", "vramp")
    }
    assert shares["fifo", None] < shares["collate", None] < shares["vramp", "tail"]
    assert set(NAMES) >= {"fifo", "collate", "slack", "lru", "lfu", "gdsf", "landlord", "idle_load_time", "adaptive"}


def test_on_time_includes_a_wait_of_exactly_the_deadline() -> None:
    requests = [Request(0.0, "a", 0, 6)]
    load_s = 2 + 5 * GiB / 20e9
    row = measure(
        Trial("t", requests, REFERENCE, 72 * GiB, load_s), POLICIES[1], Bounds(1.0, load_s), lambda _: None
    ).row
    assert (row.on_time_share, row.on_time_over_b2, row.load_cost_over_b1) == (1.0, 1.0, 1.0)


def belady(sequence: list[str], slots: int) -> int:
    resident: set[str] = set()
    loads = 0
    for at, name in enumerate(sequence):
        if name not in resident:
            loads += 1
            if len(resident) == slots:
                after = sequence[at + 1 :]
                resident.remove(max(resident, key=lambda m: after.index(m) if m in after else len(sequence)))
            resident.add(name)
    return loads


@needs_solver
@pytest.mark.parametrize("seed", range(5))
def test_the_load_cost_bound_is_beladys_for_equal_sizes(seed: int) -> None:
    rng = random.Random(seed)
    sequence = [f"m{rng.randrange(6)}" for _ in range(60)]
    models = {name: ModelSpec(name, 10, "x", load_estimate_s=3.0) for name in set(sequence)}
    requests = [Request(float(i), name) for i, name in enumerate(sequence)]
    assert load_cost_bound(requests, models, 30) == pytest.approx(3.0 * belady(sequence, 3))


@needs_solver
@pytest.mark.parametrize("seed", [1, 2])
def test_no_policy_beats_a_bound(seed: int) -> None:
    each = trial(seed)
    models = {spec.name: spec for spec in each.specs()}
    services = [REFERENCE.service_s(request) for request in each.requests]
    most = on_time_bound(each.requests, models, each.memory_bytes, 10.0, services)
    least = load_cost_bound(each.requests, models, each.memory_bytes)
    assert most <= len(each.requests) + 1e-6
    for policy in POLICIES:
        row = measure(each, policy, Bounds(most, least), lambda _: None).row
        assert row.on_time_over_b2 is not None
        assert row.on_time_over_b2 <= 1.0 + 1e-6
        assert row.load_cost_over_b1 is not None
        assert row.load_cost_over_b1 >= 1.0 - 1e-6


def best_on_time(requests: list[Request], loads_s: dict[str, float], deadline_s: float) -> int:
    """One model at a time fits: try every order of loads, each begun at once and kept until the next is due."""
    names = sorted(loads_s)
    best = 0
    for order in itertools.product(names, repeat=3):
        now, served = 0.0, set()
        for name in order:
            now = max(
                now, min((r.at_s for i, r in enumerate(requests) if r.model == name and i not in served), default=now)
            )
            now += loads_s[name]
            mine = [i for i, r in enumerate(requests) if r.model == name and i not in served and r.at_s <= now]
            served |= {i for i in mine if now - requests[i].at_s <= deadline_s}
        best = max(best, len(served))
    return best


@needs_solver
@pytest.mark.parametrize("seed", range(4))
def test_the_on_time_bound_is_above_the_best_of_all_orders(seed: int) -> None:
    rng = random.Random(seed)
    requests = sorted((Request(rng.uniform(0, 12), rng.choice("ab")) for _ in range(6)), key=lambda r: r.at_s)
    models = {name: ModelSpec(name, 10, "x", load_estimate_s=3.3) for name in "ab"}
    found = best_on_time(requests, {"a": 3.3, "b": 3.3}, 4.0)
    for slot_s in (0.5, 1.0):
        assert on_time_bound(requests, models, 10, 4.0, [0.0] * 6, slot_s) >= found - 1e-6


@needs_solver
def test_bounds_are_kept_between_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    each = trial()
    models = {spec.name: spec for spec in each.specs()}
    first = load_cost_bound(each.requests, models, each.memory_bytes)
    monkeypatch.setattr(bounds, "_solve_load_cost", lambda *_: 1 / 0)
    assert load_cost_bound(each.requests, models, each.memory_bytes) == first


def test_without_scipy_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr(bounds.importlib, "import_module", missing)
    models = {"a": ModelSpec("a", 10, "x")}
    with pytest.raises(NoSolver, match="pip install scipy"):
        load_cost_bound([Request(0.0, "a")], models, 10)


def test_the_load_cost_in_arrival_order_counts_every_return() -> None:
    each = Trial("t", [Request(float(i), name) for i, name in enumerate("abab")], REFERENCE, 28 * GiB, 10.0)
    sizes = {spec.name: spec.load_estimate_s for spec in each.specs()}
    cost = load_cost(each.core(Fifo(), POLICIES[0].eviction()), each.requests)
    assert cost == pytest.approx(2 * sizes["a"] + 2 * sizes["b"])  # 5 and 28 GiB do not fit together


def test_the_service_gap_counts_only_while_both_wait() -> None:
    def ask(at_s: float, tenant: str, tokens: int) -> Request:
        return Request(at_s, "m", 0, tokens, None, tenant)

    alone = [ask(0.0, "a", 900), ask(0.0, "a", 900), ask(50.0, "b", 10)]
    assert largest_service_gap(alone, [1.0, 2.0, 1.0]) == 0.0
    both = [ask(0.0, "a", 100), ask(0.0, "a", 100), ask(0.0, "b", 10), ask(0.0, "a", 100)]
    assert largest_service_gap(both, [1.0, 2.0, 3.0, 4.0]) == 200.0


def test_a_percentile_is_a_value_that_was_seen() -> None:
    assert percentile([1.0], 0.99) == 1.0
    assert percentile([float(i) for i in range(1, 101)], 0.99) == 99.0
    assert percentile([1.0, 2.0], 0.5) == 1.0
