"""One suite, both twins: a test that takes `twins` runs on the native module and on the pure one."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
from hypothesis import settings

from ext.backend import NAMES

# Machines that run these differ tenfold in speed, and a counterexample must be found again by anyone.
settings.register_profile("ext", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ext")


def load(kind: str) -> SimpleNamespace:
    """All public classes of one kind of twin; fails, never skips, where the native modules were not built."""
    suffix = "_py" if kind == "pure" else ""
    modules = [importlib.import_module(f"ext._{name}{suffix}") for name in NAMES]
    return SimpleNamespace(kind=kind, **{name: value for module in modules for name, value in vars(module).items()})


@pytest.fixture(params=["pure", pytest.param("native", marks=pytest.mark.native)], scope="session")
def twins(request: pytest.FixtureRequest) -> SimpleNamespace:
    return load(request.param)
