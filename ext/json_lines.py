"""JSON lines: native where it was built, else the pure twin. Interface and theory: `ext/_json_lines_py.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ext._json_lines_py import line
else:
    from ext import backend

    line = backend.module("json_lines").line

__all__ = ["line"]
