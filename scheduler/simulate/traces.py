"""Arrival traces from CSV files: who asked for which model when, and how long the answer was.

Columns, by name, in any order: `t_s` or `t_ms` (arrival), `model` (the file's name where there is none),
`output_tokens` or `duration_s` (how long the answer takes), and optionally `prompt_tokens`, `tenant`, `session`,
`class`. Others are ignored.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from scheduler.model import LatencyClass

T = TypeVar("T")
CLOCKS = ("t_s", "t_ms")
CLASSES = {each.name.lower(): each for each in LatencyClass}


class TraceError(ValueError):
    """A trace that cannot be used; the message names file, line and column."""


class Request(msgspec.Struct, frozen=True):
    """One row. `duration_s` is set where the trace states it, else the engine works it out from the tokens."""

    at_s: float
    model: str
    prompt_tokens: int = 0
    output_tokens: int = 0
    duration_s: float | None = None
    tenant: str = ""
    latency_class: LatencyClass = LatencyClass.STANDARD
    session: str = ""


def read_trace(path: str | Path, until_s: float = math.inf) -> list[Request]:
    """The requests of a file that arrive before `until_s`, in order of arrival. Raises TraceError."""
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            requests = [each for each in _rows(path, csv.reader(file)) if each.at_s < until_s]
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: not a text file: {error.reason} at byte {error.start}") from error
    except csv.Error as error:
        raise TraceError(f"{path}: not CSV: {error}") from error
    if not requests:
        raise TraceError(f"{path}: no requests" + ("" if until_s == math.inf else f" before {until_s:g} s"))
    requests.sort(key=lambda each: each.at_s)
    return requests


def _rows(path: Path, lines: Iterator[list[str]]) -> Iterator[Request]:
    header = next(lines, None)
    if header is None:
        raise TraceError(f"{path}, line 1: empty file; the first line names the columns")
    columns = {name.strip(): index for index, name in enumerate(header)}
    clock = next((name for name in CLOCKS if name in columns), None)
    if clock is None:
        raise TraceError(f"{path}, line 1: no column t_s or t_ms; there are {', '.join(columns)}")
    if not columns.keys() & {"output_tokens", "duration_s"}:
        raise TraceError(f"{path}, line 1: no column output_tokens or duration_s; there are {', '.join(columns)}")
    scale = 1.0 if clock == "t_s" else 1e-3
    for number, cells in enumerate(lines, start=2):
        if not cells:
            continue
        row = _Row(path, number, columns, cells)
        yield Request(
            at_s=row.get(clock, _seconds) * scale,
            model=row.get("model", _word) if "model" in columns else path.stem,
            prompt_tokens=row.get("prompt_tokens", _count) if "prompt_tokens" in columns else 0,
            output_tokens=row.get("output_tokens", _count) if "output_tokens" in columns else 0,
            duration_s=row.get("duration_s", _seconds) if "duration_s" in columns else None,
            tenant=row.get("tenant", str) if "tenant" in columns else "",
            latency_class=row.get("class", _class) if "class" in columns else LatencyClass.STANDARD,
            session=row.get("session", str) if "session" in columns else "",
        )


class _Row:
    """One line, read cell by cell with its place at hand for the error."""

    def __init__(self, path: Path, line: int, columns: dict[str, int], cells: Sequence[str]) -> None:
        self._path, self._line, self._columns, self._cells = path, line, columns, cells

    def get(self, column: str, parse: Callable[[str], T]) -> T:
        index = self._columns[column]
        if index >= len(self._cells):
            raise TraceError(f"{self._path}, line {self._line}, column {column}: missing")
        try:
            return parse(self._cells[index].strip())
        except ValueError as error:
            cell = self._cells[index]
            raise TraceError(f"{self._path}, line {self._line}, column {column}: {cell!r} is not {error}") from error


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError("a number") from None
    if not (math.isfinite(value) and value >= 0):
        raise ValueError("a time from 0 on")
    return value


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError("a whole number from 0 on")
    return int(text)


def _word(text: str) -> str:
    if not text:
        raise ValueError("a model's name")
    return text


def _class(text: str) -> LatencyClass:
    try:
        return CLASSES[text]
    except KeyError:
        raise ValueError(f"one of {', '.join(CLASSES)}") from None
