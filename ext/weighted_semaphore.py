"""The weighted semaphore: native where it was built, else the pure twin. Interface and theory:
`ext/_weighted_semaphore_py.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ext._weighted_semaphore_py import Capacity, SemaphoreStats, WeightedSemaphore
else:
    from ext import backend

    _chosen = backend.module("weighted_semaphore")
    Capacity = _chosen.Capacity
    SemaphoreStats = _chosen.SemaphoreStats
    WeightedSemaphore = _chosen.WeightedSemaphore

__all__ = ["Capacity", "SemaphoreStats", "WeightedSemaphore"]
