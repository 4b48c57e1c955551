"""Loaded before anybody asks: into idle memory, and given back to whoever asks as if it had never been taken."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
from msgspec import structs

from scheduler import anticipation
from scheduler.anticipation import LOOK_S, QUIET_S
from scheduler.commands import Command, Credit, Load, Probe, Sleep, Stop, Wake
from scheduler.core import Core
from scheduler.events import (
    Arrived,
    Asleep,
    ConfigChanged,
    CreditAsked,
    EngineFailed,
    EngineReady,
    EngineStopped,
    HolderCame,
    LoadAsked,
    ProbeAnswered,
    UnloadAsked,
)
from scheduler.model import DeviceSpec, ModelSpec, Residency, SchedulerSettings, StopCause, Ticket
from scheduler.simulate.engine import REFERENCE, GiB, device
from scheduler.simulate.run import Simulation, endless_settings
from scheduler.simulate.traces import Request
from tests.scheduler.conftest import MakeWorld, MiB, World, kinds

ON = SchedulerSettings(anticipate=True)


def look(w: World) -> list[Command]:
    """What the next look at the devices does."""
    return w.tick(w.now + LOOK_S)


def ask(w: World, model: str, session: str = "s") -> tuple[int, list[Command]]:
    """One request of a session."""
    w.tickets_asked = getattr(w, "tickets_asked", 1000) + 1  # type: ignore[attr-defined]
    ticket = Ticket(w.tickets_asked, model, tenant="ann", session=session)  # type: ignore[attr-defined]
    return ticket.id, w.step(Arrived(ticket))


def used(w: World, model: str, times: int = 5) -> None:
    """The model is known to be asked for."""
    w.resident(model)
    for _ in range(times):
        ticket, _ = w.arrive(model)
        w.now += 1.0
        w.finish(ticket)


def away(w: World, *models: str) -> None:
    """They are evicted for something large, which then leaves: memory is idle, and they are not there."""
    commands = w.step(LoadAsked("large"))
    while isinstance(commands[0], Stop):
        commands = [more for stop in commands for more in w.stopped(stop)]
    w.ready(commands[0])
    (stop,) = w.step(UnloadAsked("large"))
    w.stopped(stop)
    assert all(w.core.models[name].state is Residency.COLD for name in models)


def guessed(w: World, model: str) -> Load:
    """The model is loaded on a guess, because of its rate."""
    used(w, model)
    away(w, model)
    (load,) = look(w)
    assert isinstance(load, Load)
    assert load.model == model
    return load


def spec(name: str, mib: int, **settings: object) -> ModelSpec:
    return ModelSpec(name, mib * MiB, "gpu", **settings)  # type: ignore[arg-type]


@pytest.fixture
def hopeful() -> Iterator[Callable[..., World]]:
    """hopeful(a=700, b=700) makes a world that anticipates, with a model that needs all the memory besides."""
    made: list[World] = []

    def make(memory: int = 1500, kind: str = "gpu", **models: int | ModelSpec) -> World:
        specs = [
            structs.replace(spec(name, size) if isinstance(size, int) else size, device=kind)
            for name, size in {"large": 1400, **models}.items()
        ]
        made.append(World(Core([DeviceSpec("ram", kind, memory * MiB)], specs, ON)))
        return made[-1]

    yield make
    for each in made:
        each.core.check()


# ------------------------------------------------------------------ guessing


def test_what_is_asked_for_often_is_loaded_again_once_memory_is_idle(hopeful: Callable[..., World]) -> None:
    w = hopeful(a=700)
    load = guessed(w, "a")
    assert load.reason.startswith("guessed: asked about ")
    assert "times a minute, memory idle" in load.reason
    w.ready(load)
    ticket, commands = w.arrive("a")
    assert kinds(commands) == [f"admit {ticket}"]


def test_the_next_model_of_a_session_is_loaded_while_the_one_before_it_answers(hopeful: Callable[..., World]) -> None:
    w = hopeful(planner=600, coder=600)
    for _ in range(2):
        for name in ("planner", "coder"):
            ticket, commands = ask(w, name)
            if isinstance(commands[0], Load):
                w.ready(commands[0], 2.0)
            w.now += 1.0
            w.finish(ticket)
    away(w, "planner", "coder")
    w.now += 200.0  # by rate alone neither is worth it
    _, (load,) = ask(w, "planner", session="another")
    w.ready(load, 2.0)
    (early,) = look(w)
    assert kinds([early]) == ["load coder"]
    assert isinstance(early, Load)
    assert early.reason.startswith("guessed: sessions ask for it after planner (")


def test_of_two_models_the_one_whose_early_load_spares_more_waiting_is_guessed(hopeful: Callable[..., World]) -> None:
    w = hopeful(quick=spec("quick", 600, load_estimate_s=1.0), slow=spec("slow", 600, load_estimate_s=30.0))
    for name, seconds in (("quick", 1.0), ("slow", 30.0)):
        ticket, (load,) = w.arrive(name)
        w.ready(load, seconds)
        w.finish(ticket)
        for _ in range(5):
            ticket, _ = w.arrive(name)
            w.finish(ticket)
    away(w, "quick", "slow")
    assert kinds(look(w)) == ["load slow"]


def test_one_guess_at_a_time_loads_on_a_device(hopeful: Callable[..., World]) -> None:
    w = hopeful(a=600, b=600)
    used(w, "a")
    used(w, "b")
    away(w, "a", "b")
    (first,) = look(w)
    assert look(w) == []
    w.ready(first)
    assert [each.model for each in look(w) if isinstance(each, Load)] == ["b" if first.model == "a" else "a"]


def test_nothing_is_guessed_where_that_is_not_wanted(world: MakeWorld) -> None:
    w = world(memory=1500, large=1400, a=700)
    used(w, "a")
    away(w, "a")
    assert look(w) == []


def test_where_engines_compute_on_our_cores_a_guess_waits_until_they_rest(hopeful: Callable[..., World]) -> None:
    w = hopeful(kind="host", a=700, b=300)
    used(w, "a")
    away(w, "a")
    w.resident("b")
    running, _ = w.arrive("b")
    w.now += 60.0
    assert look(w) == []
    w.finish(running)
    assert look(w) == []
    w.now += QUIET_S
    assert kinds(look(w)) == ["load a"]


def test_where_engines_compute_on_our_cores_a_request_ends_a_guessed_load(hopeful: Callable[..., World]) -> None:
    w = hopeful(kind="host", a=700, b=300)
    used(w, "a")
    away(w, "a")
    w.resident("b")
    w.now += QUIET_S
    assert kinds(look(w)) == ["load a"]
    ticket, commands = w.arrive("b")
    assert kinds(commands) == [f"admit {ticket}"]
    (stop,) = look(w)
    assert kinds([stop]) == ["kill a"]
    w.stopped(stop)
    w.finish(ticket)


def test_nothing_leaves_for_a_guess(hopeful: Callable[..., World]) -> None:
    w = hopeful(a=700, other=1000)
    used(w, "a")
    away(w, "a")
    w.resident("other")
    assert look(w) == []


def test_nothing_is_guessed_that_would_put_the_device_under_pressure(hopeful: Callable[..., World]) -> None:
    w = hopeful(a=700)
    used(w, "a")
    away(w, "a")
    specs = (spec("large", 1400), spec("a", 700))
    w.step(ConfigChanged(specs, SchedulerSettings(anticipate=True, pressure_threshold=0.45)))
    assert look(w) == [], "of 1500 MiB 675 may be in use"
    w.step(ConfigChanged(specs, SchedulerSettings(anticipate=True, pressure_threshold=0.47)))
    assert kinds(look(w)) == ["load a"]


def test_nothing_is_guessed_while_somebody_waits_for_a_load_there(hopeful: Callable[..., World]) -> None:
    w = hopeful(a=300, waits=1300)
    used(w, "a")
    away(w, "a")
    w.measured(foreign=400 * MiB)
    assert w.arrive("waits")[1] == [], "a stranger has its memory"
    assert look(w) == []


def test_what_an_operator_unloaded_stays_away_until_somebody_asks(hopeful: Callable[..., World]) -> None:
    w = hopeful(a=700)
    used(w, "a")
    (stop,) = w.step(UnloadAsked("a"))
    w.stopped(stop)
    assert look(w) == []


def test_what_was_idle_for_its_whole_ttl_is_not_brought_back_by_rate(hopeful: Callable[..., World]) -> None:
    w = hopeful(a=spec("a", 700, ttl_s=10.0))
    used(w, "a")
    (stop,) = w.tick(w.now + 10.0)
    assert kinds([stop]) == ["stop a"]
    w.stopped(stop)
    assert look(w) == []


def test_a_model_that_did_not_start_is_left_to_somebody_who_wants_it(hopeful: Callable[..., World]) -> None:
    w = hopeful(a=700)
    load = guessed(w, "a")
    assert w.failed(load.engine_id) == []
    assert w.core.models["a"].state is Residency.COLD, "a guess that failed backs nothing off"
    assert look(w) == []
    assert kinds(w.arrive("a")[1]) == ["load a"]


def test_a_guess_that_ran_out_of_memory_leaves_the_model_its_second_try(hopeful: Callable[..., World]) -> None:
    w = hopeful(a=400)
    load = guessed(w, "a")

    w.step(EngineFailed(load.engine_id, "out of memory", out_of_memory=True))
    _, (real,) = w.arrive("a")
    assert isinstance(real, Load)
    again = w.step(EngineFailed(real.engine_id, "out of memory", out_of_memory=True))
    assert kinds(again) == ["load a"]


def test_a_reload_that_removes_a_guessed_model_ends_its_load(hopeful: Callable[..., World]) -> None:
    w = hopeful(a=700)
    guessed(w, "a")
    (stop,) = w.step(ConfigChanged((spec("large", 1400),), ON))
    assert kinds([stop]) == ["stop a"]
    w.stopped(stop)
    assert "a" not in w.core.models


def test_anticipation_can_be_switched_off_by_a_reload(hopeful: Callable[..., World]) -> None:
    w = hopeful(a=700)
    used(w, "a")
    away(w, "a")
    w.step(ConfigChanged((spec("large", 1400), spec("a", 700)), SchedulerSettings()))
    assert look(w) == []
    assert look(w) == []


# ---------------------------------------------------------------- giving way


def test_a_guessed_load_is_broken_off_at_once_for_a_real_one_beside_it(hopeful: Callable[..., World]) -> None:
    w = hopeful(a=700, real=600)
    load = guessed(w, "a")
    _, commands = w.arrive("real")
    assert kinds(commands) == ["kill a", "load real"], "in the same step: it loses nothing"
    (stop, _) = commands
    assert isinstance(stop, Stop)
    assert stop.engine_id == load.engine_id
    assert stop.cause is StopCause.WITHDRAWN
    assert "real is asked for" in stop.reason


def test_a_guessed_load_gives_its_memory_to_a_real_one(hopeful: Callable[..., World]) -> None:
    w = hopeful(a=700, real=1000)
    guessed(w, "a")
    ticket, commands = w.arrive("real")
    assert kinds(commands) == ["kill a"]
    (load,) = w.stopped(commands[0])
    assert kinds(w.ready(load)) == [f"admit {ticket}"]
    assert kinds(w.arrive("a")[1]) == [], "and then it is wanted like any other"


def test_late_news_of_a_guess_that_was_broken_off_changes_nothing(hopeful: Callable[..., World]) -> None:
    w = hopeful(a=700, real=1000)
    load = guessed(w, "a")
    _, (stop,) = w.arrive("real")
    assert w.ready(load, 0.1) == []
    assert kinds(w.stopped(stop)) == ["load real"]


def test_an_unused_guess_is_the_first_to_go_and_who_was_used_stays(hopeful: Callable[..., World]) -> None:
    w = hopeful(a=700, old=100, real=900)
    load = guessed(w, "a")
    w.ready(load)
    w.resident("old")
    w.now += 500.0  # by now `a` was ready for longer than anybody remembers, and `old` is as useless
    _, commands = w.arrive("real")
    assert kinds(commands) == ["kill a"]
    assert kinds(w.stopped(commands[0])) == ["load real"]
    assert w.core.models["old"].state is Residency.READY


def test_a_guess_that_was_used_is_a_resident_like_any_other(hopeful: Callable[..., World]) -> None:
    w = hopeful(a=700, real=700)
    load = guessed(w, "a")
    w.ready(load)
    ticket, _ = w.arrive("a")
    assert kinds(w.arrive("real")[1]) == ["load real"], "both fit"
    w.finish(ticket)
    assert not w.core.models["a"].guessed


def test_a_guessed_load_that_somebody_waits_for_is_not_broken_off(hopeful: Callable[..., World]) -> None:
    w = hopeful(a=700, real=1000)
    load = guessed(w, "a")
    ticket, commands = w.arrive("a")
    assert commands == []
    assert w.arrive("real")[1] == []
    assert kinds(w.ready(load))[0] == f"admit {ticket}"


def test_a_guess_that_an_operator_asks_for_is_kept(hopeful: Callable[..., World]) -> None:
    w = hopeful(a=700, real=700)
    load = guessed(w, "a")
    assert w.step(LoadAsked("a")) == []
    assert w.arrive("real")[1] == [], "it waits for a real start"
    assert kinds(w.ready(load)) == ["load real"]


def test_under_pressure_a_guess_goes_before_what_was_used(hopeful: Callable[..., World]) -> None:
    w = hopeful(a=700, old=300)
    load = guessed(w, "a")
    w.ready(load)
    w.resident("old")
    w.now += 10.0
    assert kinds(w.measured(foreign=500 * MiB)) == ["stop a"]
    assert w.core.models["old"].state is Residency.READY


def test_a_guessed_load_is_broken_off_under_pressure(hopeful: Callable[..., World]) -> None:
    w = hopeful(a=700)
    guessed(w, "a")
    assert kinds(w.measured(foreign=1000 * MiB)) == ["kill a"]


def test_an_operators_unload_does_not_wait_for_a_guess(hopeful: Callable[..., World]) -> None:
    w = hopeful(a=700, old=300)
    used(w, "a")
    away(w, "a")
    w.resident("old")
    assert kinds(look(w)) == ["load a"]
    assert kinds(w.step(UnloadAsked("old"))) == ["kill a", "stop old"]


def test_nobody_is_charged_for_a_guess(hopeful: Callable[..., World]) -> None:
    w = hopeful(a=700)
    load = guessed(w, "a")
    assert w.core.models["a"].cause is None
    w.ready(load)
    assert w.core.models["a"].shares is None


def test_no_credit_is_lent_on_an_unused_guess_so_that_it_can_go_at_once(hopeful: Callable[..., World]) -> None:
    w = hopeful(a=spec("a", 700, max_sequences=8), real=1000)
    load = guessed(w, "a")
    w.step(HolderCame(1))
    assert w.ready(load) == []
    assert w.step(CreditAsked(1, "a")) == []
    _, commands = w.arrive("real")
    assert kinds(commands) == ["kill a"]


def test_credit_is_lent_on_a_guess_once_it_is_used(hopeful: Callable[..., World]) -> None:
    w = hopeful(a=spec("a", 700, max_sequences=8))
    load = guessed(w, "a")
    w.step(HolderCame(1))
    w.ready(load)
    ticket, commands = w.arrive("a")
    commands += w.finish(ticket)
    commands += w.step(CreditAsked(1, "a"))
    assert any(isinstance(each, Credit) for each in commands)


def test_nothing_is_guessed_while_another_version_takes_over(hopeful: Callable[..., World]) -> None:
    w = hopeful(a=700)
    used(w, "a")
    away(w, "a")
    w.core.placement.pause()
    assert look(w) == []


def test_guesses_are_counted_by_what_became_of_them(hopeful: Callable[..., World]) -> None:
    w = hopeful(a=700, real=1000)
    load = guessed(w, "a")
    w.ready(load)
    ticket, _ = w.arrive("a")
    w.finish(ticket)
    look(w)
    guesses = w.core.placement.guesses
    assert (guesses.right, guesses.wrong, len(guesses)) == (1, 0, 0)
    away(w, "a")
    look(w)
    _, (stop,) = w.arrive("real")
    w.stopped(stop)
    look(w)
    assert (guesses.right, guesses.wrong, len(guesses)) == (1, 1, 0)


# ---------------------------------------------------------------------- sleep


class Sleepers:
    """Two models that sleep when they are evicted, on a device with room for one of them awake."""

    def __init__(self, **models: int) -> None:
        settings = SchedulerSettings(anticipate=True, sleep_memory_bytes=10_000 * MiB, pressure_threshold=1.0)
        specs = [
            ModelSpec(name, size * MiB, "gpu", sleep_keeps_bytes=10 * MiB, sleep_host_bytes=size * MiB)
            for name, size in models.items()
        ]
        self.world = World(Core([DeviceSpec("ram", "gpu", 1000 * MiB)], specs, settings))

    def obey(self, commands: list[Command]) -> list[Command]:
        """Engines do what they are told, all but loads and wakes; what is left to do is returned."""
        left: list[Command] = []
        while commands:
            command = commands.pop(0)
            match command:
                case Sleep(engine_id):
                    commands += self.world.step(Asleep(engine_id))
                case Probe(engine_id):
                    commands += self.world.step(ProbeAnswered(engine_id, " Rome", -0.5))
                case Stop(engine_id):
                    commands += self.world.step(EngineStopped(engine_id))
                case _:
                    left.append(command)
        return left

    def wake(self, command: Command) -> list[Command]:
        """The engine wakes as it was."""
        assert isinstance(command, Wake | Load)
        model = command.engine_id.partition("#")[0]
        return self.obey(self.world.step(EngineReady(command.engine_id, model, "ram", 1.0)))

    def serve(self, model: str, times: int = 1) -> None:
        """So many requests, one after the other; whoever is in the way sleeps."""
        for _ in range(times):
            ticket, commands = self.world.arrive(model)
            (command,) = self.obey(commands)
            if isinstance(command, Load | Wake):
                self.wake(command)
            self.world.now += 1.0
            self.world.finish(ticket)

    def state(self, model: str) -> Residency:
        return self.world.core.models[model].state


def sleeping() -> Sleepers:
    """`a` sleeps and is often asked for; `b`, which took its memory, has been unloaded."""
    sleepers = Sleepers(a=700, b=700, c=280, all=995)
    sleepers.serve("a", times=5)
    sleepers.serve("b")
    sleepers.obey(sleepers.world.step(UnloadAsked("b")))
    assert sleepers.state("a") is Residency.ASLEEP
    return sleepers


def test_a_sleeper_is_woken_before_anybody_asks() -> None:
    sleepers = sleeping()
    (wake,) = look(sleepers.world)
    assert isinstance(wake, Wake)
    assert wake.reason.startswith("guessed: ")
    sleepers.wake(wake)
    ticket, commands = sleepers.world.arrive("a")
    assert kinds(commands) == [f"admit {ticket}"]


def test_a_guessed_wake_is_not_broken_off_and_then_sleeps_again() -> None:
    sleepers = sleeping()
    (wake,) = look(sleepers.world)
    ticket, commands = sleepers.world.arrive("b")
    assert commands == [], "to kill what wakes would lose what slept"
    (load,) = sleepers.wake(wake)
    assert kinds([load]) == ["load b"]
    assert sleepers.state("a") is Residency.ASLEEP
    assert kinds(sleepers.wake(load)) == [f"admit {ticket}"]


def test_beside_a_guessed_wake_a_load_that_fits_takes_nothing_from_it() -> None:
    sleepers = sleeping()
    (wake,) = look(sleepers.world)
    assert sleepers.world.arrive("c")[1] == []
    assert kinds(sleepers.wake(wake)) == ["load c"]
    assert sleepers.state("a") is Residency.READY


@pytest.mark.parametrize("guessed", [False, True])
def test_a_guess_gives_up_what_it_would_keep_asleep_too(guessed: bool) -> None:
    sleepers = sleeping()
    if guessed:
        (wake,) = look(sleepers.world)
        sleepers.wake(wake)
    _, commands = sleepers.world.arrive("all")
    assert kinds(commands) == ["stop a"]
    assert kinds(sleepers.obey(commands)) == ["load all"]


# ----------------------------------------------------------- what a guess costs


PHANTOMS = ("never-1", "never-2", "never-3")


def bursty(seed: int) -> list[Request]:
    """Five models, each in bursts, for four minutes."""
    rng = random.Random(seed)
    requests = []
    for name in "abcde":
        at_s = rng.uniform(0.5, 40.0)
        while at_s < 240.0:
            for _ in range(rng.randrange(1, 12)):
                session = f"{name} at {at_s}"  # nobody comes twice, so that nothing is held back
                requests.append(Request(at_s, name, 0, rng.randrange(5, 400), session=session))
                at_s += rng.expovariate(1.0)
            at_s += rng.expovariate(1 / 25)
    return sorted(requests, key=lambda each: each.at_s)


def machine(seed: int, *, anticipate: bool) -> Core:
    """A machine for them, and for models that nobody will ever ask for and everybody is taken to."""
    rng = random.Random(seed)
    names = [*"abcde", *PHANTOMS]
    specs = REFERENCE.specs(names)
    rng.shuffle(specs)
    sized = [
        ModelSpec(
            name,
            each.memory_bytes,
            "gpu",
            max_sequences=rng.choice((4, 64)),
            max_queue=1 << 30,
            load_estimate_s=each.load_estimate_s,
        )
        for name, each in zip(names, specs, strict=True)
    ]
    devices = [DeviceSpec(f"gpu{n}", "gpu", rng.choice((72, 96)) * GiB) for n in range(1 + (seed % 3 == 0))]
    core = Core(devices, sized, endless_settings(10.0, anticipate=anticipate))
    for name in PHANTOMS:
        core.models[name].demand.count = 100_000
    return core


@pytest.mark.parametrize("seed", range(15))
def test_a_wrong_guess_makes_no_request_wait_a_moment_longer(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory comes back at once, as it does in the simulation: the rest of the price is that of any stop."""
    monkeypatch.setattr(anticipation, "may_be_guessed", lambda model: model.spec.name in PHANTOMS)
    requests = bursty(seed)
    plain, hopeful = machine(seed, anticipate=False), machine(seed, anticipate=True)
    without = Simulation(plain, REFERENCE.service_s, requests, one_link=False).run()
    loads: list[Load] = []
    found = Simulation(
        hopeful,
        REFERENCE.service_s,
        requests,
        one_link=False,
        observe=lambda each, _: loads.append(each) if isinstance(each, Load) else None,
    ).run()
    assert sum(load.model in PHANTOMS for load in loads) > 0
    assert found.waits_s == without.waits_s


