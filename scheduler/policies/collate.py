"""Serve what is loaded first, load in order of arrival, never disturb a busy model: llama-swap's rule, to compare with.

Without a worst wait: steady traffic to one model keeps another out for ever.
"""

from __future__ import annotations

from scheduler.ordering import Blind, Choice, Scene, oldest


class Collate(Blind):
    """Who waits for a busy victim keeps waiting, and everybody behind."""

    name = "collate"

    def choose(self, scene: Scene) -> Choice | None:
        """The longest waiting model, once its victims are idle."""
        model = oldest(scene.wanted)
        victims = None if model is None else scene.room_for(model)
        if model is None or victims is None or any(victim.in_flight for victim in victims):
            return None
        return Choice(model, victims, "first come")
