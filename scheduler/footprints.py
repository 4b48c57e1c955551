"""What engines really took, learned from their starts and kept between runs.

One figure a start: the most that was measured on any one device while the engine lived. They are kept by what the
engine was started with (`revision`) and the kind of device, the last `STARTS` of each. The 90th percentile is what the
next start is booked with; by the nearest rank, so that it is the largest figure until there are ten.

Sizes are bytes. `scheduler.learned` keeps them.
"""

from __future__ import annotations

from collections import OrderedDict

STARTS = 32  # figures kept for each key: a percentile needs no more, and old ones are of other library versions
KEYS = 1000  # the least recently learned of more are forgotten
QUANTILE = 90
MUCH = 0.25  # a stated figure that is off by more than this share is worth telling the operator


class Footprints:
    """Figures by (revision, device kind). `note` is O(STARTS), `p90` O(STARTS log STARTS), both rare."""

    def __init__(self) -> None:
        self.changed = False
        self._starts: OrderedDict[str, OrderedDict[str, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._starts)

    def note(self, revision: str, device_kind: str, engine_id: str, size: int) -> None:
        """The engine of this start has been seen with so much; of one start only the largest figure counts."""
        key = _key(revision, device_kind)
        starts = self._starts.setdefault(key, OrderedDict())
        if size <= starts.get(engine_id, 0):
            return
        starts[engine_id] = size
        while len(starts) > STARTS:
            starts.popitem(last=False)
        self._starts.move_to_end(key)
        while len(self._starts) > KEYS:
            self._starts.popitem(last=False)
        self.changed = True

    def p90(self, revision: str, device_kind: str) -> int | None:
        """What nine starts in ten stayed within; None before the first."""
        starts = self._starts.get(_key(revision, device_kind))
        if not starts:
            return None
        return sorted(starts.values())[-(-len(starts) * QUANTILE // 100) - 1]

    def count(self, revision: str, device_kind: str) -> int:
        """How many starts that is from."""
        return len(self._starts.get(_key(revision, device_kind), ()))

    def figures(self) -> dict[str, list[int]]:
        """Everything, to be kept."""
        return {key: list(starts.values()) for key, starts in self._starts.items()}

    @classmethod
    def of(cls, figures: dict[str, list[int]]) -> Footprints:
        """What was kept, within this version's bounds."""
        made = cls()
        for key, sizes in list(figures.items())[-KEYS:]:
            # engine ids count from 1 in every run: what was kept must not be taken for a start of this run
            made._starts[key] = OrderedDict((f"before {n}", size) for n, size in enumerate(sizes[-STARTS:]))
        return made


def _key(revision: str, device_kind: str) -> str:
    return f"{device_kind}/{revision}"
