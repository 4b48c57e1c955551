"""Which twin runs, native or pure, decided once, at import.

Falling back is never silent: a server says why when it starts (`describe`), and `vramp status` and `vramp --version`
show `BACKEND`. Refused: deciding module by module at first use, because then nobody could tell at start.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

NAMES = (
    "weighted_semaphore",
    "fair_queue",
    "backlog",
    "sse",
    "rate_counters",
    "body_scan",
    "json_lines",
    "tally",
    "occupancy",
    "relay",
)


def _choose(name: str) -> tuple[ModuleType, str]:
    """The module that stands for `name`, and why it is not the native one ("" when it is)."""
    if os.environ.get("VRAMP_PURE", "") not in ("", "0"):
        return importlib.import_module(f"ext._{name}_py"), "VRAMP_PURE is set"
    try:
        return importlib.import_module(f"ext._{name}"), ""
    except ImportError as error:
        return importlib.import_module(f"ext._{name}_py"), f"not built or not loadable: {error}"


_CHOSEN = {name: _choose(name) for name in NAMES}

REASONS: dict[str, str] = {name: reason for name, (_, reason) in _CHOSEN.items() if reason}
MODULES: dict[str, str] = {name: "pure" if name in REASONS else "native" for name in NAMES}
BACKEND: str = "pure" if REASONS else "native"


def module(name: str) -> ModuleType:
    """The twin that runs for one of `NAMES`."""
    return _CHOSEN[name][0]


def describe() -> str:
    """One line for people: `native`, or which modules are pure and why."""
    if not REASONS:
        return "native"
    if len(set(REASONS.values())) == 1 and len(REASONS) == len(NAMES):
        return f"pure ({next(iter(REASONS.values()))})"
    return "pure in part (" + "; ".join(f"{name}: {reason}" for name, reason in REASONS.items()) + ")"
