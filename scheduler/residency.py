"""The life of a model's engine, as a table. Whatever changes a state goes through `move`.

```
COLD ──> LOADING ──> READY <──> DRAINING ──> STOPPING ──> COLD
  ^         │          │            │
  │         v          └── crash ───┴──> COLD or FAILED
  └────── FAILED (back-off, then COLD)
```

DRAINING may go back to READY only while requests are still in flight and nobody needs its memory any more. Once
STOPPING there is no way back: a victim that a new request could revive would block every later load for ever
(ollama/ollama#17408).
"""

from __future__ import annotations

from scheduler.model import Residency

TRANSITIONS: dict[Residency, frozenset[Residency]] = {
    Residency.COLD: frozenset({Residency.LOADING, Residency.READY}),  # READY: adopted after a restart of the proxy
    Residency.LOADING: frozenset({Residency.READY, Residency.FAILED, Residency.STOPPING}),
    Residency.READY: frozenset({Residency.DRAINING, Residency.STOPPING, Residency.COLD, Residency.FAILED}),
    Residency.DRAINING: frozenset({Residency.READY, Residency.STOPPING, Residency.COLD, Residency.FAILED}),
    Residency.STOPPING: frozenset({Residency.COLD}),
    Residency.FAILED: frozenset({Residency.COLD}),
}


class IllegalTransition(Exception):
    """A bug in the core: this move is not in the table."""


def move(current: Residency, target: Residency) -> Residency:
    """The target, when the table allows it. O(1)."""
    if target not in TRANSITIONS[current]:
        raise IllegalTransition(f"{current} -> {target}")
    return target
