"""GET /admin/api/scheduler: the ledger, every model's residency, the queues, the last decisions, each with its reason.

A plain value made of the scheduler's state; sizes are bytes, times are seconds. Reads, changes nothing. O(models +
waiting tickets): it is for people and their tools, not for scraping.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from scheduler.books import Books
from scheduler.devices.reader import Trouble
from scheduler.driver import Decision, Scheduler
from scheduler.ledger import DeviceLedger
from scheduler.model import LatencyClass
from scheduler.state import ModelState


def scheduler_view(scheduler: Scheduler, now: float) -> dict[str, Any]:
    """The whole of the answer."""
    core = scheduler.core
    return {
        "devices": [
            {**sums, "engines": _engines(core.devices[sums["name"]], core.books)} for sums in devices(scheduler, now)
        ],
        "sleep_memory": {
            "budget_bytes": core.books.sleep_memory.budget,
            "held_bytes": core.books.sleep_memory.held,
        },
        "anticipation": {
            "guesses_right": core.placement.guesses.right,
            "guesses_wrong": core.placement.guesses.wrong,
            "guesses_open": len(core.placement.guesses),
            "swaps_held": core.placement.holding.held,
        },
        "models": [_model(model, core.books, now) for model in core.models.values()],
        "queues": queues(scheduler),
        "decisions": decisions(scheduler.decisions),
    }


def decisions(kept: Iterable[Decision]) -> list[dict[str, Any]]:
    """The last ones, the oldest first."""
    return [{"t_s": decision.at_s, "what": decision.what, "why": decision.why} for decision in kept]


def queues(scheduler: Scheduler) -> list[dict[str, Any]]:
    """How many wait, by model, latency class and tenant."""
    counts = Counter((ticket.model, ticket.latency_class, ticket.tenant) for ticket in scheduler.core.waiting_tickets())
    return [
        {"model": model, "class": LatencyClass(of).name.lower(), "tenant": tenant, "count": count}
        for (model, of, tenant), count in sorted(counts.items())
    ]


def devices(scheduler: Scheduler, now: float) -> list[dict[str, Any]]:
    """The books of the devices, in sums; `unreadable` where they go by what was read some time ago."""
    unreadable = scheduler.unreadable()
    return [_device(ledger, unreadable.get(name), now) for name, ledger in scheduler.core.devices.items()]


def _device(ledger: DeviceLedger, trouble: Trouble | None, now: float) -> dict[str, Any]:
    spec = ledger.spec
    return {
        "name": spec.name,
        "kind": spec.kind,
        "capacity_bytes": spec.capacity_bytes,
        "reserved_bytes": spec.reserve_bytes,
        "overhead_bytes": ledger.overhead,
        "foreign_bytes": ledger.foreign,
        "used_bytes": ledger.used,
        "held_bytes": ledger.held,
        "free_bytes": ledger.free,
        "starting": ledger.starting,
        "unreadable": None if trouble is None else {"for_s": round(now - trouble.since_s, 1), "why": trouble.reason},
    }


def _engines(ledger: DeviceLedger, books: Books) -> list[dict[str, Any]]:
    engines = []
    for engine_id, holding in ledger.holdings():
        model = books.by_engine(engine_id)
        engines.append(
            {
                "engine": engine_id,
                "state": model.state.value if model is not None else None,
                "promised_bytes": holding.predicted,
                "measured_bytes": holding.measured,
                "peak_bytes": holding.peak or None,
                "held_bytes": holding.held,
            }
        )
    return engines


def _credit(model: ModelState) -> list[dict[str, int]]:
    """What workers may let in without asking."""
    shares = () if model.engine is None else model.engine.credits
    return [
        {"worker": holder, "sequences": share.sequences, "tokens": share.tokens, "in_use": share.in_use}
        for holder, share in shares
    ]


def _model(model: ModelState, books: Books, now: float) -> dict[str, Any]:
    engine, spec = model.engine, model.spec
    return {
        "id": spec.name,
        "state": model.state.value,
        "note": model.last_error or model.note,
        "engine": engine.id if engine is not None else None,
        "devices": list(engine.devices) if engine is not None else [],
        "predicted_bytes": spec.memory_bytes,
        "stated": spec.stated,
        "booked_bytes": model.booked_bytes,
        "misjudged": books.misjudged(model) or None,
        "in_flight": model.in_flight,
        "credit": _credit(model),
        "waiting": len(model.queue),
        "eta_s": round(model.expected_load_s(now), 1),
        "retry_in_s": round(max(0.0, model.retry_at_s - now), 1) if model.engine is None and model.failures else None,
        "failures": model.failures,
        "loads": model.loads,
        "pinned": spec.pinned,
    }
