"""Counted places: native where they were built, else the pure twin. Interface: `ext/_occupancy_py.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ext._occupancy_py import Occupancy
else:
    from ext import backend

    Occupancy = backend.module("occupancy").Occupancy

__all__ = ["Occupancy"]
