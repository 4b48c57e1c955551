"""Which engines to give up for one that is wanted: least recently used.

A policy is a function `(candidates, need_bytes) -> victims | None`. Candidates are ready, not pinned, not starting;
the caller drains the busy ones. Idle engines go before busy ones, whatever their age: nobody waits for a drain that
can be avoided.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec


class Candidate(msgspec.Struct, frozen=True):
    """An engine that may be given up. `held_bytes` is what its end frees."""

    model: str
    held_bytes: int
    in_flight: int
    last_used_s: float


def lru(candidates: Iterable[Candidate], need_bytes: int) -> list[Candidate] | None:
    """The fewest, least recently used engines that free `need_bytes`; None when all of them would not. O(n log n).

    A later, larger victim can make earlier ones needless, so those are spared again, newest first.
    """
    chosen: list[Candidate] = []
    freed = 0
    for candidate in sorted(candidates, key=lambda c: (c.in_flight > 0, c.last_used_s, c.model)):
        if freed >= need_bytes:
            break
        chosen.append(candidate)
        freed += candidate.held_bytes
    if freed < need_bytes:
        return None
    for candidate in reversed(chosen[:-1]):
        if freed - candidate.held_bytes >= need_bytes:
            chosen.remove(candidate)
            freed -= candidate.held_bytes
    return chosen
