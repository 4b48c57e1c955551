"""One suite, both twins: a test that takes `twins` runs on the native module and on the pure one."""

from __future__ import annotations

import importlib
import os
from types import SimpleNamespace

import pytest
from hypothesis import settings

CLASSES = {
    "weighted_semaphore": ("Capacity", "WeightedSemaphore"),
    "fair_queue": ("FairQueue",),
    "backlog": ("Backlog",),
    "sse": ("EventScanner",),
    "rate_counters": ("RateCounters",),
    "body_scan": (),
    "json_lines": (),
    "tally": ("Histogram", "Tally"),
    "occupancy": ("Occupancy",),
    "relay": (),
}
# to make one of them
ARGUMENTS = {"Capacity": (1,), "WeightedSemaphore": (1,), "Histogram": ((1.0,),), "Tally": ((1.0,),)}

# Machines that run these differ tenfold in speed, and a counterexample must be found again by anyone. The fuzz run of
# docs/ext.md takes new random input each time and as much as it is told.
FUZZ = int(os.environ.get("FUZZ", "0"))
EXAMPLES = FUZZ or 40
settings.register_profile("ext", deadline=None, derandomize=not FUZZ, print_blob=True, max_examples=EXAMPLES)
settings.load_profile("ext")


def load(kind: str) -> SimpleNamespace:
    """All public classes of one kind of twin; fails, never skips, where the native modules were not built."""
    suffix = "_py" if kind == "pure" else ""
    twins = SimpleNamespace(kind=kind, module=lambda name: importlib.import_module(f"ext._{name}{suffix}"))
    for name, classes in CLASSES.items():
        module = importlib.import_module(f"ext._{name}{suffix}")
        for each in classes:
            setattr(twins, each, getattr(module, each))
    return twins


@pytest.fixture(params=["pure", pytest.param("native", marks=pytest.mark.native)], scope="session")
def twins(request: pytest.FixtureRequest) -> SimpleNamespace:
    return load(request.param)
