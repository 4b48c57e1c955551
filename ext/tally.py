"""Tallies: native where they were built, else the pure twins. Interface and theory: `ext/_tally_py.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ext._tally_py import Histogram, Tally
else:
    from ext import backend

    _chosen = backend.module("tally")
    Histogram = _chosen.Histogram
    Tally = _chosen.Tally

__all__ = ["Histogram", "Tally"]
