"""Who holds how much of a device: promised, measured, foreign; and of host memory, for engines that sleep.

What an engine holds counts as the larger of what was predicted and what was last measured: a promise is kept until the
engine is gone, and an engine that outgrew its prediction is believed. Foreign memory is a floor that moves; it never
makes an engine of ours illegal, it only leaves less to promise.

All figures are bytes. Every operation is O(1) except `__repr__` and `unexplained`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from scheduler.model import DeviceSpec


class Holding:
    """One engine's share of a device. `peak` is the most that was measured."""

    __slots__ = ("measured", "peak", "predicted")

    def __init__(self, predicted: int) -> None:
        self.predicted = predicted
        self.measured: int | None = None
        self.peak = 0

    @property
    def held(self) -> int:
        """What the ledger counts."""
        return max(self.predicted, self.measured or 0)


class DeviceLedger:
    """The book of one device.

    held == sum(holding.held) and free == capacity - reserve - overhead - foreign - held; free may be negative when
    foreign memory grew or an engine outgrew its prediction, and then nothing is promised.
    At most one engine is `starting`: two that start together measure each other's memory (vllm-project/vllm#55827).
    """

    def __init__(self, spec: DeviceSpec) -> None:
        self.spec = spec
        self.foreign = 0
        self.overhead = 0
        self.used: int | None = None
        self.held = 0
        self.starting: str | None = None
        self._holdings: dict[str, Holding] = {}

    def __repr__(self) -> str:
        return f"<DeviceLedger {self.spec.name} free={self.free} held={self.held} starting={self.starting}>"

    @property
    def free(self) -> int:
        """What may still be promised."""
        return self.limit - self.foreign - self.held

    @property
    def limit(self) -> int:
        """What could be promised if nobody else were there."""
        return self.spec.capacity_bytes - self.spec.reserve_bytes - self.overhead

    def promise(self, engine_id: str, predicted: int, *, starting: bool = True) -> None:
        """Book memory for an engine that starts now (or was adopted, then not `starting`)."""
        self._holdings[engine_id] = Holding(predicted)
        self.held += predicted
        if starting:
            self.starting = engine_id

    def resize(self, engine_id: str, predicted: int, *, starting: bool = False) -> None:
        """Another prediction for an engine that is here: less while it sleeps, all of it again when it wakes."""
        holding = self._holdings[engine_id]
        self.held -= holding.held
        holding.predicted = predicted
        self.held += holding.held
        if starting:
            self.starting = engine_id

    def started(self, engine_id: str) -> None:
        """The start lease is over: the next engine may start."""
        if self.starting == engine_id:
            self.starting = None

    def release(self, engine_id: str) -> None:
        """The engine is gone, processes and all."""
        self.started(engine_id)
        holding = self._holdings.pop(engine_id, None)
        if holding is not None:
            self.held -= holding.held

    def holding(self, engine_id: str) -> Holding | None:
        """What the engine holds, or None."""
        return self._holdings.get(engine_id)

    def held_by(self, engine_id: str) -> int:
        """What the ledger counts for this engine; 0 when it is not here."""
        holding = self._holdings.get(engine_id)
        return holding.held if holding is not None else 0

    def holdings(self) -> Iterator[tuple[str, Holding]]:
        """Every engine on the device and what it holds."""
        return iter(self._holdings.items())

    def measured(self, used: int, foreign: int, overhead: int, engines: Mapping[str, int]) -> None:
        """A reading of the device. Engines that the reading does not know keep their last figure."""
        self.used, self.foreign, self.overhead = used, foreign, overhead
        for engine_id, size in engines.items():
            holding = self._holdings.get(engine_id)
            if holding is not None:
                self.held -= holding.held
                holding.measured = size
                holding.peak = max(holding.peak, size)
                self.held += holding.held

    def unexplained(self, foreign: int, leaving: Collection[str]) -> int:
        """Bytes in use that neither `foreign` nor any engine accounts for, when those in `leaving` hold nothing.
        O(engines of the device)."""
        ours = sum(
            holding.predicted if holding.measured is None else holding.measured
            for engine_id, holding in self._holdings.items()
            if engine_id not in leaving
        )
        return max(0, (self.used or 0) - self.overhead - foreign - ours)

    def check(self) -> None:
        """What always holds; for tests."""
        assert self.held == sum(holding.held for holding in self._holdings.values())
        assert self.starting is None or self.starting in self._holdings


class SleepMemory:
    """Host memory for engines that sleep: held == sum of what was taken <= budget. A budget of 0 is no sleep at all.

    An engine keeps its share until it has gone, awake again or not: pinned memory that held the weights is not given
    back by a wake (vllm-project/vllm#16663), and an engine that slept once is likely to sleep again. Those that could
    sleep and have no share yet claim one: claimed == sum of the claims, whether or not they fit.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget = budget_bytes
        self.held = 0
        self.claimed = 0
        self._shares: dict[str, int] = {}
        self._claims: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"<SleepMemory {self.held} of {self.budget} for {len(self._shares)} engines>"

    def claim(self, engine_id: str, size: int) -> None:
        """The engine could sleep one day."""
        if engine_id not in self._shares and engine_id not in self._claims:
            self._claims[engine_id] = size
            self.claimed += size

    def certain(self, engine_id: str) -> bool:
        """Whether there is room for this engine, whoever else falls asleep before."""
        return engine_id in self._shares or self.held + self.claimed <= self.budget

    def has_room(self, engine_id: str, size: int) -> bool:
        """Whether `take` would give it room now."""
        return engine_id in self._shares or self.held + size <= self.budget

    def take(self, engine_id: str, size: int) -> bool:
        """Room for one engine; False, and nothing taken, when there is none."""
        if not self.has_room(engine_id, size):
            return False
        if engine_id not in self._shares:
            self.claimed -= self._claims.pop(engine_id, 0)
            self._shares[engine_id] = size
            self.held += size
        return True

    def share(self, engine_id: str) -> int:
        """What is kept for this engine."""
        return self._shares.get(engine_id, 0)

    def release(self, engine_id: str) -> None:
        """The engine is gone. Idempotent."""
        self.held -= self._shares.pop(engine_id, 0)
        self.claimed -= self._claims.pop(engine_id, 0)

    def check(self) -> None:
        """What always holds unless the budget was lowered since; for tests."""
        assert self.held == sum(self._shares.values())
        assert self.claimed == sum(self._claims.values())
        assert not self._shares.keys() & self._claims.keys()


def readable_size(size: int) -> str:
    """Bytes for people: two significant figures are enough to act on."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
