"""Many streams: an event that is lost, doubled or out of order is seen, and a short run says so of none."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loadtests import canned
from loadtests.streams import Figures, Held, Numbered, Plan, report

ROOT = Path(__file__).resolve().parents[2]


class SilentTransport(asyncio.Transport):
    def write(self, data: object) -> None:
        pass

    def close(self) -> None:
        pass


async def seen(*numbers: int, expected: int, size: int = 1 << 20) -> Held:
    held = Held()
    stream = canned.STREAM_HEAD + b"".join(map(canned.numbered, numbers)) + canned.STREAM_END
    one = Numbered(b"", expected, held)
    one.connection_made(SilentTransport())
    for at in range(0, len(stream), size):
        one.data_received(stream[at : at + size])
    one.connection_lost(None)
    return held


@pytest.mark.parametrize("size", [1, 13, 300, 1 << 20])
async def test_a_whole_stream_in_any_pieces_is_whole(size: int) -> None:
    assert await seen(0, 1, 2, 3, expected=4, size=size) == Held(begun=1, whole=1, events=4)


@pytest.mark.parametrize("numbers", [(0, 2, 1, 3), (0, 1, 1, 2), (1, 2, 3)])
async def test_an_event_out_of_order_is_seen(numbers: tuple[int, ...]) -> None:
    assert (await seen(*numbers, expected=4)).reordered


async def test_a_stream_that_ends_early_is_lost() -> None:
    assert (await seen(0, 1, 2, expected=4)).lost == 1


async def test_a_stream_without_an_answer_is_lost_once() -> None:
    held = Held()
    one = Numbered(b"", 4, held)
    one.connection_made(SilentTransport())
    one.connection_lost(None)
    one.give_up()
    assert held == Held(lost=1)


def test_the_plan_lasts_until_the_last_stream_was_held_for_long_enough() -> None:
    plan = Plan(streams=10_000, seconds=300.0, every_s=2.0)
    assert (plan.opening_s, plan.events, plan.model) == (40.0, 170, "sse-170-2000")


def test_the_report_counts_memory_by_the_stream() -> None:
    said = report(Figures(100, 5.0, Held(whole=100), idle=50_000_000, open=51_000_000, after=52_500_000))
    assert "10.0 KB a stream" in said
    assert "+5%" in said


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(60)
def test_a_short_run_loses_and_reorders_nothing() -> None:
    options = ["--streams", "50", "--seconds", "1", "--every", "0.2", "--workers", "1", "--json"]
    short = "from loadtests import streams; streams.SETTLE_S = 0.5; streams.main()"
    run = subprocess.run(
        [sys.executable, "-c", short, *options], cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    figures = json.loads(run.stdout)
    assert figures["held"] == {"begun": 50, "whole": 50, "lost": 0, "reordered": 0, "events": 50 * 6}
