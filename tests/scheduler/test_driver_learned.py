"""What was learned is there in the next run, however this one ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from scheduler import learned
from scheduler.core import Core
from scheduler.driver import Scheduler
from scheduler.handover import Leaver
from scheduler.learned import Learned
from scheduler.model import ModelSpec, SchedulerSettings
from tests.fakes import until
from tests.scheduler.test_driver_sleep import Card

MODELS = [ModelSpec(name, 100, "nvidia") for name in ("planner", "coder")]


class Run:
    """A scheduler without requests, of which a session is told."""

    def __init__(self, folder: Path) -> None:
        card = Card()
        self.path = folder / "sequences.json"
        self.learned = Learned(folder)
        steps = self.learned.steps.load()
        self.core = Core([card.spec], MODELS, SchedulerSettings(anticipate=True), steps=steps)
        self.scheduler = Scheduler(self.core, [card], card, {}, learned=self.learned)
        self._running = asyncio.create_task(self.scheduler.run())

    def session(self, *models: str) -> None:
        for number, model in enumerate(models):
            self.core.placement.sequences.saw(("ann", ""), model, float(number))

    async def reads(self) -> None:
        """The devices are read, and what is due is written."""
        self.scheduler._measure_soon.set()
        await until(lambda: not self.scheduler._measure_soon.is_set())

    async def ends(self) -> None:
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)


@pytest.fixture
async def first(tmp_path: Path) -> AsyncIterator[Run]:
    run = Run(tmp_path)
    await until(lambda: run.core.devices["gpu0"].used is not None)
    yield run
    await run.ends()


async def test_steps_are_written_at_the_end_and_known_in_the_next_run(first: Run, tmp_path: Path) -> None:
    first.session("planner", "coder")
    await first.ends()
    second = Run(tmp_path)
    second.core.placement.sequences.saw(("bob", ""), "planner", 0.0)
    assert second.core.placement.sequences.expected(0.5)["coder"].probability == 0.5
    await second.ends()


@pytest.mark.parametrize(("interval_s", "times"), [(60.0, 1), (0.0, 3)])
async def test_steps_are_written_while_it_runs_but_not_at_every_reading(
    first: Run, monkeypatch: pytest.MonkeyPatch, interval_s: float, times: int
) -> None:
    monkeypatch.setattr(learned, "STEPS_INTERVAL_S", interval_s)
    saved: list[object] = []
    monkeypatch.setattr(first.learned.steps, "save", saved.append)
    for _ in range(3):
        first.session("planner", "coder")
        await first.reads()
    assert len(saved) == times


async def test_of_a_model_that_the_configuration_no_longer_has_nothing_is_kept(first: Run, tmp_path: Path) -> None:
    first.learned.loaded("planner", 7.0)
    first.learned.loaded("gone", 9.0)
    await first.ends()
    again = Learned(tmp_path)
    assert again.expect(MODELS[0]).load_estimate_s == 7.0
    gone = ModelSpec("gone", 100, "nvidia")
    assert again.expect(gone) == gone


def test_times_that_cannot_be_used_are_learned_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "times.json").write_text('{"version":1,"figures":{"planner":{"load_s":-3.0}}}')
    assert Learned(tmp_path).expect(MODELS[0]) == MODELS[0]
    assert caplog.text.count("times are learned anew") == 1


async def test_who_has_handed_over_leaves_the_file_to_the_next_version(first: Run) -> None:
    await first.scheduler.settled()
    first.session("planner", "coder")
    first.scheduler.hand_over(Leaver.__new__(Leaver))
    await first.ends()
    assert not first.path.exists()


async def test_a_hand_over_begins_with_all_that_was_learned(first: Run) -> None:
    first.session("planner", "coder")
    await first.scheduler.settled()
    assert set(first.learned.steps.load()) == {"planner"}


async def test_a_folder_that_cannot_be_written_costs_a_warning(first: Run, caplog: pytest.LogCaptureFixture) -> None:
    first.session("planner", "coder")
    first.path.with_suffix(".new").mkdir()
    await first.ends()
    assert caplog.text.count("what was learned could not be written") == 1
