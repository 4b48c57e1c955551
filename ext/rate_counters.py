"""The rate counters: native where it was built, else the pure twin. See: `ext/_rate_counters_py.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ext._rate_counters_py import RateCounters, Remaining
else:
    from ext import backend

    _chosen = backend.module("rate_counters")
    RateCounters = _chosen.RateCounters
    Remaining = _chosen.Remaining

__all__ = ["RateCounters", "Remaining"]
