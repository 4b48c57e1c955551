"""What every eviction policy is given and must answer.

A policy is told nothing as things happen (requests must not pay for it): each candidate carries its counters, and a
policy compares them with what it remembers when it is asked. `evicted` is called when a victim really goes; being asked
for victims commits to nothing, plans are revised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import msgspec

from scheduler.ledger import DeviceLedger
from scheduler.state import ModelState


class Candidate(msgspec.Struct, frozen=True):
    """An engine that may be given up. `held_bytes` is what its end frees, `load_s` what bringing it back costs: a load,
    or a wake where it will sleep.

    `uses` counts the requests for its model so far; `rate` is the forecast of arrivals a second over the last minutes.
    """

    model: str
    held_bytes: int
    in_flight: int
    last_used_s: float
    load_s: float = 0.0
    uses: int = 0
    rate: float = 0.0


class Eviction(Protocol):
    """Which engines to give up for one that is wanted."""

    name: str

    def victims(self, candidates: Sequence[Candidate], need_bytes: int, now: float) -> list[Candidate] | None:
        """Engines whose end frees `need_bytes`; None when all of them would not."""
        ...

    def evicted(self, victim: Candidate) -> None:
        """This one is given up."""
        ...

    def watch(self, models: Mapping[str, ModelState], devices: Mapping[str, DeviceLedger]) -> None:
        """The books that this policy's core keeps; called once, before anything else."""
        ...

    def saw(self, arrivals: Sequence[tuple[float, str]]) -> None:
        """Requests have come, (when, for which model), since the last call."""
        ...


class Ranking:
    """A policy that is an order: first come the engines that are worth least. Idle engines go before busy ones where
    `idle_first`: nobody waits for a drain that can be avoided."""

    name = ""
    idle_first = True

    def worth(self, candidate: Candidate, now: float) -> float:
        """Small goes first; ties go by the last use, then by name."""
        raise NotImplementedError

    def victims(self, candidates: Sequence[Candidate], need_bytes: int, now: float) -> list[Candidate] | None:
        """The first in order that free enough. O(n log n)."""

        def order(each: Candidate) -> tuple[bool, float, float, str]:
            return (self.idle_first and each.in_flight > 0, self.worth(each, now), each.last_used_s, each.model)

        return cheapest(candidates, need_bytes, order)

    def evicted(self, victim: Candidate) -> None:
        """Nothing to remember."""

    def watch(self, models: Mapping[str, ModelState], devices: Mapping[str, DeviceLedger]) -> None:
        """Nothing to watch."""

    def saw(self, arrivals: Sequence[tuple[float, str]]) -> None:
        """Nothing to remember."""


def cheapest(
    candidates: Iterable[Candidate], need_bytes: int, order: Callable[[Candidate], tuple[object, ...]]
) -> list[Candidate] | None:
    """The first in order that free `need_bytes`, less those that a later, larger one made needless: the dearest of
    them are spared first. O(n log n) for n candidates.

    The refused alternative is the exact knapsack: it frees to the byte what is needed now, by many small victims, and
    on every trace tried it loads more in the end than this rule, whose leftover room saves the next eviction.
    """
    chosen: list[Candidate] = []
    freed = 0
    for candidate in sorted(candidates, key=order):
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
