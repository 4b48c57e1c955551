"""The default: on-time requests per load second, with regret, forecast, and weight for those who are late already.

A model's score is what loading it next gains, per second that this takes. It gains

1. the waiting requests that are on time if it loads now, less `REGRET` of those that still would be if it loaded
   `LATER_S` later: what can wait, waits;
2. the weight of age: whoever is late still counts, the more the longer, close to (age / A)^2.5, where A follows the
   99th percentile of the wait that llama-swap's rule would cause on the same arrivals (`scheduler.policies.shadow`);

and it loses what its victims are worth: the requests expected for them, but no more than bringing them back costs, and
those that come while they drain. The seconds are those of the load and, counted `DRAIN_COST` times, those for which the
device stands idle until the victims have drained; they weigh with a power slightly above one, because what is loaded
quickly can be followed by something else sooner.

`tail`, a factor on A, is the one setting. At 1.1 (`TAIL_HELD`, the default) the 99th percentile of the wait stays near
that of llama-swap's rule, with far more requests on time. At 10 (`SHARE_FIRST`) more still are on time, and the late
ones wait up to three times as long. The tail is held by default because callers of a proxy time out: an answer
after minutes is worth nothing to them, and up to twelve points of share do not make up for it.

No wait is longer than `scheduler.ordering.worst_wait_s`. The parameters were found on redraws of two public traces
(arrivals jittered, models permuted over sizes, other windows); docs/scheduling.md has what they reach elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scheduler.eviction.base import Candidate
from scheduler.ledger import DeviceLedger
from scheduler.ordering import Choice, Scene, overdue
from scheduler.policies.shadow import CollateShadow
from scheduler.state import ModelState

TAIL_HELD, SHARE_FIRST = 1.1, 10.0

REGRET = 0.4
LATER_S = 5.0
VICTIM_AHEAD_S = 8.0  # requests expected for a victim within so many seconds count,
RETURN_WORTH = 0.1  # but a second of load to bring it back is worth no more than so many requests
DRAIN_COST = 1.5  # a second of waiting for victims to drain, in seconds of load
DRAIN_LOSS = 2.0  # requests on time, for each that is expected at a victim while it drains: it waits for a new load
STEEP = 1.15
LEAST_SCALE = 1.0  # in multiples of the patience
YARDSTICK_S = 1.0  # A is looked up so often
LEAST_COST_S = 1e-3


class Regret:
    """See the module. `tail` is a factor on the age at which a late request weighs as much as one on time."""

    name = "vramp"
    strict = False
    just_in_time = True

    def __init__(self, tail: float = TAIL_HELD) -> None:
        self._tail = tail
        self._models: Mapping[str, ModelState] = {}
        self._shadows: dict[str, CollateShadow] = {}
        self._kinds: dict[str, str] = {}
        self._p99_s: dict[str, tuple[float, float]] = {}

    def watch(self, models: Mapping[str, ModelState], devices: Mapping[str, DeviceLedger]) -> None:
        """A shadow for every kind of device."""
        self._models = models
        self._kinds = {name: device.spec.kind for name, device in devices.items()}
        self._kinds |= {kind: kind for kind in self._kinds.values()}
        for kind in {device.spec.kind for device in devices.values()}:
            same = [device for device in devices.values() if device.spec.kind == kind]
            self._shadows[kind] = CollateShadow(sum(device.limit for device in same), len(same), self._needs)

    def saw(self, arrivals: Sequence[tuple[float, str]]) -> None:
        """The shadows run on the same arrivals."""
        for now, name in arrivals:
            model = self._models.get(name)
            shadow = None if model is None else self._shadows.get(self._kinds.get(model.spec.device, ""))
            if shadow is not None:
                shadow.arrive(name, now)

    def _needs(self, name: str) -> tuple[int, float, float]:
        model = self._models.get(name)
        if model is None:
            return 0, 0.0, 0.0  # removed from the configuration; what a shadow still has of it is soon done
        return model.spec.memory_bytes, model.return_s, model.demand.mean_service_s()

    def choose(self, scene: Scene) -> Choice | None:
        """The best score; None when everything that could be loaded costs more than it gains."""
        first = overdue(scene)
        if first is not None:
            return first
        scale = self._scale(scene)
        worth = {each.model: self._worth(each, scene) for each in scene.candidates}
        best: Choice | None = None
        best_score = 0.0
        # the most that each can score, with victims that are idle and worth nothing: most need no closer look
        hopes = [(self._score(model, (), worth, scale, scene), model.spec.name, model) for model in scene.wanted]
        hopes.sort(reverse=True)
        for hope, _, model in hopes:
            if hope <= best_score:
                break
            victims = scene.room_for(model)
            if victims is None:
                continue
            score = self._score(model, victims, worth, scale, scene)
            if score > best_score:
                best_score = score
                best = Choice(model, victims, f"{len(model.queue)} wait for it, score {score:.2g}")
        return best

    def _score(
        self,
        model: ModelState,
        victims: Sequence[Candidate],
        worth: Mapping[str, float],
        scale: float,
        scene: Scene,
    ) -> float:
        """O(victims + log waiting)."""
        begin = max(scene.link_free_s, scene.drained_at(victims)) if victims else scene.link_free_s
        ready = begin + model.seconds_to_load
        cost = model.seconds_to_load + DRAIN_COST * (begin - scene.link_free_s)
        gain = model.queue.backlog.gain(ready, ready + LATER_S, REGRET, scale)
        for victim in victims:
            gain -= worth[victim.model]
        return float(gain / max(cost, LEAST_COST_S) ** STEEP)

    def _worth(self, victim: Candidate, scene: Scene) -> float:
        rate = scene.residents[victim.model].demand.rate(scene.now, scene.watched_s)
        worth = min(VICTIM_AHEAD_S * rate, RETURN_WORTH * victim.load_s)
        if victim.in_flight:
            worth += DRAIN_LOSS * rate * (scene.drained_at((victim,)) - scene.now)
        return worth

    def _scale(self, scene: Scene) -> float:
        """A, in multiples of the patience of the standard class. The percentile is looked up once a second."""
        kind = scene.device.spec.kind
        looked_s, p99_s = self._p99_s.get(kind, (-YARDSTICK_S, 0.0))
        if scene.now - looked_s >= YARDSTICK_S:
            p99_s = self._shadows[kind].p99_s(scene.now)
            self._p99_s[kind] = (scene.now, p99_s)
        return max(LEAST_SCALE, self._tail * p99_s / scene.patience_s)
