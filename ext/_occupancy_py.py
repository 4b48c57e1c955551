"""How many are in: places that are taken and given back, counted.

This twin is the specification of `_occupancy.pyx`.
"""

from __future__ import annotations

from collections.abc import Callable

from ext.errors import NotHeld


class Occupancy:
    """`taken` of at most `most` places, or of any number where `most` is 0.

    `on_give` is called after every place that comes back, where somebody has set it: whoever waits does.
    """

    __slots__ = ("_most", "_taken", "on_give")

    def __init__(self, most: int = 0) -> None:
        if most < 0:
            raise ValueError(f"most is {most}; use 0 or more")
        self._most = most
        self._taken = 0
        self.on_give: Callable[[], None] | None = None

    @property
    def taken(self) -> int:
        """How many places are taken."""
        return self._taken

    @property
    def most(self) -> int:
        """How many places there are; 0 for any number."""
        return self._most

    def take(self) -> bool:
        """Take a place if one is free."""
        if self._most and self._taken >= self._most:
            return False
        self._taken += 1
        return True

    def give(self) -> None:
        """Give a place back. Raises NotHeld where none is taken."""
        if not self._taken:
            raise NotHeld("no place is taken")
        self._taken -= 1
        if self.on_give is not None:
            self.on_give()

    def __repr__(self) -> str:
        return f"<Occupancy {self._taken} of {self._most or 'any'}>"
