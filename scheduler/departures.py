"""Whether memory that an engine gave back has really come back: a device's reading is believed, nobody's word is.

A stop is complete when no process is left *and*, on devices that free late, what the engine held is not in use by
nobody. A sleep is complete when the engine's own figure has fallen to what sleep keeps. Until then the memory stays
promised. When the reading has not fallen within the limit: a sleep is asked for once more, then the engine is killed
with its whole group, and its model does not sleep again for a while; a stop is done once more with force, then the
model is backed off and what is missing shows as foreign memory, as what it is: not ours to promise.

The refused alternative is to compare the whole device with what it was: a neighbour that ends at the same moment hides
a leak. So all that leave a device are judged together, against everything that stays. Foreign memory that grows
meanwhile cannot be told from a leak; nothing that serves is stopped on that suspicion.
"""

from __future__ import annotations

from collections.abc import Mapping

from scheduler.ledger import DeviceLedger
from scheduler.state import EngineState
from scheduler.timers import Timers

TOLERANCE = 0.1  # of what should fall: allocators and drivers round


class Leaving:
    """What an engine should give back. `held` and `foreign` are by device, as they were when it was asked; `keeps` is
    what may stay on each (sleep), `answered` that it says it is done, `tries` how often it was asked again."""

    __slots__ = ("answered", "foreign", "held", "keeps", "sleeps", "tries")

    def __init__(self, held: dict[str, int], foreign: dict[str, int], keeps: int, *, sleeps: bool) -> None:
        self.held = held
        self.foreign = foreign
        self.keeps = keeps
        self.sleeps = sleeps
        self.answered = False
        self.tries = 0


class Departures:
    """Engines on their way out of their devices. Every call is O(engines of a device)."""

    def __init__(self, devices: Mapping[str, DeviceLedger], timers: Timers, limit_s: float) -> None:
        self.limit_s = limit_s
        self._devices = devices
        self._timers = timers
        self._leaving: dict[str, Leaving] = {}

    def __contains__(self, engine_id: str) -> bool:
        return engine_id in self._leaving

    def begin(self, engine: EngineState, keeps: int | None = None) -> None:
        """The engine is asked to stop, or with `keeps` bytes a device to sleep."""
        held, foreign = {}, {}
        for name in engine.devices:
            ledger = self._devices[name]
            holding = ledger.holding(engine.id)
            if holding is not None and ledger.used is not None:
                held[name] = holding.held if holding.measured is None else holding.measured
                foreign[name] = ledger.foreign
        before = self._leaving.get(engine.id)
        if before is not None and not before.sleeps and keeps is None:
            return  # asked again: what counts is how it was at first
        self._leaving[engine.id] = Leaving(held, foreign, keeps or 0, sleeps=keeps is not None)

    def answered(self, engine: EngineState, now: float) -> bool:
        """The engine says that it is done; True when the readings say so too, else it is looked at again in time."""
        leaving = self._leaving[engine.id]
        before, leaving.answered = leaving.answered, True
        if self.complete(engine):
            return True
        if before:
            return False  # said twice: it is looked at already
        self._timers.push(now + self.limit_s, "fall", engine.id)
        return False

    def complete(self, engine: EngineState) -> bool:
        """Whether every device's reading has fallen as it should; forgets the engine then."""
        leaving = self._leaving.get(engine.id)
        if leaving is None or not leaving.answered:
            return False
        done = all(self._fallen(engine.id, leaving, self._devices[name]) for name in leaving.held)
        if done:
            del self._leaving[engine.id]
        return done

    def forget(self, engine_id: str) -> None:
        """Waited for no longer."""
        self._leaving.pop(engine_id, None)

    def wait_longer(self, engine: EngineState, now: float) -> bool:
        """Whether a neighbour still leaves, whose memory cannot be told from this engine's."""
        others = (
            other
            for engine_id, other in self._leaving.items()
            if engine_id != engine.id
            and not other.answered
            and other.held.keys() & self._leaving[engine.id].held.keys()
        )
        if not any(others):
            return False
        self._timers.push(now + self.limit_s, "fall", engine.id)
        return True

    def due(self, engine: EngineState) -> bool:
        """Whether it has said that it is done, and is still waited for."""
        leaving = self._leaving.get(engine.id)
        return leaving is not None and leaving.answered

    def again(self, engine: EngineState) -> int:
        """Count one more try; returns which one."""
        leaving = self._leaving[engine.id]
        leaving.answered = False
        leaving.tries += 1
        return leaving.tries

    def _fallen(self, engine_id: str, leaving: Leaving, ledger: DeviceLedger) -> bool:
        name = ledger.spec.name
        holding = ledger.holding(engine_id)
        own = holding.measured if holding is not None and leaving.sleeps else None
        if own is not None and own > _allowed(leaving, name):
            return False
        if not ledger.spec.frees_late:
            return True
        beside = {other_id: other for other_id, other in self._leaving.items() if name in other.held}
        allowed = sum(_allowed(other, name) for other in beside.values())
        return ledger.unexplained(leaving.foreign[name], beside) <= allowed


def _allowed(leaving: Leaving, device: str) -> int:
    return leaving.keeps + int(TOLERANCE * max(0, leaving.held[device] - leaving.keeps))
