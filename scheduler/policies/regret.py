"""The default: on-time requests per load second, with regret, forecast, and weight for those who are late already.

The score of loading a model is what it gains over the load seconds to the power `STEEP`. It gains

1. the waiting requests that are on time if it loads now, less `REGRET` of those that still would be if it loaded some
   seconds later: what can wait, waits;
2. the weight of age: whoever is late still counts, the more the longer, close to (age / A)^2.5, where A follows the
   99th percentile of the wait that llama-swap's rule would cause on the same arrivals (`scheduler.policies.shadow`);
3. the requests expected for it in the next seconds;

and it loses what its victims are worth: the requests expected for them, but no more than bringing them back costs.

`tail`, a factor on A, is the one setting. At 1 nobody is left behind and the 99th percentile of the wait stays near
that of llama-swap's rule, with far more requests on time; that is the default, because a proxy's callers time out. At
3, more requests are on time and the late ones wait longer.

A plan is revised at every event until its victims are idle; being planned counts like one request more, else two
equal models would take turns at draining each other's victims.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scheduler.eviction.base import Candidate
from scheduler.ledger import DeviceLedger
from scheduler.ordering import Choice, Scene, overdue
from scheduler.policies.shadow import CollateShadow
from scheduler.state import ModelState

TAIL_HELD, SHARE_FIRST = 1.0, 3.0

REGRET = 0.2
LATER_S = 8.0
AHEAD_S = 8.0  # requests expected for a model within so many seconds of its load count
VICTIM_AHEAD_S = 2.0  # and for a victim
RETURN_WORTH = 1.5  # a second of load to bring a victim back is worth so many requests
STEEP = 1.3
PLANNED = 1.0
DRAIN_COST = 1.5  # a second of waiting for victims to drain, in seconds of load
DRAIN_LOSS = 0.0
LATE = 1.0
LATE_STEEP = 1.3
LEAST_SCALE = 1.0  # in multiples of the patience
YARDSTICK_S = 1.0  # A is looked up so often


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
        model = self._models[name]
        return model.spec.memory_bytes, model.seconds_to_load, model.demand.mean_service_s()

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
        cost = model.seconds_to_load + DRAIN_COST * (begin - scene.link_free_s)
        ready = begin + model.seconds_to_load
        backlog = model.queue.backlog
        gain = backlog.on_time(ready) - REGRET * backlog.on_time(ready + LATER_S)
        late = LATE * backlog.weight(ready, scale)
        gain += AHEAD_S * model.demand.rate(scene.now, scene.watched_s)
        if model.spec.name == scene.planned:
            gain += PLANNED
        for victim in victims:
            gain -= worth[victim.model]
        cost = max(cost, 1e-3)
        return float(gain / cost**STEEP + late / cost**LATE_STEEP)

    def _worth(self, victim: Candidate, scene: Scene) -> float:
        rate = scene.residents[victim.model].demand.rate(scene.now, scene.watched_s)
        w = min(VICTIM_AHEAD_S * rate, RETURN_WORTH * victim.load_s)
        if DRAIN_LOSS and victim.in_flight:
            w += DRAIN_LOSS * rate * (scene.drained_at((victim,)) - scene.now)
        return w

    def _scale(self, scene: Scene) -> float:
        """A, in multiples of the patience of the standard class. The percentile is looked up once a second."""
        kind = scene.device.spec.kind
        looked_s, p99_s = self._p99_s.get(kind, (-YARDSTICK_S, 0.0))
        if scene.now - looked_s >= YARDSTICK_S:
            p99_s = self._shadows[kind].p99_s(scene.now)
            self._p99_s[kind] = (scene.now, p99_s)
        return max(LEAST_SCALE, self._tail * p99_s / scene.patience_s)
