"""The transition table and what is drawn from it."""

from __future__ import annotations

from pathlib import Path

import scheduler
from scheduler.model import Residency
from scheduler.residency import TRANSITIONS, diagram

PAGE = Path(scheduler.__file__).parent.parent / "docs" / "scheduler-memory.md"


def test_the_pages_diagram_is_drawn_from_the_table() -> None:
    assert f"```mermaid\n{diagram()}\n```" in PAGE.read_text(encoding="utf-8")


def test_every_state_can_be_reached_and_left() -> None:
    reached = {target for targets in TRANSITIONS.values() for target in targets}
    assert reached == set(Residency) == set(TRANSITIONS)
    assert all(TRANSITIONS.values())


def test_nothing_that_is_on_its_way_out_comes_back() -> None:
    """ollama/ollama#17408: a victim that a new request revives blocks every later load."""
    assert Residency.READY not in TRANSITIONS[Residency.STOPPING]
    assert Residency.READY not in TRANSITIONS[Residency.SUSPENDING]
    assert Residency.READY not in TRANSITIONS[Residency.ASLEEP]  # only by way of a wake that is attested