def agents(seed: int) -> list[Request]:
    """Sessions that plan, write code three times and review it, over and over."""
    rng = random.Random(seed)
    requests = []
    for agent in range(2):
        at_s = rng.uniform(0.0, 20.0)
        for _ in range(12):
            for model in ("planner", "coder", "coder", "coder", "reviewer"):
                tokens = rng.randrange(60, 300)
                requests.append(Request(at_s, model, 0, tokens, session=f"agent {agent}"))
                at_s += 0.3 + tokens / 60 + rng.expovariate(1.0)
            at_s += rng.expovariate(1 / 30)
    return sorted(requests, key=lambda each: each.at_s)


def test_sessions_that_take_the_same_steps_again_and_again_wait_less() -> None:
    sizes = {"planner": 28, "coder": 40, "reviewer": 16}
    total = {True: 0.0, False: 0.0}
    right = wrong = 0
    for seed in range(8):
        for anticipate in (True, False):
            specs = [
                ModelSpec(name, size * GiB, "memory", max_queue=1 << 30, load_estimate_s=2.0 + size / 20)
                for name, size in sizes.items()
            ]
            core = Core([device(44 * GiB)], specs, endless_settings(10.0, anticipate=anticipate))
            total[anticipate] += sum(Simulation(core, REFERENCE.service_s, agents(seed)).run().waits_s)
            core.placement.guesses.settle()
            right += core.placement.guesses.right
            wrong += core.placement.guesses.wrong
    assert total[True] < 0.95 * total[False]
    assert right > wrong


