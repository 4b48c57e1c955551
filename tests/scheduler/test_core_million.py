"""The random life of `test_core_random`, a million events long."""

from __future__ import annotations

import pytest

from tests.scheduler.test_core_random import Chaos

EVENTS = 1_000_000
CHECK_EVERY = 97  # everything is O(everything); a prime, so that no rhythm of events hides between two looks


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_million_random_events_lose_nobody() -> None:
    chaos = Chaos(2026)
    for number in range(EVENTS):
        chaos.play()
        if number % CHECK_EVERY == 0:
            chaos.core.check()
    chaos.calm_down()
    assert chaos.answered == chaos.tickets
