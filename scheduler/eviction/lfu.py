"""Least frequently used."""

from __future__ import annotations

from scheduler.eviction.base import Candidate, Ranking


class Lfu(Ranking):
    """Blind to size, cost and age: good in little memory, bad in much."""

    name = "lfu"

    def worth(self, candidate: Candidate, now: float) -> float:
        """How often it was asked for."""
        return candidate.uses
