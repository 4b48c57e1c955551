"""Greedy dual by size and frequency, and Landlord, its form without frequency: a clock that only evictions move."""

from __future__ import annotations

from scheduler.eviction.base import Candidate, Ranking


class Gdsf(Ranking):
    """Worth = clock at the last use + uses x load seconds / bytes; the clock goes to the worth of each victim."""

    name = "gdsf"

    def __init__(self) -> None:
        self._clock = 0.0
        self._seen: dict[str, tuple[int, float]] = {}  # uses at the last look, and the worth they gave

    def worth(self, candidate: Candidate, now: float) -> float:
        """The clock stands still between evictions, so it is read when somebody asks, not at every use."""
        uses, worth = self._seen.get(candidate.model, (-1, 0.0))
        if uses != candidate.uses:
            worth = self._clock + self._credit(candidate)
            self._seen[candidate.model] = (candidate.uses, worth)
        return worth

    def evicted(self, victim: Candidate) -> None:
        """Time passes by what was given up."""
        self._clock = max(self._clock, self.worth(victim, 0.0))
        del self._seen[victim.model]

    def _credit(self, candidate: Candidate) -> float:
        return candidate.uses * candidate.load_s / candidate.held_bytes
