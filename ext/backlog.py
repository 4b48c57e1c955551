"""What waits for one model, as numbers: native where it was built, else the pure twin. See: `ext/_backlog_py.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ext._backlog_py import Backlog
else:
    from ext import backend

    Backlog = backend.module("backlog").Backlog

__all__ = ["Backlog"]