def test_a_load_that_is_broken_off_leaves_its_link_and_the_rest_of_its_seconds() -> None:
    """The simulation's own books."""
    specs = [spec(name, 100, load_estimate_s=10.0) for name in ("first", "second", "hoped")]
    core = Core([DeviceSpec("ram", "gpu", 300 * MiB)], specs, endless_settings(10.0, anticipate=True))
    core.models["hoped"].demand.count = 1000
    outcome = Simulation(core, lambda _: 50.0, [Request(0.0, "first"), Request(13.0, "second")]).run()
    assert outcome.waits_s == [10.0, 10.0]
    assert outcome.loads == 4, "hoped was tried twice"
    assert outcome.load_seconds == pytest.approx(10.0 + (13.0 - 10.5) + 10.0 + 10.0, abs=2 * LOOK_S)


# ------------------------------------------------------------------- holding


def in_turns(w: World, rounds: int = 4) -> None:
    """Ann's loop asks for `a` again half a second after each answer; each takes a second."""
    for _ in range(rounds):
        ticket, commands = ask(w, "a", "loop")
        if isinstance(commands[0], Load):
            w.ready(commands[0])
        w.now += 1.0
        w.finish(ticket)
        look(w)


def contended(patience_s: float = 30.0, **how: float) -> World:
    """Memory for one of two models that take ten seconds to load."""
    settings = SchedulerSettings(anticipate=True, patience_s=(patience_s,) * 5)
    specs = [spec(name, 700, load_estimate_s=10.0, **how) for name in ("a", "b")]
    return World(Core([DeviceSpec("ram", "gpu", 1000 * MiB)], specs, settings))


