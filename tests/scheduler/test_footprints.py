"""What is learned from starts, how it is kept, and what it changes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from scheduler.footprints import KEYS, STARTS, Footprints
from scheduler.kept_file import VERSION, KeptFile
from tests.scheduler.conftest import MakeWorld, MiB, World, kinds, spec


@pytest.mark.parametrize(
    ("sizes", "p90"), [([5], 5), ([1, 9, 2], 9), (list(range(1, 11)), 9), (list(range(1, 21)), 18)]
)
def test_the_90th_percentile_by_nearest_rank(sizes: list[int], p90: int) -> None:
    learned = Footprints()
    for number, size in enumerate(sizes):
        learned.note("m", "nvidia", f"m#{number}", size)
    assert learned.p90("m", "nvidia") == p90
    assert learned.p90("m", "host") is None


def test_of_one_start_the_most_counts_and_the_oldest_starts_are_forgotten() -> None:
    learned = Footprints()
    learned.note("m", "host", "m#0", 10)
    learned.note("m", "host", "m#0", 90)
    learned.note("m", "host", "m#0", 50)
    assert learned.figures() == {"host/m": [90]}
    for number in range(1, STARTS + 1):
        learned.note("m", "host", f"m#{number}", 20)
    assert learned.p90("m", "host") == 20
    assert learned.count("m", "host") == STARTS


def test_keys_are_bounded_and_the_least_recent_goes() -> None:
    learned = Footprints()
    for number in range(KEYS + 1):
        learned.note(f"m{number}", "host", "e#1", 1)
    assert len(learned) == KEYS
    assert learned.p90("m0", "host") is None


def test_it_is_kept_between_runs(tmp_path: Path) -> None:
    file = KeptFile(tmp_path / "state" / "footprints.json", list[int])
    assert file.load() == {}
    learned = Footprints()
    learned.note("m", "host", "m#1", 70)
    file.save(learned.figures())
    again = Footprints.of(file.load())
    assert again.p90("m", "host") == 70
    assert not again.changed
    again.note("m", "host", "m#1", 80)  # ids count from 1 in every run: another start
    assert again.figures() == {"host/m": [70, 80]}
    assert [each.name for each in (tmp_path / "state").iterdir()] == ["footprints.json"]


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00\xff", b'{"version": 1, "figures": {"a": "b"}}', b'{"version": 99, "figures": {}}', b"[]"],
)
def test_a_file_that_cannot_be_used_is_set_aside_with_a_warning(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "footprints.json"
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "vramp.scheduler"):
        assert KeptFile(path, list[int]).load() == {}
    assert "footprints.unusable" in caplog.text
    assert (tmp_path / "footprints.unusable").read_bytes() == content
    KeptFile(path, list[int]).save({"host/m": [1]})
    assert json.loads(path.read_bytes()) == {"version": VERSION, "figures": {"host/m": [1]}}


def lived(w: World, model: str, mib: int) -> str:
    """One start of the model, idle now, measured with so much."""
    ticket, (load,) = w.arrive(model)
    w.measured(engines={load.engine_id: mib * MiB})  # type: ignore[union-attr]
    w.ready(load)
    w.finish(ticket)
    return str(load.engine_id)  # type: ignore[union-attr]


def test_an_estimate_is_replaced_by_what_was_learned(world: MakeWorld) -> None:
    w = world(memory=1000, a=900, b=500)
    lived(w, "a", 400)
    assert w.core.models["a"].booked_bytes == 420 * MiB
    ticket, (stop,) = w.arrive("b")  # this start of a still has its promise of 900
    (load,) = w.stopped(stop)
    w.ready(load)
    w.finish(ticket)
    assert kinds(w.arrive("a")[1]) == ["load a"]  # beside b, now that it is known to be small


def test_a_stated_size_is_a_promise_that_only_grows_and_a_large_difference_is_said(world: MakeWorld) -> None:
    w = world(memory=2000, a=spec("a", 500, stated=True), b=spec("b", 500, stated=True))
    lived(w, "a", 300)
    assert w.core.models["a"].booked_bytes == 500 * MiB
    assert "memory_bytes is 500 MiB" in w.core.books.misjudged(w.core.models["a"])
    assert "more is kept" in w.core.books.misjudged(w.core.models["a"])
    lived(w, "b", 520)
    assert w.core.models["b"].booked_bytes == 546 * MiB
    assert w.core.books.misjudged(w.core.models["b"]) == ""


def test_a_start_that_failed_half_way_teaches_nothing(world: MakeWorld) -> None:
    w = world(a=700)
    _, (load,) = w.arrive("a")
    w.measured(engines={load.engine_id: 10 * MiB})  # type: ignore[union-attr]
    w.failed(load.engine_id)  # type: ignore[union-attr]
    assert w.core.models["a"].booked_bytes == 700 * MiB


def test_what_was_learned_makes_no_model_impossible_that_ran(world: MakeWorld) -> None:
    w = world(memory=1000, a=900)
    engine = lived(w, "a", 1100)  # more than there is: it ran all the same
    w.failed(engine)
    assert w.core.models["a"].booked_bytes == 1000 * MiB
    assert kinds(w.arrive("a")[1]) == ["load a"]
