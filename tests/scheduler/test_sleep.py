"""Sleep, wake, and memory that must be seen to fall: given these events, exactly these commands."""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec
import pytest

from scheduler.commands import Command, Load, Sleep, Stop, Wake
from scheduler.core import Core
from scheduler.events import (
    Asleep,
    ConfigChanged,
    EngineFailed,
    EngineReady,
    EngineStopped,
    LoadAsked,
    MemoryMeasured,
    ProbeAnswered,
    UnloadAsked,
)
from scheduler.model import DeviceSpec, ModelSpec, Residency, SchedulerSettings, StopCause, Ticket
from tests.scheduler.conftest import MiB, World, kinds

GPU = DeviceSpec("gpu0", "nvidia", 1000 * MiB, frees_late=True)
SETTINGS = SchedulerSettings(sleep_memory_bytes=2000 * MiB, pressure_threshold=1.0)
KEEPS = 50


class Card(World):
    """A GPU whose reading the test writes: `held` in MiB by engine, and what nobody accounts for."""

    def __init__(self, settings: SchedulerSettings = SETTINGS, size: int = 700, **models: dict[str, object]) -> None:
        specs = [
            msgspec.structs.replace(
                ModelSpec(name, size * MiB, "nvidia", sleep_keeps_bytes=KEEPS * MiB, sleep_host_bytes=500 * MiB), **how
            )
            for name, how in models.items()
        ]
        super().__init__(Core([GPU], specs, settings))
        self.size = size
        self.held: dict[str, int] = {}

    def read(self, *, lost: int = 0, foreign: int = 0) -> list[Command]:
        """A reading: what the engines hold, a stranger's memory, and memory that came back to nobody."""
        used = sum(self.held.values()) + foreign + lost
        engines = {engine: size * MiB for engine, size in self.held.items()}
        return self.step(MemoryMeasured("gpu0", 1000 * MiB, used * MiB, (foreign + lost) * MiB, engines))

    def load(self, model: str, says: ProbeAnswered | None = None) -> str:
        """Bring a model in, let it say what it says, and leave it idle."""
        ticket, (load,) = self.arrive(model)
        assert isinstance(load, Load), load
        assert kinds(self.ready(load)) == [f"probe {model}"]
        self.held[load.engine_id] = self.size
        self.read()
        said = says or ProbeAnswered(load.engine_id, " Rome", -0.5)
        assert kinds(self.step(said)) == [f"admit {ticket}"]
        self.finish(ticket)
        return load.engine_id

    def sleep(self, engine: str, keeps: int = KEEPS) -> list[Command]:
        """The engine says that it sleeps, and the reading says that it holds so much."""
        self.held[engine] = keeps
        self.read()
        return self.step(Asleep(engine))

    def end(self, engine: str, *, lost: int = 0) -> list[Command]:
        """No process is left, and the reading is taken."""
        self.held.pop(engine, None)
        self.step(EngineStopped(engine))
        return self.read(lost=lost)

    def state(self, model: str) -> Residency:
        return self.core.models[model].state


@pytest.fixture
def card() -> Iterator[Card]:
    made = Card(a={}, b={})
    yield made
    made.core.check()


def asleep(card: Card) -> tuple[str, Command]:
    """a sleeps, b was loaded in its place; returns a's engine and b's load."""
    a = card.load("a")
    _, (command,) = card.arrive("b")
    assert kinds([command]) == ["sleep a"]
    (load,) = card.sleep(a)
    return a, load


def asleep_beside_an_idle_one(card: Card) -> tuple[str, str]:
    """a sleeps, and b served in its place and is idle; returns the engines of both."""
    a, load = asleep(card)
    assert isinstance(load, Load)
    assert kinds(card.ready(load)) == ["probe b"]
    card.held[load.engine_id] = card.size
    card.read()
    (admit,) = card.step(ProbeAnswered(load.engine_id, " x", -0.1))
    card.finish(admit.ticket_id)  # type: ignore[union-attr]
    return a, load.engine_id


