"""Whom an eviction takes where some can sleep: a victim costs its wake, if that is how it will come back."""

from __future__ import annotations

import msgspec
import pytest

from scheduler.commands import Command, Load, Probe, Sleep
from scheduler.core import Core
from scheduler.events import Asleep, EngineReady, ProbeAnswered
from scheduler.eviction.adaptive import Adaptive
from scheduler.ledger import SleepMemory
from scheduler.model import DeviceSpec, ModelSpec, Residency, SchedulerSettings
from tests.scheduler.conftest import MiB, World, kinds

MEMORY = 1000
SETTINGS = SchedulerSettings(pressure_threshold=1.0)


def model(name: str, mib: int, load_s: float, *, keeps: int | None = None, host: int = 0) -> ModelSpec:
    """One that can sleep where it is said what it keeps, and wakes in a tenth of its load then."""
    return ModelSpec(
        name,
        mib * MiB,
        "memory",
        load_estimate_s=load_s,
        sleep_keeps_bytes=None if keeps is None else keeps * MiB,
        sleep_host_bytes=host * MiB,
    )


class Swap(World):
    """Devices of 1000 MiB whose engines obey at once, and say the same after a wake as before."""

    def __init__(self, *models: ModelSpec, host: int, devices: int = 1) -> None:
        settings = msgspec.structs.replace(SETTINGS, sleep_memory_bytes=host * MiB)
        memory = [DeviceSpec(f"memory{n}", "memory", MEMORY * MiB) for n in range(devices)]
        super().__init__(Core(memory, models, settings))

    def load(self, name: str) -> None:
        """Ask for it until it has answered; victims have gone before."""
        ticket, commands = self.arrive(name)
        while commands:
            commands = [each for command in commands for each in self.obey(command)]
        self.now += 1.0
        self.finish(ticket)

    def obey(self, command: Command) -> list[Command]:
        match command:
            case Load(engine_id, name, device):
                self.now += 1.0
                return self.step(EngineReady(engine_id, name, device, self.core.models[name].spec.load_estimate_s))
            case Probe(engine_id):
                return self.step(ProbeAnswered(engine_id, " Rome", -0.5))
            case Sleep(engine_id):
                return self.step(Asleep(engine_id))
        return []

    def asked(self, name: str) -> list[str]:
        """What somebody who asks for it sets off."""
        self.now += 1.0
        return kinds(self.arrive(name)[1])


BIG, SMALL, NEXT = model("big", 550, 30.0, keeps=50, host=500), model("small", 400, 10.0), model("next", 400, 10.0)


def test_a_large_one_that_will_sleep_goes_before_a_small_one_that_would_be_stopped() -> None:
    swap = Swap(BIG, SMALL, NEXT, host=500)
    swap.load("big")
    swap.load("small")
    assert swap.asked("next") == ["sleep big"]


@pytest.mark.parametrize(
    "big",
    [
        BIG,  # no room in host memory
        msgspec.structs.replace(BIG, sleep_host_bytes=0, sleep_keeps_bytes=None),  # its engine cannot
        msgspec.structs.replace(BIG, sleep_host_bytes=0, wake_estimate_s=25.0),  # its wake is nearly a load
    ],
)
def test_it_stays_where_it_cannot_sleep_or_gains_little_by_it(big: ModelSpec) -> None:
    swap = Swap(big, SMALL, NEXT, host=499)
    swap.load("big")
    swap.load("small")
    assert swap.asked("next") == ["stop small"]


def test_a_learned_wake_is_what_counts() -> None:
    swap = Swap(BIG, SMALL, NEXT, host=500)
    swap.load("big")
    swap.load("small")
    swap.core.models["big"].wake_s = 29.0
    assert swap.asked("next") == ["stop small"]


