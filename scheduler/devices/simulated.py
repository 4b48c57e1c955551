"""A device of arithmetic: as large as the settings say, and filled by what its engines declare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from scheduler.devices.base import Reading
from scheduler.model import DeviceSpec


class SimulatedDevice:
    """`memory_of` says how many bytes the engine of this id declared; None for one that it does not know.

    Without `memory_of` a reading names no engine, and the ledger goes by its predictions, which for a simulated engine
    are exact.
    """

    def __init__(self, name: str, capacity_bytes: int, memory_of: Callable[[str], int | None] = lambda _: None) -> None:
        self._spec = DeviceSpec(name, "simulated", capacity_bytes)
        self._memory_of = memory_of

    @property
    def spec(self) -> DeviceSpec:
        """What the ledger is opened with."""
        return self._spec

    def measure(self, engines: Mapping[str, Sequence[int]], overhead: Sequence[int]) -> Reading:
        """The engines' declared memory, added up. An engine without a process takes none."""
        held = {name: size for name, pids in engines.items() if pids and (size := self._memory_of(name)) is not None}
        return Reading(self._spec.capacity_bytes, sum(held.values()), 0, held)

    def engine_env(self) -> dict[str, str]:
        """Nothing ties an engine to arithmetic."""
        return {}
