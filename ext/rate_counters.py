"""The rate counters: native where it was built, else the pure twin. See: `ext/_rate_counters_py.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ext._rate_counters_py import Grant, Meter, RateCounters, Refusal, Remaining
else:
    from ext import backend

    _chosen = backend.module("rate_counters")
    Grant = _chosen.Grant
    Meter = _chosen.Meter
    RateCounters = _chosen.RateCounters
    Refusal = _chosen.Refusal
    Remaining = _chosen.Remaining

__all__ = ["Grant", "Meter", "RateCounters", "Refusal", "Remaining"]
