"""A few seeds of the fuzz over all ways that a call can take; `fuzz_lanes.py` says how to take more."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.observe import lines
from proxy.server import http
from tests.proxy.server.fuzz_lanes import lanes_over_scripts, shortened

pytestmark = [pytest.mark.native, pytest.mark.slow, pytest.mark.timeout(60)]

# Among them nobody says less than it announced, which is waited for.
SEEDS = {False: range(24, 104), True: range(104, 148)}


@pytest.mark.parametrize("tls", SEEDS)
async def test_random_calls_and_answers_are_alike_on_every_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tls: bool
) -> None:
    monkeypatch.setattr(lines, "FLUSH_S", 0.001)
    monkeypatch.setattr(http, "LINGER_S", 0.05)
    async with lanes_over_scripts(tmp_path, tls=tls) as lanes:
        await lanes.run(SEEDS[tls])
        assert lanes.wrong == [], "\n".join(map(shortened, lanes.wrong))
        assert lanes.cases == 2 * len(SEEDS[tls])
