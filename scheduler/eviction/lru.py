"""Least recently used."""

from __future__ import annotations

from scheduler.eviction.base import Candidate, Ranking


class Lru(Ranking):
    """Blind to size, cost and frequency; k-competitive for equal sizes."""

    name = "lru"

    def worth(self, candidate: Candidate, now: float) -> float:
        """When it was last used."""
        return candidate.last_used_s
