"""Which model a session asks for next: learned from steps, forgotten with time, never without limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from scheduler import sequences
from scheduler.kept_file import KeptFile
from scheduler.model import Ticket
from scheduler.sequences import EPISODE_S, MOST_NEXT, LearnedStep, Sequences

ANN, BOB = ("ann", ""), ("bob", "")


def rounds(learned: Sequences, *models: str, times: int = 5, gap_s: float = 2.0, since_s: float = 0.0) -> float:
    """Ann asks for the models in turn, so many times; returns when she has asked for the last."""
    now = since_s
    for _ in range(times):
        for model in models:
            learned.saw(ANN, model, now)
            now += gap_s
    return now - gap_s


def test_what_followed_before_is_expected_when_it_came_before() -> None:
    learned = Sequences()
    last = rounds(learned, "planner", "coder")
    expected = learned.expected(last + 0.5)
    assert set(expected) == {"planner"}
    assert expected["planner"].probability > 0.75
    assert expected["planner"].at_s == pytest.approx(last + 2.0)
    assert expected["planner"].after == "coder"


def test_a_new_session_profits_from_those_before_it() -> None:
    learned = Sequences()
    rounds(learned, "planner", "coder")
    learned.saw(BOB, "planner", 1000.0)
    assert learned.expected(1000.0)["coder"].probability > 0.75


def test_one_sight_of_a_step_is_an_even_bet() -> None:
    learned = Sequences()
    learned.saw(ANN, "planner", 0.0)
    learned.saw(ANN, "coder", 2.0)
    learned.saw(BOB, "planner", 100.0)
    assert learned.expected(100.0)["coder"].probability == 0.5


def test_two_steps_from_one_model_share_the_chance() -> None:
    learned = Sequences()
    last = rounds(learned, "planner", "coder", "planner", "writer", times=8)
    learned.saw(ANN, "planner", last + 2.0)
    expected = learned.expected(last + 2.0)
    assert expected["coder"].probability == pytest.approx(expected["writer"].probability, abs=0.1)
    assert 0.4 < expected["coder"].probability < 0.6


def test_several_sessions_at_one_step_raise_the_chance_that_any_of_them_takes_it() -> None:
    learned = Sequences()
    learned.saw(ANN, "planner", 0.0)
    learned.saw(ANN, "coder", 2.0)
    for number in range(3):
        learned.saw((f"tenant {number}", ""), "planner", 100.0 + number)
    found = learned.expected(102.0)["coder"]
    assert found.probability == pytest.approx(1 - 0.5**3)
    assert found.at_s == pytest.approx(104.0), "the latest of equals says when"


def test_a_step_that_is_long_overdue_is_not_coming() -> None:
    learned = Sequences()
    last = rounds(learned, "planner", "coder", times=20)
    until_s = learned.expected(last)["planner"].until_s
    assert last + 2.0 < until_s < last + 6.0
    assert learned.expected(until_s + 0.01) == {}


def test_a_session_that_was_silent_for_long_begins_anew() -> None:
    learned = Sequences()
    learned.saw(ANN, "planner", 0.0)
    learned.saw(ANN, "coder", EPISODE_S + 1.0)
    learned.saw(ANN, "planner", EPISODE_S + 2.0)
    assert "coder" not in learned.expected(EPISODE_S + 2.0)
    assert learned.expected(3 * EPISODE_S) == {}


def test_new_habits_outweigh_old_ones() -> None:
    learned = Sequences()
    last = rounds(learned, "planner", "coder", times=1000)
    last = rounds(learned, "planner", "writer", times=60, since_s=last + 1.0)
    learned.saw(ANN, "planner", last + 2.0)
    expected = learned.expected(last + 2.0)
    assert expected["writer"].probability > 0.6 > expected["coder"].probability


def test_sessions_of_two_tenants_are_not_confused() -> None:
    learned = Sequences()
    for number in range(10):
        learned.saw(("ann", "s"), "planner", 10.0 * number)
        learned.saw(("bob", "s"), "writer", 10.0 * number + 1.0)
    assert "writer" not in {name for name, each in learned.expected(100.0).items() if each.after == "planner"}, (
        "bob's writer came after ann's planner, but it was bob's"
    )


def test_a_removed_model_is_forgotten() -> None:
    learned = Sequences()
    last = rounds(learned, "planner", "coder")
    learned.keep(["planner"])
    assert learned.expected(last) == {}


def kept(learned: Sequences, folder: Path, *models: str) -> Sequences:
    """What the next run knows of these models."""
    file = KeptFile(folder / "sequences.json", dict[str, LearnedStep])
    file.save(learned.steps())
    again = Sequences()
    again.restore(file.load(), models)
    return again


def test_steps_outlive_a_restart_and_sessions_do_not(tmp_path: Path) -> None:
    before = Sequences(lambda _model, at_s: at_s - 1.5)  # each answer ended that long before the next request
    last = rounds(before, "planner", "coder")
    after = kept(before, tmp_path, "planner", "coder")
    assert not after.changed
    assert after.expected(last) == {}
    for learned in (before, after):
        learned.saw(BOB, "planner", last + 1000.0)
    assert after.expected(last + 1000.0) == before.expected(last + 1000.0) != {}


def test_steps_of_models_that_the_configuration_no_longer_has_are_left_out(tmp_path: Path) -> None:
    learned = Sequences()
    rounds(learned, "planner", "coder", "planner", "writer")
    after = kept(learned, tmp_path, "planner", "writer")
    assert {name: set(steps) for name, steps in after.steps().items()} == {"planner": {"writer"}, "writer": {"planner"}}
    after.saw(BOB, "planner", 1000.0)
    assert after.expected(1000.0)["writer"].probability > 0.75


def test_what_is_kept_is_bounded_by_this_versions_limits() -> None:
    step = LearnedStep(1.0, (2.0, 1.0))
    learned = Sequences()
    many = {f"m{number}": step for number in range(3 * MOST_NEXT)}
    learned.restore({"planner": many}, ["planner", *many])
    assert len(learned.steps()["planner"]) == MOST_NEXT


@pytest.mark.parametrize("figure", ["-1.0", "1e300", '"soon"'])
def test_a_figure_that_cannot_be_is_not_believed(tmp_path: Path, figure: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "sequences.json"
    path.write_text(f'{{"version":1,"figures":{{"a":{{"b":{{"weight":1.0,"after_request":[{figure},0.0]}}}}}}}}')
    assert KeptFile(path, dict[str, LearnedStep]).load() == {}
    assert caplog.text.count("sequences are learned anew") == 1


def test_to_keep_what_was_learned_reads_nothing_early() -> None:
    """How long an answer took is looked up when an arrival is read: a replay, which keeps nothing, must find the
    same."""
    looked_up: list[str] = []
    learned = Sequences(lambda model, _at_s: looked_up.append(model))
    learned.note([(at_s, model, Ticket(1, model, tenant="ann")) for at_s, model in ((0.0, "planner"), (2.0, "coder"))])
    assert learned.steps() == {}
    assert looked_up == []
    learned.expected(2.0)
    assert learned.changed
    assert set(learned.steps()) == {"planner"}


def test_nothing_grows_without_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "MOST_SESSIONS", 50)
    learned = Sequences()
    for number in range(200):
        learned.saw(("tenant", str(number)), "planner", float(number))
        learned.saw(("tenant", str(number)), f"m{number % (3 * MOST_NEXT)}", number + 0.5)
    assert len(learned) == 50
    learned.saw(ANN, "planner", 200.0)
    expected = learned.expected(200.0)
    assert len(expected) <= MOST_NEXT
    assert all(0.0 <= each.probability <= 1.0 for each in expected.values())
