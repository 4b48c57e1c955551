"""The body scan: native where it was built, else the pure twin. Interface and theory: `ext/_body_scan_py.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ext._body_scan_py import Span, Spans

if TYPE_CHECKING:
    from ext._body_scan_py import read_answer, scan
else:
    from ext import backend

    _chosen = backend.module("body_scan")
    read_answer = _chosen.read_answer
    scan = _chosen.scan

__all__ = ["Span", "Spans", "read_answer", "scan"]
