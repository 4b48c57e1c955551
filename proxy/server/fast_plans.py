"""What the fast lane has decided before: decoding and routing are functions of a call's short form alone.

Calls of one program say the same but for their messages, and messages are not in the short form. So the ordinary call
costs one look-up here, whatever decoding and routing become. Nothing that counts or waits is remembered: who calls and
what is free are asked for every time. A new configuration starts with nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ext.relay import Limits
from proxy.dialects.call import Call
from proxy.dialects.decode import decode_short
from proxy.dialects.endpoints import ENDPOINTS
from proxy.observe.outcome import Outcome
from proxy.providers.base import Provider
from proxy.routing.router import Candidate
from proxy.server.journey import changes_for, note_attempt, note_call
from proxy.server.state import State

MOST_PLANS = 1024
MOST_SHORT = 1024  # bytes of a short form that is remembered


class Plan(msgspec.Struct, eq=False):
    """One kind of call on its first candidate. `call` and `outcome` are copied, for what differs between two calls."""

    state: State
    call: Call
    candidate: Candidate
    provider: Provider
    upstream_path: str
    outcome: Outcome
    changes: dict[str, bytes]
    limits: Limits
    may_fail_over: bool  # to another candidate, or to another engine


class Plans:
    """The plans of one configuration."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._known: dict[tuple[str, bytes, str | None], Plan] = {}
        timeouts = state.config.timeouts
        self._limits = Limits(
            connect_s=timeouts.connect_s,
            first_byte_s=timeouts.first_byte_s,
            idle_s=timeouts.idle_s,
            total_s=timeouts.total_s,
            stall_s=timeouts.write_stall_s,
        )

    def find(self, path: str, headers: Mapping[str, str], short: bytes) -> Plan:
        """The plan of a call with this short form. Raises `CallError` for what is none."""
        key = (path, short, headers.get("x-vramp-class"))
        plan = self._known.get(key)
        if plan is None:
            plan = self._make(path, headers, short)
            if len(short) <= MOST_SHORT:
                if len(self._known) >= MOST_PLANS:
                    self._known.clear()
                self._known[key] = plan
        return plan

    def _make(self, path: str, headers: Mapping[str, str], short: bytes) -> Plan:
        state, endpoint = self._state, ENDPOINTS[path]
        call = decode_short(endpoint, headers, (short, {}), 0, state.defaults[endpoint.task])
        decision = state.router.decide(call)
        candidate = decision.candidates[0]
        outcome = Outcome("", "POST", path, 0.0)
        note_call(outcome, call)
        note_attempt(outcome, candidate)
        return Plan(
            state=state,
            call=call,
            candidate=candidate,
            provider=state.providers[candidate.deployment.backend.name],
            upstream_path=endpoint.upstream_path,
            outcome=outcome,
            changes=changes_for(call, candidate.deployment),
            limits=self._limits,
            may_fail_over=candidate.local or len(decision.candidates) > 1,
        )
