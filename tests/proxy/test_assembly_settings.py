"""What the scheduler is told of the latency classes."""

from __future__ import annotations

from itertools import pairwise

import pytest

from proxy.assembly import settings_of
from proxy.config import ConfigError
from proxy.config_load import load_text
from scheduler.model import LatencyClass, SchedulerSettings


def patience_s(timeouts: str = "") -> tuple[float, ...]:
    return settings_of(load_text(f"[timeouts]\n{timeouts}", "x.toml")).patience_s


def test_the_targets_of_the_configuration_and_the_patience_of_the_core_agree_by_default() -> None:
    assert patience_s() == SchedulerSettings().patience_s
    assert all(shorter < longer for shorter, longer in pairwise(patience_s()))


@pytest.mark.parametrize("name", ["instant", "fast", "standard", "deliberate"])
def test_half_the_target_is_half_the_patience_and_of_that_class_alone(name: str) -> None:
    target_ms = getattr(load_text("", "x.toml").timeouts, f"{name}_ms")
    shorter = patience_s(f"{name}_ms = {target_ms / 2}")
    half = LatencyClass[name.upper()]
    assert [now / before for before, now in zip(patience_s(), shorter, strict=True)] == [
        0.5 if each is half else 1.0 for each in LatencyClass
    ]


def test_a_target_that_nothing_could_meet_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"timeouts\.instant_ms"):
        patience_s("instant_ms = 0.001")
