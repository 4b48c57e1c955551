"""What `vramp status` says of a model that is here, or not yet here, for a reason of the scheduler's own."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import Mock

import pytest

from proxy.admin.scheduler import scheduler_view
from proxy.admin.status import status
from proxy.config import Config
from proxy.observe.scheduler_metrics import SchedulerGauges
from scheduler.core import Core
from scheduler.driver import Launch, Scheduler
from scheduler.events import LoadAsked, Tick
from scheduler.model import DeviceSpec, ModelSpec, Residency, SchedulerSettings, Ticket
from tests.fakes import until
from tests.scheduler.test_driver import FakeDevice, FakeEngines, serve

MiB = 1 << 20


class LargeDevice(FakeDevice):
    spec = DeviceSpec("ram", "gpu", 4000 * MiB)


def made() -> Scheduler:
    """Two models with room for both, and a scheduler that anticipates."""
    models = [ModelSpec(name, 500 * MiB, "gpu", load_estimate_s=2.0) for name in "ab"]
    core = Core([LargeDevice.spec], models, SchedulerSettings(anticipate=True))
    launch = Launch(kind=None, start_timeout_s=1.0, stop_timeout_s=1.0)  # type: ignore[arg-type]
    return Scheduler(core, [LargeDevice()], FakeEngines(), {"a": launch, "b": launch})


def model(scheduler: Scheduler, name: str) -> dict[str, Any]:
    view = status(scheduler, Config(), uptime_s=1.0, now=asyncio.get_running_loop().time(), about={})
    return next(each for each in view["models"] if each["id"] == name)


async def test_a_guess_says_why_it_is_here_until_it_is_used() -> None:
    scheduler = made()
    await serve(scheduler, "a")
    scheduler.core.models["b"].demand.count = 1000
    scheduler.core.step(
        Tick(), asyncio.get_running_loop().time() + 1.0
    )  # not carried out: it is the reason that counts
    assert scheduler.core.models["b"].state is Residency.LOADING
    assert model(scheduler, "b")["note"].startswith("guessed: asked about ")
    assert scheduler_view(scheduler, 0.0)["anticipation"]["guesses_open"] == 1
    scheduler.dispatch(LoadAsked("b"))
    assert not model(scheduler, "b")["note"].startswith("guessed")


async def test_the_decision_log_says_why_a_model_was_loaded_before_anybody_asked() -> None:
    scheduler = made()
    await serve(scheduler, "a")
    scheduler.core.models["b"].demand.count = 1000
    await until(lambda: scheduler.core.models["b"].state is Residency.READY)
    (decision,) = (each for each in scheduler.decisions if each.what.startswith("load b"))
    assert decision.why.startswith("guessed: asked about ")
    await serve(scheduler, "b")
    scheduler.core.placement.guesses.settle()
    counts = {
        (sample.name, *sample.labels.values()): sample.value
        for metric in SchedulerGauges(lambda: scheduler.core, scheduler.unreadable).collect()
        for sample in metric.samples
    }
    assert counts["vramp_guesses_total", "right"] == 1.0
    assert counts["vramp_guesses_total", "wrong"] == 0.0
    assert counts[("vramp_swaps_held_total",)] == 0.0


async def test_a_device_that_cannot_be_read_says_for_how_long_and_why_until_it_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = made()
    with monkeypatch.context() as broken:
        broken.setattr(FakeDevice, "measure", Mock(side_effect=OSError("the driver does not answer")))
        await serve(scheduler, "a")
    since_s = scheduler.unreadable()["ram"].since_s
    says = {"for_s": 75.0, "why": "OSError: the driver does not answer"}
    shown = status(scheduler, Config(), uptime_s=1.0, now=since_s + 75.0, about={})
    assert [device["unreadable"] for device in shown["devices"]] == [says]
    assert [device["unreadable"] for device in scheduler_view(scheduler, since_s + 75.0)["devices"]] == [says]
    assert unreadable_metric(scheduler) == {"ram": 1.0}
    await serve(scheduler, "b")
    assert [device["unreadable"] for device in scheduler_view(scheduler, since_s + 80.0)["devices"]] == [None]
    assert unreadable_metric(scheduler) == {"ram": 0.0}


def unreadable_metric(scheduler: Scheduler) -> dict[str, float]:
    gauges = SchedulerGauges(lambda: scheduler.core, scheduler.unreadable)
    (metric,) = (each for each in gauges.collect() if each.name == "vramp_device_unreadable")
    return {sample.labels["device"]: sample.value for sample in metric.samples}


async def test_a_swap_that_is_held_back_says_so() -> None:
    scheduler = made()
    core = scheduler.core
    core.tickets.enqueue(Ticket(99, "b"), core.models["b"], 5.0)
    assert "held back" not in model(scheduler, "b")["note"]
    core.placement.holding._since["b"] = 6.0
    assert "held back for a moment" in model(scheduler, "b")["note"]
