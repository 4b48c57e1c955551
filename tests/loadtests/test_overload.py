"""Overload: what the engine can do is done, and every refusal is a true one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loadtests.overload import SERVICE_S, SLOTS, Figures, report

ROOT = Path(__file__).resolve().parents[2]


def test_goodput_is_a_share_of_what_the_slots_can_do() -> None:
    figures = Figures(10.0, offered=100, good=round(10 * SLOTS / SERVICE_S), refusal_s=[0.001] * 99 + [0.5])
    assert figures.goodput == 1.0
    assert "p50 1.0 ms" in report(figures)
    assert "p99 500.0 ms" in report(figures)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(60)
def test_what_cannot_be_done_is_refused_and_nothing_is_lost() -> None:
    short = "from loadtests import overload; overload.WARM_S = 1.0; overload.main()"
    run = subprocess.run(
        [sys.executable, "-c", short, "--seconds", "2", "--rate", "400", "--json"],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    figures = json.loads(run.stdout)
    assert figures["wrong"] == 0
    assert figures["good"] > 0
    assert len(figures["refusal_s"]) > 0
