"""Notices that files of the configuration have changed, by looking at them again and again.

Looking costs a `stat` a file and finds every way in which a file is changed: written in place, replaced by rename as
editors and Kubernetes do it, removed and made again. inotify would tell of folders' entries instead, differently for
each of these, and not at all on network file systems.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

LOOK_S = 1.0  # between two looks; a file that changes is read when it has been the same for so long

Stamp = tuple[int, int, int] | None


class Watch:
    """The files that hold now. `look` says once for each change that they are worth reading again: when two looks in a
    row have seen the same, so that a file is not read while it is being written. Whatever reading it then finds, the
    next look says no more."""

    def __init__(self, files: Iterable[Path], stamp: Callable[[Path], Stamp] | None = None) -> None:
        self._stamp = stamp or stamp_of
        self._files: tuple[Path, ...] = ()
        self._known: dict[Path, Stamp] = {}
        self.follow(files)

    def follow(self, files: Iterable[Path]) -> None:
        """From now on these. What is known of those that were followed already still holds."""
        self._files = tuple(files)
        self._known = {file: self._known[file] if file in self._known else self._stamp(file) for file in self._files}
        self._seen = self._known

    def read(self) -> None:
        """They are about to be read, for whatever reason: what they are now is known."""
        self._known = self._seen = self._look()

    def look(self) -> bool:
        """Whether they have changed since they were last read, and have stopped changing."""
        before, self._seen = self._seen, self._look()
        if self._seen == self._known or self._seen != before:
            return False
        self._known = self._seen
        return True

    def _look(self) -> dict[Path, Stamp]:
        return {file: self._stamp(file) for file in self._files}


def stamp_of(file: Path) -> Stamp:
    """What changes when a file does: which one it is, its size, its time; None where there is none."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
