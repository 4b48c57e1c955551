"""The soak's own eyes, and two minutes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loadtests.soak import GROWTH_BYTES, SPARE_DESCRIPTORS, SPARE_THREADS, Figures, Sample, growth, is_ours

ROOT = Path(__file__).resolve().parents[2]
BEFORE = Sample(0.0, 50_000_000, 30, 9)


def samples(*mb: float) -> list[Sample]:
    return [Sample(float(at), int(size * 1e6), 30, 9) for at, size in enumerate(mb)]


def test_growth_is_that_of_the_second_half() -> None:
    assert growth(samples(10, 20, 30, 40, 50, 50, 50, 50)) == 0.0
    assert growth(samples(50, 50, 50, 50, 50, 51, 52, 53)) == pytest.approx(3e6)
    assert growth(samples(50)) == 0.0


def test_a_quiet_end_is_no_fault() -> None:
    assert Figures({"chat": 5, "left": 2}, BEFORE, BEFORE, 0.0, 0, 6).faults() == []


@pytest.mark.parametrize(
    ("figures", "says"),
    [
        (Figures({"wrong: chat: 500": 1}, BEFORE, BEFORE, 0.0, 0, 1), "1 x wrong: chat: 500"),
        (Figures({}, BEFORE, BEFORE, GROWTH_BYTES + 1.0, 0, 0), "memory grew"),
        (Figures({}, BEFORE, Sample(9.0, 1, 31 + SPARE_DESCRIPTORS, 9), 0.0, 0, 0), "descriptors: 30 before, 39 after"),
        (Figures({}, BEFORE, Sample(9.0, 1, 30, 10 + SPARE_THREADS), 0.0, 0, 0), "threads: 9 before"),
        (Figures({"chat": 5}, BEFORE, BEFORE, 0.0, 0, 4), "4 usage rows of 5 requests"),
        (Figures({"chat": 5}, BEFORE, BEFORE, 0.0, 0, 5, 1), "1 doubled"),
        (Figures({}, BEFORE, BEFORE, 0.0, 2, 0), "2 requests never ended"),
    ],
)
def test_every_kind_of_leak_is_a_fault(figures: Figures, says: str) -> None:
    assert says in " ".join(figures.faults())


def test_engines_are_not_ours() -> None:
    assert is_ours([sys.executable, "-m", "proxy.app", "--engine", "auto"])
    assert is_ours([sys.executable, "-m", "scheduler.engines.keeper"])
    assert not is_ours([sys.executable, "-m", "scheduler.engines.simulated_server"])


@pytest.mark.long
@pytest.mark.timeout(240)
def test_nothing_grows_and_nothing_is_lost_in_two_minutes_of_everything() -> None:
    argv = [sys.executable, "-m", "loadtests.soak", "--minutes", "2", "--json"]
    run = subprocess.run(argv, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert sum(json.loads(run.stdout)["outcomes"].values()) > 500