def test_a_swap_waits_for_a_victim_that_is_about_to_be_used_again() -> None:
    w = contended()
    in_turns(w)
    assert ask(w, "b", "other")[1] == [], "a is idle, and would be the victim"
    assert w.core.placement.holding.held == 1
    ticket, commands = ask(w, "a", "loop")
    assert kinds(commands) == [f"admit {ticket}"]
    w.now += 1.0
    assert w.finish(ticket) == [], "and again"


def test_what_was_waited_for_in_vain_is_not_waited_for_any_longer() -> None:
    w = contended()
    in_turns(w)
    ask(w, "b", "other")
    assert w.wake_at is not None
    (stop,) = w.tick(w.now + 2.6)
    assert isinstance(stop, Stop)
    assert "held back for 2.6 s" in stop.reason
    assert kinds(w.stopped(stop)) == ["load b"]


def test_a_model_that_drained_serves_on_while_the_swap_is_held_back() -> None:
    w = contended()
    in_turns(w)
    running, _ = ask(w, "a", "loop")
    for number in range(3):
        assert ask(w, "b", f"other {number}")[1] == []
    assert w.core.models["a"].state is Residency.DRAINING
    w.now += 1.0
    assert w.finish(running) == []
    assert w.core.models["a"].state is Residency.READY
    ticket, commands = ask(w, "a", "loop")
    assert kinds(commands) == [f"admit {ticket}"]


