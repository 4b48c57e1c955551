"""A recorded life runs again with the same decisions; whatever is not the same is found."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest

from scheduler.commands import Admit
from scheduler.events import Arrived, EngineReady, Finished
from scheduler.model import DeviceSpec, ModelSpec, SchedulerSettings, Ticket
from scheduler.record import Difference, LogError, Opening, RecordedCore, Recorder, read_log, replay
from scheduler.sequences import LearnedStep
from scheduler.simulate.engine import REFERENCE, GiB, device
from scheduler.simulate.run import Simulation, endless_settings
from scheduler.simulate.traces import Request

OPENING = Opening((DeviceSpec("ram", "host", 1000),), (ModelSpec("a", 700, "host"),), SchedulerSettings())


def busy_life(path: Path, most_bytes: int = 1 << 30, *, anticipate: bool = False) -> int:
    """A simulated hour of many swaps, recorded; returns how many requests there were."""
    rng = random.Random(5)
    names = [f"m{i}" for i in range(8)]
    requests = [Request(0.3 * i, names[min(7, int(rng.expovariate(0.4)))], 20, rng.randrange(300)) for i in range(600)]
    specs = tuple(REFERENCE.specs(names))
    opening = Opening((device(72 * GiB),), specs, endless_settings(10.0, anticipate=anticipate))
    recorder = Recorder(path, opening, most_bytes)
    Simulation(RecordedCore(opening, recorder), REFERENCE.service_s, requests).run()
    recorder.close()
    return len(requests)


@pytest.mark.parametrize("anticipate", [False, True])
def test_a_replay_takes_the_same_decisions(tmp_path: Path, anticipate: bool) -> None:
    count = busy_life(tmp_path / "log", anticipate=anticipate)
    result = replay(tmp_path / "log")
    assert result.difference is None
    assert result.events >= 2 * count
    assert result.commands >= count


def test_what_was_learned_before_is_part_of_the_opening(tmp_path: Path) -> None:
    """b follows a, as earlier runs know: it is loaded before anybody asks for it, in the replay too."""
    specs = tuple(REFERENCE.specs("ab"))
    step = LearnedStep(8.0, (20.0, 1.0))
    opening = Opening((device(72 * GiB),), specs, endless_settings(10.0, anticipate=True), steps={"a": {"b": step}})
    recorder = Recorder(tmp_path / "log", opening)
    requests = [Request(0.0, "a", 0, 30), Request(20.0, "b", 0, 30)]
    outcome = Simulation(RecordedCore(opening, recorder), REFERENCE.service_s, requests).run()
    recorder.close()
    assert outcome.waits_s[1] == 0.0
    assert replay(tmp_path / "log").difference is None


def test_a_log_that_was_cut_off_is_whole_up_to_its_last_entry(tmp_path: Path) -> None:
    busy_life(tmp_path / "log")
    data = (tmp_path / "log").read_bytes()
    whole = replay(tmp_path / "log").events
    (tmp_path / "log").write_bytes(data[: len(data) * 2 // 3])
    part = replay(tmp_path / "log")
    assert part.difference is None
    assert 0.5 * whole < part.events < 0.8 * whole


def test_a_log_that_reaches_its_limit_says_so_once_and_is_whole_at_once(tmp_path: Path) -> None:
    said: list[str] = []
    recorder = Recorder(tmp_path / "log", OPENING, most_bytes=1 << 20, on_end=said.append)
    events = 0
    while not said:
        recorder.entry(float(events), Arrived(Ticket(events, "a" * 1000)), [])
        events += 1
    _, *entries = read_log(tmp_path / "log")  # though the server goes on
    assert len(entries) == events - 1
    recorder.entry(float(events), Arrived(Ticket(events, "a")), [])
    recorder.close()
    assert said == ["it has reached 1 MiB"]


def test_a_disk_that_is_full_ends_the_log_and_nothing_else() -> None:
    said: list[str] = []
    recorder = Recorder("/dev/full", OPENING, on_end=said.append)
    core, plain = RecordedCore(OPENING, recorder), OPENING.core()
    for number in range(1000):
        ticket = Ticket(number, "a")
        assert core.arrive(ticket, float(number)) == plain.arrive(ticket, float(number))
    recorder.close()
    assert said == ["No space left on device"]


def test_a_log_stops_at_its_limit_and_stays_good(tmp_path: Path) -> None:
    busy_life(tmp_path / "log", most_bytes=20_000)
    assert (tmp_path / "log").stat().st_size <= 20_000
    assert replay(tmp_path / "log").difference is None


def test_another_decision_is_found_with_what_was_and_what_is(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "log", OPENING)
    core = RecordedCore(OPENING, recorder)
    (load, *_) = core.step(Arrived(Ticket(1, "a")), 0.0)
    core.step(EngineReady(load.engine_id, "a", "ram", 1.0), 1.0)  # type: ignore[union-attr]
    recorder.entry(2.0, Arrived(Ticket(2, "a")), [Admit(2, "another#9")])
    recorder.close()
    difference = replay(tmp_path / "log").difference
    assert isinstance(difference, Difference)
    assert difference.number == 3
    assert difference.entry.commands == (Admit(2, "another#9"),)
    assert difference.replayed == (Admit(2, "a#1"),)


def test_the_hot_pair_is_recorded_once_each(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "log", OPENING)
    core = RecordedCore(OPENING, recorder)
    (load, *_) = core.arrive(Ticket(1, "a"), 0.0)
    core.step(EngineReady(load.engine_id, "a", "ram", 1.0), 1.0)  # type: ignore[union-attr]
    assert core.admit_now(Ticket(2, "a"), 2.0) is not None
    assert core.admit_now(Ticket(3, "nobody"), 2.0) is None
    core.finish(2, 3.0, 10, 20)
    core.cancel(1, 4.0)
    recorder.close()
    _, *entries = read_log(tmp_path / "log")
    assert [type(entry.event).__name__ for entry in entries] == [  # type: ignore[union-attr]
        "Arrived", "EngineReady", "Arrived", "Finished", "Cancelled",
    ]  # fmt: skip
    assert entries[3].event == Finished(2, 10, 20)  # type: ignore[union-attr]
    assert replay(tmp_path / "log").difference is None


@pytest.mark.parametrize("data", [b"", b"\0\0\0\5hello", b"\0\0\0\1\x90", b"\0\0\0\2{}"])
def test_what_is_no_log_is_said_plainly(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "log").write_bytes(data)
    with pytest.raises(LogError, match=str(tmp_path)):
        replay(tmp_path / "log")


def test_a_log_of_another_format_is_refused(tmp_path: Path) -> None:
    Recorder(tmp_path / "log", msgspec.structs.replace(OPENING, format=99)).close()
    with pytest.raises(LogError, match="format 99"):
        replay(tmp_path / "log")
