"""The life of a model's engine, as a table. Whatever changes a state goes through `move`; the diagram in
docs/scheduler-memory.md is drawn from the table (`diagram`).

DRAINING may go back to READY only while requests are still in flight and nobody needs its memory any more. Once
STOPPING there is no way back: a victim that a new request could revive would block every later load for ever
(ollama/ollama#17408). SUSPENDING has none either: an engine between two states of sleep cannot be trusted with a
request.
"""

from __future__ import annotations

from scheduler.model import Residency

TRANSITIONS: dict[Residency, dict[Residency, str]] = {
    Residency.COLD: {
        Residency.LOADING: "room promised",
        Residency.READY: "adopted after a restart of the proxy",
        Residency.ASLEEP: "adopted asleep from the version before",
    },
    Residency.LOADING: {
        Residency.READY: "answered a request",
        Residency.FAILED: "did not start",
        Residency.COLD: "out of memory once",
        Residency.STOPPING: "broken off, or failed",
    },
    Residency.READY: {
        Residency.DRAINING: "its memory is wanted",
        Residency.SUSPENDING: "idle, and may sleep",
        Residency.STOPPING: "idle, or died",
        Residency.COLD: "died",
        Residency.FAILED: "died too often",
    },
    Residency.DRAINING: {
        Residency.READY: "not wanted after all",
        Residency.SUSPENDING: "idle, and may sleep",
        Residency.STOPPING: "idle, or died",
        Residency.COLD: "died",
        Residency.FAILED: "died too often",
    },
    Residency.SUSPENDING: {
        Residency.ASLEEP: "memory seen to fall",
        Residency.STOPPING: "memory kept, or died",
        Residency.COLD: "died",
        Residency.FAILED: "died too often",
    },
    Residency.ASLEEP: {
        Residency.WAKING: "room promised",
        Residency.DRAINING: "not to wake again, and a neighbour starts",
        Residency.STOPPING: "given up, or died",
        Residency.COLD: "died",
        Residency.FAILED: "died too often",
    },
    Residency.WAKING: {
        Residency.READY: "says what it said before",
        Residency.STOPPING: "says something else, or died",
        Residency.COLD: "died",
        Residency.FAILED: "died too often",
    },
    Residency.STOPPING: {
        Residency.COLD: "memory seen to fall",
        Residency.FAILED: "memory kept, or back-off is due",
    },
    Residency.FAILED: {Residency.COLD: "back-off is over"},
}


class IllegalTransition(Exception):
    """A bug in the core: this move is not in the table."""


def move(current: Residency, target: Residency) -> Residency:
    """The target, when the table allows it. O(1)."""
    if target not in TRANSITIONS[current]:
        raise IllegalTransition(f"{current} -> {target}")
    return target


def diagram() -> str:
    """The table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", "    [*] --> cold"]
    lines += [f"    {one} --> {other}: {why}" for one, targets in TRANSITIONS.items() for other, why in targets.items()]
    return "\n".join(lines)
