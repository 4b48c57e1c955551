"""What is learned while serving and kept for the next run, in three small files of the state folder.

`footprints.json`: what engines took of their devices (`scheduler.footprints`). `sequences.json`: which model follows
which (`scheduler.sequences`). `times.json`: how long each model's last load and wake took, which are the first guesses
of the next run, and of `vramp plan`.

Written off the event loop, when there is something new. A file that cannot be written costs a warning.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from scheduler.core import Core
from scheduler.kept_file import KeptFile
from scheduler.model import ModelSpec
from scheduler.sequences import LearnedStep

log = logging.getLogger("vramp.scheduler")

STEPS_INTERVAL_S = 60.0  # what sessions do next is written down so often at most: there is something new all the time
T = TypeVar("T")
Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=86_400.0)]


class Times(msgspec.Struct, frozen=True):
    """What a model's last load, and its last wake, took; None for one that was not seen."""

    load_s: Seconds | None = None
    wake_s: Seconds | None = None


class Learned:
    """The files, which only this process writes, and what they do not have yet."""

    def __init__(self, folder: Path) -> None:
        self.footprints = KeptFile(folder / "footprints.json", list[int])
        self.steps = KeptFile(folder / "sequences.json", dict[str, LearnedStep])
        self._times_file = KeptFile(folder / "times.json", Times)
        self._times = self._times_file.load()
        self._new_times = False
        self._steps_due_s = 0.0
        self._said: dict[str, str] = {}  # by model: what its operator was last told of its memory

    def expect(self, spec: ModelSpec) -> ModelSpec:
        """The model, expected to load and wake as it did last time."""
        last = self._times.get(spec.name, Times())
        load_s = spec.load_estimate_s if last.load_s is None else last.load_s
        wake_s = spec.wake_estimate_s if last.wake_s is None else last.wake_s
        return msgspec.structs.replace(spec, load_estimate_s=load_s, wake_estimate_s=wake_s)

    def loaded(self, model: str, seconds: float) -> None:
        """A load took so long."""
        self._note(model, load_s=seconds)

    def woke(self, model: str, seconds: float) -> None:
        """A wake took so long."""
        self._note(model, wake_s=seconds)

    def _note(self, model: str, **seen: float) -> None:
        self._times[model] = msgspec.structs.replace(self._times.get(model, Times()), **seen)
        self._new_times = True

    async def keep(self, core: Core, now: float, *, everything: bool = False) -> None:
        """Write down what is new and due; `everything`: that it is new is enough."""
        if core.books.footprints.changed:
            core.books.footprints.changed = False
            self._say_misjudged(core)
            await _save(self.footprints, core.books.footprints.figures())
        if self._new_times:
            self._new_times = False
            await _save(self._times_file, {name: self._times[name] for name in self._times.keys() & core.models.keys()})
        sequences = core.placement.sequences
        if sequences.changed and (everything or now >= self._steps_due_s):
            sequences.changed = False
            self._steps_due_s = now + STEPS_INTERVAL_S
            await _save(self.steps, sequences.steps())

    def _say_misjudged(self, core: Core) -> None:
        """Say where the configuration is far from what was learned, each time that it is new."""
        for model in core.models.values():
            said = core.books.misjudged(model)
            if said and said != self._said.get(model.spec.name):
                self._said[model.spec.name] = said
                log.warning("models[%s]: %s", model.spec.name, said)


async def _save(file: KeptFile[T], figures: dict[str, T]) -> None:
    try:
        await asyncio.to_thread(file.save, figures)
    except OSError as error:
        log.warning("what was learned could not be written: %s", error)
