"""The most waiting requests that can still be on time, per second of load: to compare with.

What can no longer be on time weighs next to nothing, so it starves until it is overdue.
"""

from __future__ import annotations

from scheduler.ordering import Blind, Choice, Scene, arrival_order, overdue

LATE = 1e-3  # a late request against one that can be on time


class Slack(Blind):
    """Plain: no forecast, no regret, no thought for who is evicted."""

    name = "slack"

    def choose(self, scene: Scene) -> Choice | None:
        """The best value per load second; level ones by who waits longest."""
        first = overdue(scene)
        if first is not None:
            return first
        best: tuple[tuple[float, float], Choice] | None = None
        for model in scene.wanted:
            victims = scene.room_for(model)
            if victims is None:
                continue
            ready = max(scene.link_free_s, scene.drained_at(victims)) + model.seconds_to_load
            value = model.queue.backlog.on_time(ready) + LATE * len(model.queue)
            key = (-value / model.seconds_to_load, arrival_order(model))
            if best is None or key < best[0]:
                best = key, Choice(model, victims, f"{value:.0f} requests can be on time")
        return None if best is None else best[1]
