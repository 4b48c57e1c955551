"""How unequally two tenants were served while both had requests waiting: VTC's measure of fairness."""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.simulate.traces import Request

ARRIVE, ADMIT = 1, 0


def largest_service_gap(requests: Sequence[Request], waits_s: Sequence[float]) -> float:
    """Tokens (prompt and output) that one tenant was let in with beyond another, at most, within any span of time in
    which both had requests waiting throughout. O(requests x waiting tenants)."""
    moments = sorted(
        moment
        for index, (request, wait) in enumerate(zip(requests, waits_s, strict=True))
        if wait > 0.0
        for moment in ((request.at_s, ARRIVE, index), (request.at_s + wait, ADMIT, index))
    )
    waiting: dict[str, int] = {}
    lead: dict[tuple[str, str], float] = {}  # (a, b): by how much a has led since b was last at its best against a
    worst = 0.0
    for _, kind, index in moments:
        request = requests[index]
        tenant = request.tenant
        if kind == ARRIVE:
            waiting[tenant] = waiting.get(tenant, 0) + 1
            continue
        tokens = float(request.prompt_tokens + request.output_tokens)
        for other in waiting:
            if other != tenant:
                lead[tenant, other] = lead.get((tenant, other), 0.0) + tokens
                lead[other, tenant] = max(0.0, lead.get((other, tenant), 0.0) - tokens)
                worst = max(worst, lead[tenant, other])
        waiting[tenant] -= 1
        if not waiting[tenant]:
            del waiting[tenant]
            lead = {pair: value for pair, value in lead.items() if tenant not in pair}
    return worst
