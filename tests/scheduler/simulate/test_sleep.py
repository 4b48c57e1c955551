"""Engines that sleep, in virtual time: how long it takes, over which link, and into how much host memory."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest

from scheduler.core import Core
from scheduler.engines.estimate import copy_s
from scheduler.model import DeviceSpec, ModelSpec
from scheduler.policies.collate import Collate
from scheduler.simulate.contest import POLICIES, Policy, Trial, bounds_of, measure
from scheduler.simulate.engine import REFERENCE, EngineFileError, GiB, read_engine
from scheduler.simulate.run import Outcome, Simulation, endless_settings
from scheduler.simulate.traces import Request

LOAD_S, SLEEP_S, WAKE_S = 30.0, 2.0, 3.0


def run(names: str, *, host: int, every_s: float = 100.0, memory: int = 100, **sizes: int) -> Outcome:
    """One request after the other, each of a second, for models of so many bytes (70 unless it is said) on a memory of
    100, with so much host memory to sleep in."""
    models = [
        ModelSpec(
            name,
            sizes.get(name, 70),
            "memory",
            load_estimate_s=LOAD_S,
            sleep_keeps_bytes=5,
            sleep_host_bytes=sizes.get(name, 70) - 5,
            wake_estimate_s=WAKE_S,
        )
        for name in sorted(set(names))
    ]
    settings = endless_settings(10.0, sleep_memory_bytes=host)
    core = Core([DeviceSpec("memory", "memory", memory)], models, settings, ordering=Collate())
    requests = [Request(every_s * index, name, duration_s=1.0) for index, name in enumerate(names)]
    outcome = Simulation(core, lambda request: request.duration_s or 0.0, requests, sleep_s=lambda _: SLEEP_S).run()
    core.check()
    return outcome


def test_an_evicted_engine_copies_out_and_its_next_use_copies_it_in() -> None:
    outcome = run("abab", host=200)
    assert outcome.waits_s == [LOAD_S, SLEEP_S + LOAD_S, SLEEP_S + WAKE_S, SLEEP_S + WAKE_S]
    assert (outcome.loads, outcome.wakes) == (2, 2)
    assert (outcome.load_seconds, outcome.wake_seconds) == (2 * LOAD_S, 2 * WAKE_S)


def test_without_host_memory_an_eviction_is_a_stop_and_takes_no_time() -> None:
    outcome = run("abab", host=0)
    assert outcome.waits_s == [LOAD_S] * 4
    assert (outcome.loads, outcome.wakes) == (4, 0)


def test_host_memory_for_one_sleeper_saves_the_loads_of_one_model() -> None:
    outcome = run("abab", host=65)
    assert outcome.waits_s == [LOAD_S, SLEEP_S + LOAD_S, WAKE_S, SLEEP_S + LOAD_S], "b is stopped, at once; a sleeps"
    assert (outcome.loads, outcome.wakes) == (3, 1)


def test_two_that_fall_asleep_share_the_link() -> None:
    outcome = run("abc", host=200, a=45, b=45, c=90)
    assert outcome.waits_s == [LOAD_S, LOAD_S, 2 * SLEEP_S + LOAD_S]


def random_model(rng: random.Random, name: str, devices: int) -> ModelSpec:
    size = rng.choice((50, 200, 400, 700, 900, 950))
    load_s = rng.choice((0.5, 5.0, 30.0))
    return ModelSpec(
        name,
        size,
        "memory",
        max_sequences=rng.choice((1, 4, 64)),
        load_estimate_s=load_s,
        devices_needed=2 if devices > 1 and rng.random() < 0.15 else 1,
        sleep_keeps_bytes=rng.choice((None, 10, 30, 100, size)),
        sleep_host_bytes=rng.choice((0, size)),
        wake_estimate_s=rng.choice((None, 0.1, load_s, 2 * load_s)),
        ttl_s=rng.choice((None, None, 30.0)),
    )


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: f"{policy.name}-{policy.setting}")
@pytest.mark.parametrize("seed", range(3))
def test_everybody_is_served_whatever_sleeps(policy: Policy, seed: int) -> None:
    """Kept bytes, scarce host memory, wakes dearer than loads, engines on two devices, guesses: nothing waits in a
    circle."""
    rng = random.Random(f"{policy.name} {policy.setting} {seed}")
    devices = rng.choice((1, 2, 3))
    models = [random_model(rng, f"m{n}", devices) for n in range(rng.choice((3, 6, 12)))]
    settings = msgspec.structs.replace(
        endless_settings(10.0, anticipate=rng.random() < 0.5, sleep_memory_bytes=rng.choice((0, 300, 1000, 5000))),
        pressure_threshold=rng.choice((0.9, 1.0)),
    )
    memory = [DeviceSpec(f"memory{n}", "memory", 1000, rng.choice((0, 50))) for n in range(devices)]
    core = Core(memory, models, settings, ordering=policy.ordering(), eviction=policy.eviction())
    now, requests = 0.0, []
    for _ in range(100):
        now += rng.expovariate(rng.choice((0.1, 1.0)))
        requests.append(Request(now, rng.choice(models).name, duration_s=rng.choice((0.1, 1.0, 10.0))))
    outcome = Simulation(core, lambda request: request.duration_s or 0.0, requests).run()
    core.check()
    assert max(outcome.waits_s) < float("inf")


def test_the_reference_engine_does_not_sleep() -> None:
    assert REFERENCE.sleep_memory_bytes == 0
    assert all(spec.sleep_keeps_bytes is None for spec in REFERENCE.specs("abc"))


def test_an_engine_file_says_how_fast_its_engines_sleep_and_wake(tmp_path: Path) -> None:
    path = tmp_path / "engine.toml"
    path.write_text('sizes = ["24GiB"]\nsleep_memory = "64GiB"\nsleep_base_s = 0.0\nsleep_bytes_per_s = 11e9\n')
    engine = read_engine(str(path))
    (spec,) = engine.specs("a")
    assert (spec.sleep_keeps_bytes, spec.sleep_host_bytes) == (2 * GiB, 22 * GiB)
    assert engine.sleep_memory_bytes == 64 * GiB
    assert engine.sleep_s(spec) == pytest.approx(22 * GiB / 11e9)
    assert spec.wake_estimate_s == pytest.approx(copy_s(22 * GiB)), "what is not said is vLLM's"
    path.write_text('sleep_memory = "plenty"\n')
    with pytest.raises(EngineFileError, match="'plenty' is not a size"):
        read_engine(str(path))


def test_a_copy_takes_what_was_published() -> None:
    assert copy_s(61 * 10**9) == pytest.approx(2.87, rel=0.05)
    assert copy_s(235 * 10**9, cards=4) == pytest.approx(5.5, rel=0.05)
    assert copy_s(1.2 * 10**9) == pytest.approx(0.26, rel=0.05)  # type: ignore[arg-type]


def test_a_row_counts_wakes_where_engines_sleep_and_only_there() -> None:
    requests = [Request(60.0 * index, "ab"[index % 2], 0, 60) for index in range(10)]
    sleeper = msgspec.structs.replace(REFERENCE, sizes=(40 * GiB,), load_base_s=40.0, sleep_memory="128GiB")
    default = next(policy for policy in POLICIES if policy.default)
    rows = {
        engine.sleep_memory: measure(Trial("t", requests, engine, 72 * GiB, 10.0), default, None, lambda _: None).row
        for engine in (sleeper, msgspec.structs.replace(sleeper, sleep_memory=None))
    }
    asleep, stopped = rows["128GiB"], rows[None]
    assert (asleep.loads, asleep.wakes, stopped.loads) == (2, 8, 10)
    assert asleep.on_time_share > stopped.on_time_share
    assert b"wakes" in msgspec.json.encode(asleep)
    assert b"wakes" not in msgspec.json.encode(stopped)
    assert bounds_of(Trial("t", requests, sleeper, 72 * GiB, 10.0)) is None