def test_a_sleeper_is_dear_because_it_would_be_stopped() -> None:
    """It sleeps in the way of its neighbours, and its end costs a load less the wake that it would need anyway."""
    big = msgspec.structs.replace(model("big", 550, 30.0, keeps=100, host=450), wake_estimate_s=0.5)
    swap = Swap(big, SMALL, NEXT, model("last", 110, 10.0), host=500)
    for name in ("big", "small", "next"):
        swap.load(name)  # and big sleeps, for the last of them
    assert swap.core.models["big"].state is Residency.ASLEEP
    assert swap.asked("last") == ["stop small"], "10 MiB are missing; big keeps 100"


def test_what_a_sleeper_would_keep_is_not_free() -> None:
    """small would free 400 of the 400 that are missing, and 350 if it slept."""
    small = model("small", 400, 10.0, keeps=50, host=350)
    swap = Swap(model("big", 600, 60.0), small, NEXT, host=1000)
    swap.load("big")
    swap.load("small")
    assert swap.asked("next") == ["stop small"], "to have it sleep, big would have to go as well"


def test_of_several_victims_only_as_many_are_stopped_as_must_be() -> None:
    pair = [model(name, 500, load_s, keeps=50, host=450) for name, load_s in (("a", 20.0), ("b", 10.0))]
    swap = Swap(*pair, model("next", 950, 10.0), host=1000)
    swap.load("a")
    swap.load("b")
    assert sorted(swap.asked("next")) == ["sleep a", "stop b"], "b loads sooner again"


def test_a_model_that_needs_all_the_memory_gets_it_from_those_that_could_sleep() -> None:
    swap = Swap(BIG, model("whole", MEMORY, 10.0), host=500)
    swap.load("big")
    assert swap.asked("whole") == ["stop big"]


def test_one_that_would_keep_all_its_memory_asleep_is_stopped() -> None:
    swap = Swap(model("tiny", 100, 3.0, keeps=100, host=50), model("whole", MEMORY, 10.0), host=500)
    swap.load("tiny")
    assert swap.asked("whole") == ["stop tiny"]


def test_host_memory_that_not_all_could_sleep_in_makes_no_victim_cheap() -> None:
    """Where they compete for it, only one that has its place is sure to wake."""
    memory = SleepMemory(100)
    memory.claim("a#1", 60)
    assert memory.certain("a#1")
    memory.claim("b#2", 60)
    assert not memory.certain("a#1")
    assert memory.take("b#2", 60)
    assert memory.certain("b#2")
    assert not memory.certain("a#1")
    memory.release("b#2")
    assert memory.certain("a#1")
    memory.check()


def test_the_shadows_of_the_adaptive_rule_pay_a_wake_where_the_core_would() -> None:
    swap = Swap(BIG, SMALL, host=500)
    swap.load("big")
    adaptive = swap.core.placement.eviction
    assert isinstance(adaptive, Adaptive)
    big = swap.core.models["big"]
    assert adaptive.candidate(big, 1, 1, 0.0, swap.now).load_s == big.wake_s
    big.sleepless = True
    assert adaptive.candidate(big, 1, 1, 0.0, swap.now).load_s == big.load_s


def test_who_waits_for_one_that_falls_asleep_waits_for_a_wake() -> None:
    swap = Swap(BIG, SMALL, NEXT, host=500)
    swap.load("big")
    swap.load("small")
    swap.asked("next")
    big = swap.core.models["big"]
    assert (big.state, big.seconds_to_load) == (Residency.SUSPENDING, 3.0)


def test_what_a_victim_on_two_devices_would_keep_is_counted_on_both() -> None:
    """span fits only when pair is stopped, on both of its devices."""
    span, pair = (
        msgspec.structs.replace(each, devices_needed=2)
        for each in (model("span", 990, 1.0), model("pair", 200, 1.0, keeps=30, host=100))
    )
    swap = Swap(span, pair, model("left", 800, 1.0), model("right", 800, 1.0), host=100, devices=2)
    for name in ("pair", "left", "right"):
        swap.load(name)
    assert sorted(swap.asked("span")) == ["stop left", "stop pair", "stop right"]
