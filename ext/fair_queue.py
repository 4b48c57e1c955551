"""The fair batch queue: native where it was built, else the pure twin. See: `ext/_fair_queue_py.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ext._fair_queue_py import FairQueue, FairQueueStats
else:
    from ext import backend

    _chosen = backend.module("fair_queue")
    FairQueue = _chosen.FairQueue
    FairQueueStats = _chosen.FairQueueStats

__all__ = ["FairQueue", "FairQueueStats"]
