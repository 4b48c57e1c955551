"""What waits for one model, as numbers: how many can still be on time at a moment, and how much the late ones weigh.

Kept current as tickets come and go, so that a plan reads a queue of any length in O(log n).
"""

from __future__ import annotations

from bisect import bisect_left, insort


class Backlog:
    """Sums over the waiting tickets of one model.

    A ticket's age counts in multiples of its class's patience. It weighs (x^2 + x^3) / 2 where x = age / scale: close
    to x^2.5, and a polynomial, so that sums of powers give the weight of all without visiting any.
    """

    __slots__ = ("_dues", "_epoch", "_k2", "_k2t", "_k2tt", "_k3", "_k3t", "_k3tt", "_k3ttt")

    def __init__(self) -> None:
        self._dues: list[float] = []  # sorted: the moments until which tickets are on time
        self._clear(0.0)

    def __len__(self) -> int:
        return len(self._dues)

    def _clear(self, epoch: float) -> None:
        self._epoch = epoch
        self._k2 = self._k2t = self._k2tt = 0.0
        self._k3 = self._k3t = self._k3tt = self._k3ttt = 0.0

    def add(self, since_s: float, due_s: float) -> None:
        """A ticket waits. A list insert: O(n) moves of a word each, which is nothing below 100,000."""
        if not self._dues:
            self._clear(since_s)  # a near epoch keeps the sums exact
        insort(self._dues, due_s)
        self._count(since_s, due_s, 1.0)

    def remove(self, since_s: float, due_s: float) -> None:
        """It waits no more."""
        del self._dues[bisect_left(self._dues, due_s)]
        self._count(since_s, due_s, -1.0)

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

    def on_time(self, at_s: float) -> int:
        """How many are on time if let in at this moment. O(log n)."""
        return len(self._dues) - bisect_left(self._dues, at_s)

    def weight(self, now: float, scale: float) -> float:
        """What their ages weigh together; `scale` is in multiples of the patience. O(1)."""
        t = now - self._epoch
        square = self._k2 * t * t - 2.0 * self._k2t * t + self._k2tt
        cube = self._k3 * t * t * t - 3.0 * self._k3t * t * t + 3.0 * self._k3tt * t - self._k3ttt
        return max(0.0, 0.5 * (square / scale**2 + cube / scale**3))