def woken(card: Card) -> tuple[str, int]:
    """a slept, b came and sleeps now, a is wanted again and says that it is awake: it is asked what it says."""
    a, b = asleep_beside_an_idle_one(card)
    ticket, commands = card.arrive("a")
    assert kinds(commands) == ["sleep b"]
    (wake,) = card.sleep(b)
    assert wake == Wake(a, "1 waiting; it sleeps, and its memory is free")
    assert kinds(card.step(EngineReady(a, "a", "gpu0", 0.4))) == ["probe a"]
    return a, ticket


def test_an_evicted_engine_sleeps_and_the_next_is_loaded_when_its_memory_is_seen_to_fall(card: Card) -> None:
    a = card.load("a")
    _, commands = card.arrive("b")
    assert kinds(commands) == ["sleep a"]
    assert card.step(Asleep(a)) == []  # its word, and the old reading
    card.held[a] = KEEPS
    assert kinds(card.read()) == ["load b"]
    assert card.state("a") is Residency.ASLEEP


def test_who_waits_for_a_wake_is_told_what_is_left_of_it() -> None:
    card = Card(a={"wake_estimate_s": 20.0}, b={})
    _, b = asleep_beside_an_idle_one(card)
    ticket = Ticket(card.arrive("a")[0], "a")
    assert kinds(card.sleep(b)) == ["wake a"]
    begun_s = card.now
    assert card.core.quote(ticket, begun_s).eta.expected_s == pytest.approx(20.0)
    assert card.core.quote(ticket, begun_s + 15.0).eta.expected_s == pytest.approx(5.0)


def test_a_sleeper_is_woken_asked_and_serves(card: Card) -> None:
    a, ticket = woken(card)
    assert kinds(card.step(ProbeAnswered(a, " Rome", -0.52))) == [f"admit {ticket}"]
    assert card.state("a") is Residency.READY
    assert card.core.models["a"].wake_s == 0.4
    assert card.core.models["a"].loads == 1


@pytest.mark.parametrize(
    "said",
    [
        ProbeAnswered("", " Milan", -0.5),
        ProbeAnswered("", " Rome", -0.56),
        ProbeAnswered("", " Rome", math.nan),
        ProbeAnswered("", error="no answer within 60 s"),
    ],
)
def test_an_engine_that_does_not_wake_as_it_was_is_restarted_and_lets_nobody_in(
    card: Card, said: ProbeAnswered
) -> None:
    a, ticket = woken(card)
    (stop,) = card.step(msgspec.structs.replace(said, engine_id=a))
    assert isinstance(stop, Stop)
    assert stop.cause is StopCause.CORRUPT
    (load,) = card.end(a)
    assert kinds([load]) == ["load a"]
    assert kinds(card.ready(load)) == ["probe a"]
    assert isinstance(load, Load)
    assert kinds(card.step(ProbeAnswered(load.engine_id, " Rome", -0.5))) == [f"admit {ticket}"]


def test_what_was_corrupted_once_is_stopped_not_slept_until_a_pause_is_over(card: Card) -> None:
    a, ticket = woken(card)
    card.step(ProbeAnswered(a, " Milan", -0.5))
    (load,) = card.end(a)
    assert isinstance(load, Load)
    card.ready(load)
    card.step(ProbeAnswered(load.engine_id, " Rome", -0.5))
    card.finish(ticket)
    assert card.core.models["a"].sleepless
    card.tick(card.now + SETTINGS.backoff_first_s)
    assert not card.core.models["a"].sleepless


def test_a_sleep_that_keeps_its_memory_is_asked_again_then_killed_and_the_waiting_load_goes_on(card: Card) -> None:
    a = card.load("a")
    waits, _ = card.arrive("b")
    assert card.sleep(a, keeps=700) == []
    (again,) = card.tick(card.now + SETTINGS.fall_limit_s)
    assert isinstance(again, Sleep)
    assert again.cause is StopCause.LEAKED
    assert card.sleep(a, keeps=700) == []
    (kill,) = card.tick(card.now + SETTINGS.fall_limit_s)
    assert kinds([kill]) == ["kill a"]
    (load,) = card.end(a)
    assert kinds([load]) == ["load b"]
    card.ready(load)
    assert isinstance(load, Load)
    assert kinds(card.step(ProbeAnswered(load.engine_id, " x", -0.1))) == [f"admit {waits}"]


