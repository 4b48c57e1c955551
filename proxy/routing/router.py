"""Where a call may go: the deployments of its model in the order to try them, each with the reason for its place.

Local first, because it costs nothing more and nothing leaves the house; then remote ones in the order written.
"""

from __future__ import annotations

from difflib import get_close_matches

import msgspec

from proxy.catalog.catalog import Catalog, Deployment
from proxy.dialects.call import Call, Task
from proxy.errors import InvalidRequest, NotFound

SUGGESTIONS = 3
SHOWN = 100  # characters of a caller's own words that an error repeats; difflib is quadratic beyond


class Candidate(msgspec.Struct, frozen=True):
    """One attempt that may be made. `where` is the backend as response headers show it."""

    deployment: Deployment
    reason: str
    local: bool
    where: str


class Decision(msgspec.Struct, frozen=True):
    """What routing says: never empty, tried from the left."""

    candidates: tuple[Candidate, ...]
    reason: str


class Router:
    """Decides from the catalog alone, so a decision is made once for each model and task that the catalog has."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._decided: dict[tuple[str, Task], Decision] = {}

    def decide(self, call: Call) -> Decision:
        """The candidates. Raises `NotFound` for an unknown model, `InvalidRequest` where none has the path's task, and
        for a call with nothing in it to a local model, which might be loaded only to say so. A remote one says it."""
        key = (call.model, call.endpoint.task)
        decided = self._decided.get(key)
        if decided is None:
            decided = self._decided[key] = self._decide(call)
        if call.lacks and decided.candidates[0].local:
            says = f"Field '{call.lacks}' is missing or empty; it needs at least one entry."
            raise InvalidRequest(says, param=call.lacks)
        return decided

    def _decide(self, call: Call) -> Decision:
        group = self._catalog.group(call.model)
        if not group:
            raise self._unknown(call.model)
        able = [each for each in group if each.serves(call.endpoint.task)]
        if not able:
            raise InvalidRequest(
                f"Model '{call.model}' is for task '{group[0].model.task}'; {call.endpoint.path} needs a model "
                f"for '{call.endpoint.task}'.",
                param="model",
                code="model_not_supported",
            )
        ordered = [each for each in able if each.local] + [each for each in able if not each.local]
        candidates = tuple(
            Candidate(each, _reason(each, first=not at), each.local, each.where) for at, each in enumerate(ordered)
        )
        return Decision(candidates, candidates[0].reason)

    def _unknown(self, name: str) -> NotFound:
        near = get_close_matches(name, self._catalog.ids, SUGGESTIONS) if len(name) <= SHOWN else []
        hint = f"Did you mean {' or '.join(near)}?" if near else "GET /v1/models lists what there is."
        return NotFound(f"There is no model '{name[:SHOWN]}'. {hint}", param="model", code="model_not_found")


def _reason(deployment: Deployment, *, first: bool) -> str:
    kind = "local" if deployment.local else "remote"
    return kind if first else f"fallback-{kind}"
