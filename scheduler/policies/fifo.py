"""Strict order of arrival: to compare with. Nobody is served before those who came earlier, whatever is loaded."""

from __future__ import annotations

from scheduler.model import Residency
from scheduler.ordering import Blind, Choice, Scene, oldest


class Fifo(Blind):
    """Worst wait: everything before it, one load after the other."""

    name = "fifo"
    strict = True

    def choose(self, scene: Scene) -> Choice | None:
        """The model of the oldest ticket of all, if it is not here."""
        model = oldest(scene.wanted)
        if model is None or any(
            len(other.queue) and oldest((model, other)) is other
            for other in scene.residents.values()
            if other.state is Residency.READY
        ):
            return None
        victims = scene.room_for(model)
        return None if victims is None else Choice(model, victims, "first come")
