"""What waits for one model, as numbers: how many can still be on time at a moment, and how much the late ones weigh.

Kept current as tickets come and go, so that a plan reads a queue of any length in O(log n).

A ticket's age counts in multiples of its patience. It weighs (x^2 + x^3) / 2 where x = age / scale: close to x^2.5, and
a polynomial, so that sums of powers give the weight of all without visiting any.

What always holds: the moments are sorted, and the sums are those of the tickets that wait, from an epoch that is set
anew whenever nobody does: near, so that the sums stay exact. This twin is the specification of `_backlog.pyx`.
"""

from __future__ import annotations

from bisect import bisect_left, insort


class Backlog:
    """Sums over the waiting tickets of one model. A ticket is two moments on one clock: since when it waits, and until
    when it is on time; their difference is its patience, above 0."""

    __slots__ = ("_dues", "_epoch", "_k2", "_k2t", "_k2tt", "_k3", "_k3t", "_k3tt", "_k3ttt")

    def __init__(self) -> None:
        self._dues: list[float] = []  # sorted: the moments until which tickets are on time
        self._clear(0.0)

    def __len__(self) -> int:
        return len(self._dues)

    def __repr__(self) -> str:
        return f"<Backlog {len(self._dues)} waiting>"

    def add(self, since_s: float, due_s: float) -> None:
        """A ticket waits. O(log n), and moves of a word each for those that are due later: few, as a rule. Raises
        ValueError."""
        _check(since_s, due_s)
        if not self._dues:
            self._clear(since_s)
        insort(self._dues, due_s)
        self._count(since_s, due_s, 1.0)

    def remove(self, since_s: float, due_s: float) -> None:
        """It waits no more. As `add`, with moves of a word for at most half of all; ValueError for one that is not
        here."""
        _check(since_s, due_s)
        place = bisect_left(self._dues, due_s)
        if place == len(self._dues) or self._dues[place] != due_s:
            raise ValueError(f"nobody who waits is due at {due_s}")
        del self._dues[place]
        self._count(since_s, due_s, -1.0)

    def on_time(self, at_s: float) -> int:
        """How many are on time if let in at this moment. O(log n)."""
        return len(self._dues) - bisect_left(self._dues, at_s)

    def weight(self, now: float, scale: float) -> float:
        """What their ages weigh together; `scale` is in multiples of the patience. O(1)."""
        t = now - self._epoch
        square = self._k2 * t * t - 2.0 * self._k2t * t + self._k2tt
        cube = self._k3 * t * t * t - 3.0 * self._k3t * t * t + 3.0 * self._k3tt * t - self._k3ttt
        return max(0.0, 0.5 * (square / (scale * scale) + cube / (scale * scale * scale)))

    def gain(self, at_s: float, later_s: float, regret: float, scale: float) -> float:
        """What letting them in at this moment gains over doing it later: on_time(at_s) - regret x on_time(later_s) +
        weight(at_s, scale), in one call. O(log n)."""
        return self.on_time(at_s) - regret * self.on_time(later_s) + self.weight(at_s, scale)

    def _clear(self, epoch: float) -> None:
        self._epoch = epoch
        self._k2 = self._k2t = self._k2tt = 0.0
        self._k3 = self._k3t = self._k3tt = self._k3ttt = 0.0

    def _count(self, since_s: float, due_s: float, sign: float) -> None:
        t = since_s - self._epoch
        k = 1.0 / (due_s - since_s)
        k2 = sign * k * k
        k3 = k2 * k
        self._k2 += k2
        self._k2t += k2 * t
        self._k2tt += k2 * t * t
        self._k3 += k3
        self._k3t += k3 * t
        self._k3tt += k3 * t * t
        self._k3ttt += k3 * t * t * t


def _check(since_s: float, due_s: float) -> None:
    if not since_s < due_s:
        raise ValueError(f"a ticket that waits since {since_s} is due at {due_s}; use a patience above 0")
