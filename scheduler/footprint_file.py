"""Learned footprints on disk, between two runs.

A file that cannot be used is set aside: learning again costs little.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec

from scheduler.footprints import Footprints

log = logging.getLogger("vramp.scheduler")

VERSION = 1


class _Stored(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    figures: dict[str, list[int]]


class FootprintFile:
    """One file, which only this process writes."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> Footprints:
        """What was learned before; empty without a usable file. Raises nothing."""
        try:
            stored = msgspec.json.decode(self._path.read_bytes(), type=_Stored)
        except FileNotFoundError:
            return Footprints()
        except (OSError, msgspec.DecodeError) as error:
            self._set_aside(str(error))
            return Footprints()
        if stored.version != VERSION:
            self._set_aside(f"it is of version {stored.version}, and this is version {VERSION}")
            return Footprints()
        return Footprints.of(stored.figures)

    def save(self, figures: dict[str, list[int]]) -> None:
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
        log.warning("%s cannot be used (%s): kept as %s, footprints are learned anew", self._path, why, aside.name)
        try:
            self._path.replace(aside)
        except OSError as error:
            log.warning("%s could not be set aside: %s", self._path, error)
