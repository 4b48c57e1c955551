"""What was learned, on disk, between two runs: one small file for each kind of it.

A file that cannot be used is set aside: learning again costs little.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

log = logging.getLogger("vramp.scheduler")

VERSION = 1
T = TypeVar("T")


class _Stored(msgspec.Struct, Generic[T], forbid_unknown_fields=True):
    version: int
    figures: dict[str, T]


class KeptFile(Generic[T]):
    """One file, which only this process writes: figures of one type by name."""

    def __init__(self, path: Path, kind: type[T]) -> None:
        self._path = path
        self._kind = kind

    def load(self) -> dict[str, T]:
        """What was learned before; empty without a usable file. Raises nothing."""
        try:
            stored = msgspec.json.decode(self._path.read_bytes(), type=_Stored[self._kind])  # type: ignore[name-defined]
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError) as error:
            self._set_aside(str(error))
            return {}
        if stored.version != VERSION:
            self._set_aside(f"it is of version {stored.version}, and this is version {VERSION}")
            return {}
        return stored.figures

    def save(self, figures: dict[str, T]) -> None:
        """Written beside and renamed: a crash leaves the old file or the new one. Raises OSError."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_suffix(".new")
        with beside.open("wb") as file:
            file.write(msgspec.json.encode(_Stored(VERSION, figures)))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self._path)

    def _set_aside(self, why: str) -> None:
        aside = self._path.with_suffix(".unusable")
        what = self._path.stem
        log.warning("%s cannot be used (%s): kept as %s, %s are learned anew", self._path, why, aside.name, what)
        try:
            self._path.replace(aside)
        except OSError as error:
            log.warning("%s could not be set aside: %s", self._path, error)
