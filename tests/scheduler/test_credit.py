"""Credit: room that another process fills without asking, and what the core makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from scheduler.commands import Credit, Revoke
from scheduler.core import Core
from scheduler.events import (
    Arrived,
    ConfigChanged,
    CreditAsked,
    CreditReported,
    EngineFailed,
    EngineReady,
    HolderCame,
    HolderGone,
    Served,
    UnloadAsked,
)
from scheduler.model import DeviceSpec, LatencyClass, ModelSpec, Residency, SchedulerSettings, Ticket
from scheduler.policies.fifo import Fifo
from scheduler.record import Opening, RecordedCore, Recorder, replay
from tests.scheduler.conftest import MakeWorld, MiB, World, kinds, spec

ONE, TWO = 1, 2  # holders


def come(world: World, *holders: int) -> list[Credit]:
    """Holders come; the credit they are given at once."""
    out = [command for holder in holders or (ONE,) for command in world.step(HolderCame(holder))]
    assert all(isinstance(command, Credit) for command in out)
    return out  # type: ignore[return-value]


def served(tenant: str = "t", since_s: float = 0.0, until_s: float = 1.0, **more: int) -> Served:
    return Served(tenant, LatencyClass.STANDARD, since_s, until_s, open_ended=True, **more)


def ready(world: MakeWorld, **of: int) -> World:
    w = world(a=spec("a", 700, **{"max_sequences": 8, "kv_tokens": 800, **of}), b=700)
    w.resident("a")
    return w


def test_who_comes_is_lent_a_part_of_what_is_free_and_half_stays_for_whoever_asks(world: MakeWorld) -> None:
    w = ready(world)
    (credit,) = come(w, ONE)
    assert (credit.holder, credit.model, credit.engine_id) == (ONE, "a", "a#1")
    assert (credit.sequences, credit.tokens) == (4, 400)
    assert credit.output_tokens == w.core.models["a"].output.tokens
    assert [each.sequences for each in come(w, TWO)] == [1, 1], "all who are there are given the same"
    ticket, commands = w.arrive("a", tokens=50)
    assert kinds(commands) == [f"admit {ticket}"]


def test_an_engine_that_becomes_ready_is_lent_to_all_who_are_there(world: MakeWorld) -> None:
    w = world(a=spec("a", 700, max_sequences=8))
    come(w, ONE, TWO)
    ticket, (load,) = w.arrive("a")
    admit, *lent = w.ready(load)
    assert kinds([admit]) == [f"admit {ticket}"]
    assert [(each.holder, each.sequences) for each in lent if isinstance(each, Credit)] == [(ONE, 1), (TWO, 1)]


def test_who_has_used_most_of_it_is_lent_more(world: MakeWorld) -> None:
    w = ready(world)
    come(w)
    w.step(CreditReported(ONE, "a#1", (("t", ""),) * 4, 4))
    (credit,) = w.step(CreditAsked(ONE, "a"))
    assert isinstance(credit, Credit)
    assert (credit.holder, credit.sequences, credit.tokens) == (ONE, 2, 200)


def test_a_model_that_is_not_ready_or_unknown_gives_no_credit(world: MakeWorld) -> None:
    w = ready(world)
    come(w)
    assert w.step(CreditAsked(ONE, "b")) == []
    assert w.step(CreditAsked(ONE, "no such")) == []
    assert w.step(CreditAsked(TWO, "a")) == [], "nor is there any for a stranger"


def test_an_order_of_arrival_over_all_models_gives_no_credit() -> None:
    w = World(Core([DeviceSpec("ram", "host", 1000 * MiB)], [spec("a", 700)], ordering=Fifo()))
    w.resident("a")
    assert come(w) == []
    assert w.step(CreditAsked(ONE, "a")) == []


def test_who_must_wait_has_the_credit_revoked_once_and_is_let_in_when_it_comes_back(world: MakeWorld) -> None:
    w = ready(world, max_sequences=2)
    come(w)
    w.arrive("a")
    first, commands = w.arrive("a")
    assert commands == [Revoke("a#1")]
    second, commands = w.arrive("a")
    assert commands == [], "nobody is told twice"
    assert w.step(CreditAsked(ONE, "a")) == [], "while somebody waits nobody gets credit"
    assert kinds(w.step(CreditReported(ONE, "a#1", (), 0, sequences=1, tokens=400))) == [f"admit {first}"]
    assert second in w.core.tickets.waiting


def test_when_nobody_waits_any_more_all_are_lent_again(world: MakeWorld) -> None:
    w = ready(world, max_sequences=3)
    come(w)
    tickets = [w.arrive("a")[0] for _ in range(3)]
    w.step(CreditReported(ONE, "a#1", (), 0, sequences=1, tokens=266))
    assert w.finish(tickets[0]) == [], "one that is free is no half of anything"
    (credit,) = w.finish(tickets[1])
    assert isinstance(credit, Credit)
    assert credit.sequences == 1


def test_a_victim_with_unused_credit_only_is_idle_and_goes_when_the_credit_is_back(world: MakeWorld) -> None:
    w = world(memory=1000, a=spec("a", 700, max_sequences=8), b=700)
    w.resident("a")
    (credit,) = come(w)
    waiting, commands = w.arrive("b")
    assert commands == [Revoke("a#1")]
    assert w.core.models["a"].state is Residency.DRAINING
    (stop,) = w.step(CreditReported(ONE, "a#1", (), 0, sequences=credit.sequences, tokens=credit.tokens))
    assert kinds([stop]) == ["stop a"]
    (load,) = w.stopped(stop)
    assert kinds(w.ready(load)[:1]) == [f"admit {waiting}"]


def test_what_is_in_use_of_credit_finishes_before_its_engine_stops(world: MakeWorld) -> None:
    w = ready(world)
    (credit,) = come(w)
    w.step(CreditReported(ONE, "a#1", (("t", ""),), 1))
    assert w.step(UnloadAsked("a")) == [Revoke("a#1")]
    rest = CreditReported(ONE, "a#1", (), 1, sequences=credit.sequences - 1, tokens=credit.tokens - 10)
    assert w.step(rest) == []
    assert kinds(w.step(CreditReported(ONE, "a#1", (), 0, (served(),), sequences=1, tokens=10))) == ["stop a"]


def test_reports_teach_what_tickets_teach(world: MakeWorld) -> None:
    w = ready(world)
    come(w)
    model = w.core.models["a"]
    before = model.engine.served if model.engine else 0
    many = tuple(served(prompt_tokens=10, output_tokens=2000) for _ in range(200))
    w.at(9.0).step(CreditReported(ONE, "a#1", (("t", ""),) * 200, 0, many))
    assert model.engine is not None
    assert model.engine.served == before + 200
    assert model.demand.mean_service_s() == pytest.approx(1.0, abs=0.1)
    assert model.demand.rate(9.0, 9.0) > 10
    assert model.output.tokens > 1000
    assert model.pace.tokens_per_s == pytest.approx(200 * 2010 / 1.0, rel=0.2)
    assert model.last_used_s == 9.0


def test_who_uses_a_load_on_credit_takes_over_a_share_of_its_price(world: MakeWorld) -> None:
    w = world(a=spec("a", 700, max_sequences=8))
    _, (load,) = w.arrive("a")
    w.ready(load)
    come(w)
    shares = w.core.models["a"].shares
    assert shares is not None
    w.step(CreditReported(ONE, "a#1", (("t", ""),), 0, (served("late"),)))
    assert shares.shares["late"] == shares.tokens // 2


def test_a_holder_that_dies_gives_back_everything_and_its_late_news_change_nothing(world: MakeWorld) -> None:
    w = ready(world, max_sequences=2)
    come(w)
    w.step(CreditReported(ONE, "a#1", (("t", ""),), 1))
    w.arrive("a")
    waiting, _ = w.arrive("a")
    assert kinds(w.step(HolderGone(ONE))) == [f"admit {waiting}"]
    assert w.step(CreditReported(ONE, "a#1", (), 0, sequences=1, tokens=400)) == []
    assert w.step(HolderGone(ONE)) == []


def test_a_holder_that_dies_is_forgotten_although_it_had_returned_all(world: MakeWorld) -> None:
    w = ready(world)
    (credit,) = come(w)
    w.step(CreditReported(ONE, "a#1", (), 0, sequences=credit.sequences, tokens=credit.tokens))
    w.step(HolderGone(ONE))
    engine = w.core.models["a"].engine
    assert engine is not None
    assert list(engine.credits) == []


def test_an_engine_that_dies_takes_its_credit_along(world: MakeWorld) -> None:
    w = ready(world)
    (credit,) = come(w)
    assert w.step(EngineFailed("a#1", "killed")) == [Revoke("a#1")]
    late = CreditReported(ONE, "a#1", (), 0, sequences=credit.sequences, tokens=credit.tokens)
    assert w.step(late) == []
    _, (load,) = w.arrive("a")
    assert kinds([load]) == ["load a"]


def test_a_smaller_engine_in_the_configuration_calls_credit_back(world: MakeWorld) -> None:
    w = ready(world)
    come(w)
    smaller = (spec("a", 700, max_sequences=3, kv_tokens=800), spec("b", 700))
    assert Revoke("a#1") in w.step(ConfigChanged(smaller, SchedulerSettings()))


def test_an_idle_engine_with_credit_out_is_stopped_after_its_time(world: MakeWorld) -> None:
    w = ready(world, ttl_s=20)
    (credit,) = come(w)
    assert w.tick(30.0) == [Revoke("a#1")]
    back = CreditReported(ONE, "a#1", (), 0, sequences=credit.sequences, tokens=credit.tokens)
    assert kinds(w.step(back)) == ["stop a"]


def test_what_was_let_in_from_credit_is_in_the_log_and_replays(tmp_path: Path) -> None:
    opening = Opening(
        (DeviceSpec("ram", "host", 1000 * MiB),),
        (ModelSpec("a", 700 * MiB, "host", max_sequences=8), ModelSpec("b", 700 * MiB, "host")),
        SchedulerSettings(),
    )
    recorder = Recorder(tmp_path / "log", opening)
    core = RecordedCore(opening, recorder)
    core.step(Arrived(Ticket(1, "a")), 0.0)
    core.step(EngineReady("a#1", "a", "ram", 1.0), 1.0)
    core.step(HolderCame(ONE), 1.0)
    core.step(CreditAsked(ONE, "a"), 1.0)
    core.step(CreditReported(ONE, "a#1", (("t", ""),), 0, (served(prompt_tokens=3, output_tokens=4),)), 2.0)
    core.step(Arrived(Ticket(2, "b")), 3.0)
    core.step(HolderGone(ONE), 4.0)
    recorder.close()
    played = replay(tmp_path / "log")
    assert played.difference is None
    assert played.events == 7


def test_what_sessions_ask_for_on_credit_is_learned(world: MakeWorld) -> None:
    w = world(settings=SchedulerSettings(anticipate=True), a=spec("a", 700, max_sequences=8), b=700)
    engines = [w.resident("a"), w.resident("b")]
    come(w)
    for turn in range(9):
        w.at(10.0 * turn).step(CreditReported(ONE, engines[turn % 2], (("t", "s"),), 0, (served(),)))
        w.tick(w.now + 5)
    assert w.core.placement.sequences.expected(w.now)["b"].after == "a"
