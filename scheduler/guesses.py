"""Engines that are here on a guess: what a plan sees of them, and how each guess turned out.

A plan is made as if they were not here: their memory is free, and a guessed load under way is no load under way. What
the plan then wants, it gets (`Placement` withdraws them): a guessed load is broken off, an unused engine goes. So a
wrong guess changes no decision. What it can cost a request is stated in `scheduler.anticipation`.

Once somebody has asked for a guessed model it is a model like any other: it is used, or somebody waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator

from scheduler.ledger import DeviceLedger
from scheduler.model import Residency
from scheduler.state import EngineState, ModelState

LEAVING = (Residency.DRAINING, Residency.SUSPENDING, Residency.STOPPING)


class Guesses:
    """Those that are still open, seldom more than one or two. `right`: used in the end; `wrong`: gone unused."""

    def __init__(self) -> None:
        self.right = 0
        self.wrong = 0
        self._open: list[tuple[ModelState, EngineState]] = []

    def __len__(self) -> int:
        return len(self._open)

    def add(self, model: ModelState, engine: EngineState) -> None:
        """The engine starts, or wakes, on a guess."""
        self._open.append((model, engine))

    def settle(self) -> None:
        """See what has become of them."""
        self._open = [each for each in self._open if self._is_open(*each)]

    def _is_open(self, model: ModelState, engine: EngineState) -> bool:
        guess = engine.guess
        if guess is None or engine.occupied or engine.served != guess.served:
            self.right += 1  # None: an operator has asked for it since
            return False
        if model.engine is not engine or model.state is Residency.ASLEEP:
            self.wrong += 1
            return False
        return True

    def on(self, ledger: DeviceLedger) -> Iterator[ModelState]:
        """Models that are on this device and have not been asked for, the oldest guess first."""
        return (model for model in self.leaving_or_on(ledger) if model.guessed)

    def leaving_or_on(self, ledger: DeviceLedger) -> Iterator[ModelState]:
        """The same, and those that have been withdrawn and are not quite gone."""
        name = ledger.spec.name
        for model, engine in self._open:
            if model.engine is engine and name in engine.devices and (model.guessed or model.state in LEAVING):
                yield model

    def loading(self, ledger: DeviceLedger) -> ModelState | None:
        """The one that loads there and can be broken off. A wake cannot: nobody may use an engine between two states
        of sleep, and to kill it would lose what slept."""
        return next(
            (
                model
                for model in self.on(ledger)
                if model.state is Residency.LOADING and model.engine is not None and model.engine.id == ledger.starting
            ),
            None,
        )
