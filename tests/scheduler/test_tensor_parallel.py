"""Engines that need several devices take all at once or none, and wait for nobody while they hold something."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from scheduler.commands import Load, Refuse, Stop
from scheduler.core import Core
from scheduler.events import EngineFailed, EngineReady, EngineStopped
from scheduler.model import DeviceSpec, ModelSpec, RefusalCode
from scheduler.ordering import Ordering
from scheduler.policies.fifo import Fifo
from scheduler.policies.regret import Regret
from tests.scheduler.conftest import MiB, World, kinds


def gpus(count: int, *specs: ModelSpec, ordering: Ordering | None = None) -> World:
    return World(Core([DeviceSpec(f"gpu{n}", "nvidia", 1000 * MiB) for n in range(count)], specs, ordering=ordering))


def model(name: str, mib: int, devices: int = 1) -> ModelSpec:
    return ModelSpec(name, mib * MiB, "nvidia", devices_needed=devices, revision=name)


@pytest.fixture
def pair() -> Iterator[World]:
    made = gpus(2, model("wide", 700, 2), model("a", 700), model("b", 700))
    yield made
    made.core.check()


def test_it_takes_both_devices_and_gives_both_back(pair: World) -> None:
    ticket, (load,) = pair.arrive("wide")
    assert isinstance(load, Load)
    assert (load.device, load.partners) == ("gpu0", ("gpu1",))
    assert {each.starting for each in pair.core.devices.values()} == {load.engine_id}
    assert kinds(pair.ready(load)) == [f"admit {ticket}"]
    assert [each.free for each in pair.core.devices.values()] == [300 * MiB] * 2
    pair.finish(ticket)
    (stop,) = pair.arrive("a")[1]
    assert kinds(pair.stopped(stop)) == ["load a"]
    assert sum(each.held for each in pair.core.devices.values()) == 700 * MiB


def test_it_promises_nothing_until_there_is_room_on_all_of_them(pair: World) -> None:
    a, (load_a,) = pair.arrive("a")
    pair.ready(load_a)
    pair.arrive("wide")
    assert sum(each.held for each in pair.core.devices.values()) == 700 * MiB
    (stop,) = pair.finish(a)
    (load,) = pair.stopped(stop)
    assert isinstance(load, Load)
    assert load.partners == ("gpu1",)


def test_victims_on_both_devices_go_together(pair: World) -> None:
    for name in "ab":
        ticket, (load,) = pair.arrive(name)
        pair.ready(load)
        pair.finish(ticket)
    _, stops = pair.arrive("wide")
    assert sorted(kinds(stops)) == ["stop a", "stop b"]
    assert pair.stopped(stops[0]) == []
    assert kinds(pair.stopped(stops[1])) == ["load wide"]


@pytest.mark.parametrize("ordering", [Fifo, Regret])
def test_it_does_not_take_back_the_room_that_was_made_on_one_of_them(ordering: type[Ordering]) -> None:
    narrow = ModelSpec("narrow", 700 * MiB, "gpu1", revision="narrow")
    w = gpus(2, model("wide", 700, 2), narrow, ordering=ordering())
    first, (load,) = w.arrive("wide")
    w.ready(load)
    w.arrive("narrow")
    w.arrive("wide")
    (stop,) = [each for each in w.at(60.0).finish(first) if isinstance(each, Stop)]
    assert kinds(w.stopped(stop)) == ["load narrow"]


def test_its_death_frees_both(pair: World) -> None:
    _, (load,) = pair.arrive("wide")
    assert isinstance(load, Load)
    pair.step(EngineFailed(load.engine_id, "it broke"))
    assert sum(each.held for each in pair.core.devices.values()) == 0
    assert {each.starting for each in pair.core.devices.values()} == {None}


def test_too_few_devices_are_refused_at_once_with_both_figures() -> None:
    w = gpus(2, model("wide", 700, 4))
    _, (refusal,) = w.arrive("wide")
    assert isinstance(refusal, Refuse)
    assert refusal.code is RefusalCode.NEVER_FITS
    assert refusal.reason == "wide needs 4 nvidia devices, and there are 2"


def test_groups_are_neighbours_and_two_of_them_work_side_by_side() -> None:
    w = gpus(4, model("x", 700, 2), model("y", 700, 2))
    _, (x,) = w.arrive("x")
    _, (y,) = w.arrive("y")
    assert isinstance(x, Load)
    assert isinstance(y, Load)
    assert [(each.device, each.partners) for each in (x, y)] == [("gpu0", ("gpu1",)), ("gpu2", ("gpu3",))]


@pytest.mark.parametrize("seed", range(8))
def test_wide_and_narrow_models_that_want_the_same_devices_never_wait_in_a_circle(seed: int) -> None:
    rng = random.Random(seed)
    w = gpus(4, model("x", 600, 4), model("y", 700, 2), model("z", 700, 2), *(model(f"n{i}", 600) for i in range(5)))
    alive: list[Load] = []
    stopping: list[str] = []
    running: list[int] = []
    names = sorted(w.core.models)
    waiting = 0

    def obey(commands: list[object]) -> None:
        nonlocal waiting
        for command in commands:
            match command:
                case Load():
                    alive.append(command)
                case Stop(engine_id):
                    stopping.append(engine_id)
                case Refuse(reason=reason):
                    raise AssertionError(reason)
                case _:
                    running.append(command.ticket_id)  # type: ignore[attr-defined]
                    waiting -= 1

    for step in range(600):
        w.now += 0.5
        if step < 300:
            waiting += 1
            obey(list(w.arrive(rng.choice(names))[1]))
        if alive and rng.random() < 0.5:
            load = alive.pop(rng.randrange(len(alive)))
            obey(list(w.step(EngineReady(load.engine_id, load.model, load.device, 1.0, partners=load.partners))))
        if stopping and rng.random() < 0.5:
            obey(list(w.step(EngineStopped(stopping.pop(rng.randrange(len(stopping)))))))
        while running and rng.random() < 0.8:
            obey(list(w.finish(running.pop(rng.randrange(len(running))))))
        obey(list(w.tick(w.now)))
    assert waiting == 0
