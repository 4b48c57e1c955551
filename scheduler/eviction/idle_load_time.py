"""Idle time over load time, as Lemonade has it: the longest idle per second of load goes first."""

from __future__ import annotations

from scheduler.eviction.base import Candidate, Ranking


class IdleLoadTime(Ranking):
    """Blind to size and frequency."""

    name = "idle_load_time"

    def worth(self, candidate: Candidate, now: float) -> float:
        """Less when it has been idle for long, or loads fast."""
        return -(now - candidate.last_used_s) / max(candidate.load_s, 1e-9)
