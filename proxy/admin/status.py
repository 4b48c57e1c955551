"""What `vramp status` shows: a plain value made of the scheduler's state. Reads, changes nothing. O(models)."""

from __future__ import annotations

from typing import Any

from proxy.admin.scheduler import decisions, devices, queues
from proxy.config import Config, ModelConfig
from scheduler.driver import Scheduler
from scheduler.model import LatencyClass, Residency
from scheduler.state import ModelState


def status(
    scheduler: Scheduler, config: Config, *, uptime_s: float, now: float, about: dict[str, object]
) -> dict[str, Any]:
    """The whole picture: devices, models, queues, last decisions. Sizes are bytes, times are seconds."""
    core = scheduler.core
    local = {model.id: model for model in config.models if model.id in core.models}
    return {
        **about,
        "uptime_s": round(uptime_s, 1),
        "devices": devices(scheduler, now),
        "models": [_model(state, local.get(name), scheduler, now) for name, state in core.models.items()]
        + [_remote(model) for model in config.models if model.id not in core.models],
        "waiting": [
            {"class": c.name.lower(), "count": count}
            for c, count in zip(LatencyClass, core.waiting_by_class(), strict=True)
        ],
        "queues": queues(scheduler),
        "decisions": decisions(scheduler.decisions),
    }


def _model(state: ModelState, model: ModelConfig | None, scheduler: Scheduler, now: float) -> dict[str, Any]:
    engine = state.engine
    holding = scheduler.core.devices[engine.device].holding(engine.id) if engine is not None else None
    _, url = scheduler.engine_urls().get(engine.id, ("", None)) if engine is not None else ("", None)
    waits = state.state in (Residency.LOADING, Residency.WAKING) or (
        state.state in (Residency.COLD, Residency.ASLEEP) and len(state.queue) > 0
    )
    return {
        "id": state.spec.name,
        "backend": model.backend if model is not None else "",
        "task": model.task if model is not None else "",
        "device": engine.device if engine is not None else None,
        "engine": engine.id if engine is not None else None,
        "base_url": url,
        "pids": scheduler.pids(engine.id) if engine is not None else [],
        "state": state.state.value,
        "note": _note(state, scheduler),
        "progress": round(state.progress, 3),
        "memory_bytes": state.booked_bytes,
        "measured_bytes": holding.measured if holding is not None else None,
        "pinned": state.spec.pinned,
        "in_flight": engine.in_flight if engine is not None else 0,
        "waiting": len(state.queue),
        "eta_s": round(state.expected_load_s(now), 1) if waits else None,
        "last_used_s": round(now - state.last_used_s, 1) if engine is not None else None,
        "loads": state.loads,
    }


def _note(state: ModelState, scheduler: Scheduler) -> str:
    """What there is to say of it: why it failed, why it is here before anybody asked, why it is not here yet."""
    if state.state is Residency.FAILED:
        return state.last_error
    if state.guessed and state.engine is not None and state.engine.guess is not None:
        return f"guessed: {state.engine.guess.why}"
    if state.state in (Residency.COLD, Residency.ASLEEP) and scheduler.core.placement.holding.holds(state):
        return "held back for a moment: what would leave is about to be used"
    return state.note


def _remote(model: ModelConfig) -> dict[str, Any]:
    return {
        "id": model.id,
        "backend": model.backend,
        "task": model.task,
        "state": "remote",
        "in_flight": 0,
        "waiting": 0,
    }
