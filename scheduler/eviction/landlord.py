"""Landlord (Young 1998): a use buys credit of one load, everybody pays rent by size, who cannot pay goes."""

from __future__ import annotations

from scheduler.eviction.base import Candidate
from scheduler.eviction.gdsf import Gdsf


class Landlord(Gdsf):
    """k/(k-h+1)-competitive, the best possible for a deterministic rule. Rent is kept as a clock, as in GDSF."""

    name = "landlord"

    def _credit(self, candidate: Candidate) -> float:
        return candidate.load_s / candidate.held_bytes
