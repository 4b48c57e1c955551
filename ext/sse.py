"""The event scanner: native where it was built, else the pure twin. Interface and theory: `ext/_sse_py.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ext._sse_py import EventScanner
else:
    from ext import backend

    _chosen = backend.module("sse")
    EventScanner = _chosen.EventScanner

__all__ = ["EventScanner"]
