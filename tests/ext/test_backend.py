import importlib
import os
import shutil
import subprocess
import sys
from inspect import getmembers
from pathlib import Path

import pytest

from ext import backend
from tests.ext.conftest import ARGUMENTS, CLASSES

# An editable install finds in the checkout what a copy of it lacks; the copy is to be seen as it is.
ALONE = (
    "import sys; sys.meta_path = [f for f in sys.meta_path if not getattr(f, '__module__', '').startswith('__ed')]; "
)
SHOW = "from ext import backend; print(backend.BACKEND, backend.MODULES['sse'], '|', backend.describe())"


def run(code: str, **environment: str) -> str:
    keep = {name: value for name, value in os.environ.items() if name != "VRAMP_PURE"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=keep | environment, capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout.strip()


def test_every_twin_is_chosen_and_has_a_native_source_that_is_built():
    folder = Path(backend.__file__).parent
    assert sorted(backend.NAMES) == sorted(twin.stem[1:-3] for twin in folder.glob("_*_py.py"))
    assert set(backend.NAMES) <= {source.stem[1:] for source in folder.glob("_*.pyx")}


@pytest.mark.native
def test_the_native_modules_were_built_and_are_what_runs():
    assert run(SHOW) == "native native | native"


@pytest.mark.native
@pytest.mark.parametrize("name", backend.NAMES)
def test_the_native_modules_are_compiled_and_typed(name):
    module = importlib.import_module(f"ext._{name}")
    assert module.__file__.endswith((".so", ".pyd"))
    for each in CLASSES[name]:
        instance = getattr(module, each)(*ARGUMENTS.get(each, ()))
        # Fields in C, not in a dict: what an untyped build of the same source would have.
        assert not hasattr(instance, "__dict__")
        with pytest.raises(AttributeError):
            instance.anything = 1
        # C arithmetic: a number that no C integer holds is refused, where an untyped build would take it.
        assert type(vars(type(instance))["__repr__"]).__name__ == "wrapper_descriptor"


@pytest.mark.native
@pytest.mark.parametrize("name", backend.NAMES)
def test_the_twins_have_the_same_public_names(name):
    pure, native = (importlib.import_module(f"ext._{name}{suffix}") for suffix in ("_py", ""))
    for each in CLASSES[name]:
        made = [getattr(m, each)(*ARGUMENTS.get(each, ())) for m in (pure, native)]
        names = [{n for n, _ in getmembers(twin) if not n.startswith("_")} for twin in made]
        assert names[0] == names[1]


def test_vramp_pure_forces_the_twins_and_says_so():
    assert run(SHOW, VRAMP_PURE="1") == "pure pure | pure (VRAMP_PURE is set)"


@pytest.mark.native
def test_vramp_pure_0_is_not_pure():
    assert run(SHOW, VRAMP_PURE="0") == "native native | native"


def test_a_missing_module_falls_back_to_its_twin_and_is_named():
    broken = "import sys; sys.modules['ext._sse'] = None\n" + SHOW
    answer = run(broken)
    assert answer.startswith("pure pure | pure in part (sse: not built or not loadable")
    assert "from ext.sse import EventScanner" not in answer
    assert run(broken + "\nfrom ext.sse import EventScanner; print(EventScanner.__module__)").endswith("ext._sse_py")


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_without_a_compiler_the_build_succeeds_says_so_and_leaves_the_twins(tmp_path):
    root = Path(backend.__file__).parents[1]
    shutil.copytree(root / "ext", tmp_path / "ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(root / "setup.py", tmp_path)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"CC": "/no/compiler", "CXX": "/no/compiler"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert "native extensions not built: ext._backlog, ext._body_scan, " in done.stderr
    shown = subprocess.run(
        [sys.executable, "-c", ALONE + SHOW], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert shown.stdout.startswith("pure pure | pure in part (weighted_semaphore: not built")