def test_nobody_who_would_be_late_for_it_is_held_back() -> None:
    w = contended(patience_s=12.0)
    in_turns(w)
    assert kinds(ask(w, "b", "other")[1]) == ["stop a"]


def test_nobody_whose_deadline_it_would_break_is_held_back() -> None:
    w = contended()
    in_turns(w)
    ticket = Ticket(9999, "b", tenant="ann", session="other", deadline_s=w.now + 12.5)
    assert kinds(w.step(Arrived(ticket))) == ["stop a"]


def test_a_session_does_not_wait_for_what_it_will_do_after_this_swap() -> None:
    w = contended()
    for model in ("a", "b") * 3:
        ticket, commands = ask(w, model, "loop")
        (load,) = w.stopped(commands[0]) if isinstance(commands[0], Stop) else commands
        w.ready(load)
        w.now += 1.0
        w.finish(ticket)
        look(w)
    assert kinds(ask(w, "a", "loop")[1]) == ["stop b"], "b follows a, but not before it"


def test_many_who_wait_are_not_held_back_for_the_chance_to_save_one_reload() -> None:
    w = contended()
    in_turns(w)
    w.now -= LOOK_S
    for number in range(50):
        w.core.tickets.enqueue(Ticket(5000 + number, "b"), w.core.models["b"], w.now)
    assert kinds(w.step(LoadAsked("nothing"))) == ["stop a"]


def test_an_operator_is_not_held_back() -> None:
    w = contended()
    in_turns(w)
    assert kinds(w.step(LoadAsked("b"))) == ["stop a"]
