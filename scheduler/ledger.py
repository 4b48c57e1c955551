"""Who holds how much of a device: promised, measured, foreign.

What an engine holds counts as the larger of what was predicted and what was last measured: a promise is kept until the
engine is gone, and an engine that outgrew its prediction is believed. Foreign memory is a floor that moves; it never
makes an engine of ours illegal, it only leaves less to promise.

All figures are bytes. Every operation is O(1) except `__repr__`.
"""

from __future__ import annotations

from collections.abc import Mapping

from scheduler.model import DeviceSpec


class Holding:
    """One engine's share of a device."""

    __slots__ = ("measured", "predicted")

    def __init__(self, predicted: int) -> None:
        self.predicted = predicted
        self.measured: int | None = None

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

    def measured(self, used: int, foreign: int, overhead: int, engines: Mapping[str, int]) -> None:
        """A reading of the device. Engines that the reading does not know keep their last figure."""
        self.used, self.foreign, self.overhead = used, foreign, overhead
        for engine_id, size in engines.items():
            holding = self._holdings.get(engine_id)
            if holding is not None:
                self.held -= holding.held
                holding.measured = size
                self.held += holding.held

    def check(self) -> None:
        """What always holds; for tests."""
        assert self.held == sum(holding.held for holding in self._holdings.values())
        assert self.starting is None or self.starting in self._holdings
