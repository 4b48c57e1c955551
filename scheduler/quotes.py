"""What a ticket is told of its wait: where it stands, when its lease should come, what its load would cost the others.

The estimate is plain arithmetic over the model's state and the last plan; `scheduler.eta` learns what it leaves out.
Nothing here changes who is served. O(devices) each.
"""

from __future__ import annotations

from scheduler.admission import Waiting
from scheduler.eta import Calibration, Eta, Quote, Stage
from scheduler.model import Residency
from scheduler.placement import Placement
from scheduler.state import ModelState

AT_ONCE = Quote(Eta(0.0, 0.0, 0.0), 0.0)


class Quotes:
    """Estimates, and what the waits that have ended taught about them."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._calibration = Calibration()

    def estimate(self, model: ModelState, ahead: int, now: float) -> tuple[Stage, float]:
        """Where a ticket with so many before it stands, and for how long it should wait if nothing comes between."""
        service_s = model.demand.mean_service_s()
        if model.state is Residency.READY:
            return Stage.BUSY, (ahead + 1) * service_s / max(1, model.in_flight)
        rounds_s = ahead // model.spec.max_sequences * service_s
        if model.state in (Residency.LOADING, Residency.WAKING):
            return Stage.LOADING, model.expected_load_s(now) + rounds_s
        planned, begin_s = self._placement.begins_in_s(model, now)
        return Stage.PLANNED if planned else Stage.QUEUED, begin_s + model.seconds_to_load + rounds_s

    def eta(self, model: ModelState, ahead: int, now: float) -> Eta:
        """The same, corrected by experience, with its interval."""
        return self._calibration.eta(*self.estimate(model, ahead, now))

    def retry_after_s(self, model: ModelState, now: float) -> float:
        """When somebody who finds the queue full should come again."""
        return max(1.0, self.eta(model, len(model.queue), now).expected_s)

    def admitted(self, waiting: Waiting, now: float) -> None:
        """A wait is over as it should be: learn from it."""
        self._calibration.learn(waiting.stage, waiting.estimate_s, now - waiting.since_s)

    def quote(self, model: ModelState, waiting: Waiting | None, now: float) -> Quote:
        """For a ticket that waits, or for one that would come now."""
        if waiting is None and model.state is Residency.READY and not len(model.queue):
            engine = model.engine
            if engine is not None and engine.capacity.free_sequences and engine.capacity.free_tokens:
                return AT_ONCE
        ahead = len(model.queue) if waiting is None else model.queue.ahead(waiting)
        alone = model.engine is None and len(model.queue) <= (waiting is not None)
        return Quote(self.eta(model, ahead, now), model.seconds_to_load if alone else 0.0)

    def describe(self, model: ModelState, waiting: Waiting, now: float) -> str:
        """One line for the client that waits: what happens, how far it is, who goes first."""
        ahead = model.queue.ahead(waiting)
        parts = [why_waiting(model)]
        if ahead:
            parts.append(f"{ahead} before you")
        eta = self.eta(model, ahead, now)
        parts.append(f"about {eta.expected_s:.0f} s ({eta.low_s:.0f} to {eta.high_s:.0f} s)")
        return ", ".join(parts)


def why_waiting(model: ModelState) -> str:
    """What stands between a model's tickets and their leases, for people."""
    name = model.spec.name
    match model.state:
        case Residency.LOADING:
            return f"loading {name}, {model.progress:.0%} ({model.note})"
        case Residency.WAKING:
            return f"waking {name}"
        case Residency.READY:
            return f"{name} is busy"
        case Residency.DRAINING | Residency.SUSPENDING | Residency.STOPPING:
            return f"{name} makes room for another model first"
        case _:
            return f"making room for {name}"