def test_a_stopped_engine_counts_until_the_reading_has_fallen() -> None:
    card = Card(SchedulerSettings(), a={}, b={})  # no sleep
    ticket, (load,) = card.arrive("a")
    assert isinstance(load, Load)
    assert kinds(card.ready(load)) == [f"admit {ticket}"]
    card.held[load.engine_id] = 700
    card.read()
    card.finish(ticket)
    assert kinds(card.arrive("b")[1]) == ["stop a"]
    assert card.step(EngineStopped(load.engine_id)) == []  # the driver frees it in its own time
    card.held.clear()
    assert card.read(lost=600) == []
    assert kinds(card.read(lost=20)) == ["load b"]


def test_memory_that_no_process_holds_is_tried_again_by_force_then_counted_as_foreign() -> None:
    card = Card(SchedulerSettings(), a={}, b={})
    ticket, (load,) = card.arrive("a")
    assert isinstance(load, Load)
    card.ready(load)
    card.held[load.engine_id] = 700
    card.read()
    card.finish(ticket)
    card.arrive("b")
    assert card.end(load.engine_id, lost=700) == []
    assert kinds(card.tick(card.now + 5.0)) == ["kill a"]
    assert card.end(load.engine_id, lost=700) == []
    assert card.tick(card.now + 5.0) == []
    assert card.state("a") is Residency.FAILED  # backed off: the next start would lose as much again
    assert card.core.devices["gpu0"].free == 300 * MiB
    refused, commands = card.arrive("a")
    assert kinds(commands) == [f"refuse {refused} load_failed"]
    assert kinds(card.read()) == ["load b"]  # the driver gave it back after all


def test_a_neighbour_that_goes_at_the_same_time_hides_no_leak() -> None:
    card = Card(SchedulerSettings(), size=400, a={}, b={}, c={"memory_bytes": 900 * MiB})
    engines = []
    for name in "ab":
        ticket, (load,) = card.arrive(name)
        assert isinstance(load, Load)
        card.ready(load)
        card.held[load.engine_id] = 400
        card.read()
        card.finish(ticket)
        engines.append(load.engine_id)
    assert sorted(kinds(card.arrive("c")[1])) == ["stop a", "stop b"]
    card.held.clear()
    card.step(EngineStopped(engines[0]))
    card.step(EngineStopped(engines[1]))
    assert card.read(lost=400) == []  # one of the two kept its memory: neither is believed
    assert kinds(card.read()) == ["load c"]


def test_an_engine_that_died_counts_until_its_memory_is_back() -> None:
    card = Card(SchedulerSettings(), a={}, b={})
    ticket, (load,) = card.arrive("a")
    assert isinstance(load, Load)
    card.ready(load)
    card.held[load.engine_id] = 700
    card.read()
    waits, commands = card.arrive("b")
    assert commands == []
    card.finish(ticket)
    card.held.clear()
    assert card.step(EngineFailed(load.engine_id, "killed by SIGKILL")) == []
    assert card.read(lost=650) == []
    assert kinds(card.read()) == ["load b"]
    card.cancel(waits)


def test_without_room_in_host_memory_the_victim_is_stopped_and_the_oldest_sleeper_makes_way(card: Card) -> None:
    card.step(ConfigChanged(tuple(m.spec for m in card.core.models.values()), msgspec.structs.replace(
        SETTINGS, sleep_memory_bytes=500 * MiB)))  # fmt: skip
    a, b = asleep_beside_an_idle_one(card)
    assert kinds(card.arrive("a")[1]) == ["stop b"]  # the one sleeper is the one that is wanted
    assert kinds(card.end(b)) == ["wake a"]
    assert card.core.books.sleep_memory.held == 500 * MiB
    card.step(UnloadAsked("a"))
    card.end(a)
    assert card.core.books.sleep_memory.held == 0


def test_a_sleeper_that_dies_is_cold_and_loads_again(card: Card) -> None:
    a, load = asleep(card)
    card.held.pop(a)
    card.step(EngineFailed(a, "killed by SIGKILL"))
    card.read()
    assert card.state("a") is Residency.COLD
    assert card.core.books.sleep_memory.held == 0
    assert isinstance(load, Load)


