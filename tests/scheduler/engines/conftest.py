from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.scheduler.engines.keeper_rig import Rig


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    """Makes keepers, and ends them with all that is theirs."""
    rigs: list[Rig] = []

    def make(*options: str, **more: Any) -> Rig:
        rigs.append(Rig(tmp_path / f"state{len(rigs)}", *options, **more))
        return rigs[-1]

    yield make
    for each in rigs:
        each.close()
