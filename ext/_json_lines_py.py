"""JSON lines of records: a line in the usage file and in the access log for each request, so it had better be cheap.

Floats are spans and moments in seconds: they are written in steps of 0.1 ms, for more digits say nothing.

This twin is the specification of `_json_lines.pyx`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import orjson

STEPS = 10_000
LARGE = 1e11  # whatever is not below is written as it is


def line(names: Sequence[str], values: Sequence[object], sparse: bool = False) -> bytes:
    """One JSON object with its line end. `names` are plain words; `sparse` leaves out what is None or an empty text.

    Texts and numbers are never refused: half a surrogate pair, which UTF-8 cannot say, is written as its escape.
    """
    fields = {
        name: _in_steps(value) if isinstance(value, float) else value
        for name, value in zip(names, values, strict=True)
        if not (sparse and (value is None or value == ""))
    }
    try:
        return orjson.dumps(fields) + b"\n"
    except TypeError:
        return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def _in_steps(value: float) -> float:
    return round(value * STEPS) / STEPS if abs(value) < LARGE else value