def test_an_operator_ends_a_sleeper_and_wakes_it(card: Card) -> None:
    a, b = asleep_beside_an_idle_one(card)
    assert kinds(card.step(LoadAsked("a"))) == ["sleep b"]
    assert kinds(card.sleep(b)) == ["wake a"]
    assert kinds(card.step(UnloadAsked("a"))) == ["stop a"]
    card.end(a)
    assert card.state("a") is Residency.COLD


def test_no_neighbour_leaves_while_one_starts_not_even_for_its_ttl_or_an_operator() -> None:
    card = Card(SETTINGS, size=300, a={"ttl_s": 10.0}, b={}, c={})
    a = card.load("a")
    b = card.load("b")
    _, (load,) = card.at(card.now + 9.0).arrive("c")
    assert isinstance(load, Load)
    assert card.tick(card.now + 5.0) == []
    assert card.step(UnloadAsked("b")) == []
    assert card.state("b") is Residency.DRAINING
    assert sorted(kinds(card.ready(load))) == ["probe c", "stop b"]
    assert kinds(card.tick(card.now + 2.0)) == ["stop a"]
    card.held.clear()
    card.step(EngineStopped(a))
    card.step(EngineStopped(b))


def starts_beside_a_sleeper() -> tuple[Card, str, Load]:
    """a sleeps, b serves, and c starts beside them."""
    card = Card(SETTINGS, a={}, b={}, c={"memory_bytes": 200 * MiB})
    a, _ = asleep_beside_an_idle_one(card)
    _, (start,) = card.arrive("c")
    assert isinstance(start, Load)
    return card, a, start


def test_a_sleeper_that_an_operator_unloads_goes_when_its_neighbour_has_started() -> None:
    card, a, start = starts_beside_a_sleeper()
    assert card.step(UnloadAsked("a")) == []
    assert card.state("a") is Residency.DRAINING
    assert sorted(kinds(card.ready(start))) == ["probe c", "stop a"]
    card.end(a)
    assert card.state("a") is Residency.COLD


def test_a_sleeper_that_a_reload_changes_goes_when_its_neighbour_has_started() -> None:
    card, a, start = starts_beside_a_sleeper()
    specs = [msgspec.structs.replace(m.spec, revision="new" if m.spec.name == "a" else "")
             for m in card.core.models.values()]  # fmt: skip
    assert card.step(ConfigChanged(tuple(specs), SETTINGS)) == []
    waits, commands = card.arrive("a")
    assert commands == [], "what sleeps is of the old configuration, and is not woken"
    assert "stop a" in kinds(card.ready(start))
    card.cancel(waits)
    card.end(a)


def test_want_of_memory_at_a_start_is_learned_from_and_tried_once_more_with_room_made() -> None:
    card = Card(SchedulerSettings(), size=300, a={}, b={}, c={"memory_bytes": 400 * MiB})
    engines = {}
    for name in "ab":
        ticket, (load,) = card.arrive(name)
        assert isinstance(load, Load)
        card.ready(load)
        engines[name] = load.engine_id
        card.finish(ticket)
    ticket, (load,) = card.arrive("c")
    assert isinstance(load, Load)
    (stop,) = card.step(EngineFailed(load.engine_id, "CUDA out of memory", out_of_memory=True))
    assert kinds([stop]) == ["stop a"]  # more is kept for it now, and 400 MiB were all there was
    assert card.core.models["c"].booked_bytes > 400 * MiB
    (again,) = card.stopped(stop)
    assert isinstance(again, Load)
    commands = card.step(EngineFailed(again.engine_id, "CUDA out of memory", out_of_memory=True))
    assert kinds(commands) == [f"refuse {ticket} load_failed"]


def test_a_victim_that_loses_its_host_memory_to_another_victim_is_stopped_once() -> None:
    tight = msgspec.structs.replace(SETTINGS, sleep_memory_bytes=900 * MiB)
    card = Card(tight, a={}, b={}, c={"memory_bytes": 1000 * MiB, "sleep_keeps_bytes": None})
    asleep_beside_an_idle_one(card)
    card.now += 10.0
    assert sorted(kinds(card.arrive("c")[1])) == ["stop a", "stop b"], "what b would need to sleep is a's"
