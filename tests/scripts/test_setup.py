"""`make setup`: what it refuses, what it says, and that it mends what was cut off. Nothing is downloaded here."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ("core", "dev", "engine-cpu", "engine-cuda")


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/setup.py, pointed at an empty checkout."""
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "scripts" / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    venv = tmp_path / ".venv"
    for name, value in {"ROOT": tmp_path, "VENV": venv, "STAMPS": venv / ".vramp"}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "PYTHON", venv / "bin" / "python")
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").touch()
    (venv / ".vramp").mkdir()
    (venv / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
    return module


def pins(lock: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / f"{lock}.lock").read_text(encoding="utf-8").splitlines()
    found = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found.items()}


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_pins_every_package_exactly(setup: ModuleType, lock: str) -> None:
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!_]+", line) for line in setup.read_lock(lock))


@pytest.mark.parametrize("lock", LOCKS[1:])
def test_locks_agree_on_what_they_share_so_that_order_does_not_matter(lock: str) -> None:
    core, other = pins("core"), pins(lock)
    assert {name: other[name] for name in core.keys() & other.keys()} == {
        name: core[name] for name in core.keys() & other.keys()
    }


def test_dev_and_engine_locks_agree_too() -> None:
    dev, engine = pins("dev"), pins("engine-cpu")
    assert [name for name in dev.keys() & engine.keys() if dev[name] != engine[name]] == []


def test_the_cpu_engine_brings_no_gpu_packages() -> None:
    assert not pins("engine-cpu").keys() & {"triton", "torchvision", "torchaudio", "torchcodec"}
    assert [name for name in pins("engine-cpu") if name.startswith(("nvidia-", "cuda-"))] == []


def test_another_system_is_told_what_still_works(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(setup.platform, "machine", lambda: "arm64")
    with pytest.raises(setup.SetupError, match=r"Linux on x86_64 only; this is Darwin on arm64.*ENGINE=simulated"):
        setup.engine_part("auto")
    assert setup.engine_part("simulated") is None


def test_a_gpu_takes_the_cuda_lock(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup.platform, "system", lambda: "Linux")
    monkeypatch.setattr(setup.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(setup.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(setup.glob, "glob", lambda _: [])
    assert setup.engine_part("auto") == "engine-cpu"
    monkeypatch.setattr(setup.glob, "glob", lambda pattern: [pattern.replace("*", "0000:01:00.0")])
    assert setup.engine_part("auto") == "engine-cuda"


def test_an_old_c_library_is_refused_before_the_download(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup.platform, "system", lambda: "Linux")
    monkeypatch.setattr(setup.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(setup.platform, "libc_ver", lambda: ("glibc", "2.17"))
    with pytest.raises(setup.SetupError, match=r"glibc 2\.28 or newer; this is glibc 2\.17"):
        setup.engine_part("auto")


def test_a_missing_compiler_is_named_with_its_remedy(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(setup.shutil, "which", lambda name: None if name == "g++" else f"/usr/bin/{name}")
    with pytest.raises(setup.SetupError, match=r"no compiler: g\+\+ not found.*apt-get install gcc g\+\+"):
        setup.check_compilers()


def test_missing_headers_and_venv_are_named_with_their_remedy(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(setup, "probe", lambda _: ((3, 12), tmp_path, False))
    with pytest.raises(
        setup.SetupError, match=r"python3\.12-venv\) and Python\.h \(python3\.12-dev\).*apt-get install"
    ):
        setup.find_python()


def test_an_old_python_is_not_taken(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(setup, "probe", lambda _: ((3, 9), tmp_path, True))
    monkeypatch.setenv("PYTHON", "/usr/bin/python3.9")
    with pytest.raises(setup.SetupError, match=r"Python 3\.11 to 3\.14 is needed \(PYTHON=/usr/bin/python3\.9"):
        setup.find_python()


def test_the_python_that_runs_this_would_be_found(setup: ModuleType) -> None:
    version, headers, _ = setup.probe(sys.executable)
    assert version == sys.version_info[:2]
    assert headers.is_absolute()


def test_a_full_disk_is_refused_with_figures(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**10, 9 * 10**9, 10**9))
    with pytest.raises(setup.SetupError, match=r"has 1\.0 GB free and 5\.4 GB are needed for core, engine-cpu"):
        setup.check_disk(["core", "engine-cpu"])


def test_a_torch_that_the_index_lacks_points_to_torch_index(setup: ModuleType) -> None:
    setup.log_path("torch").write_text("ERROR: No matching distribution found for torch==2.13.0+cpu\n")
    assert "TORCH_INDEX=URL" in setup.explain("torch", ["torch==2.13.0+cpu"])


def test_torch_index_is_asked_for_torch_alone(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, list[str]] = {}
    monkeypatch.setenv("TORCH_INDEX", "http://127.0.0.1:1/simple")
    monkeypatch.setattr(setup, "start", lambda name, command: started.setdefault(name, command) and Finished(0))
    monkeypatch.setattr(setup, "count_collected", lambda _: 0)
    setup.pip_install("engine-cpu", setup.Progress())
    assert [name for name, command in started.items() if "--index-url" in command] == ["torch"]
    assert started["torch"][-1] == "torch==2.13.0+cpu"
    assert not any(argument.startswith("torch==") for argument in started["engine-cpu"])
    assert all("--no-deps" in command for command in started.values())


def test_a_failed_pip_stops_the_other_one_and_shows_the_end_of_its_log(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = {"engine-cpu": Finished(None), "torch": Finished(1)}
    monkeypatch.setattr(setup, "start", lambda name, _: processes[name])
    setup.log_path("torch").write_text("one\nERROR: connection reset\n")
    with pytest.raises(
        setup.SetupError, match=r"(?s)pip failed on torch.*connection reset.*goes on from here"
    ) as raised:
        setup.pip_install("engine-cpu", setup.Progress())
    assert "the whole log is" in str(raised.value)
    assert processes["engine-cpu"].terminated


def test_a_package_whose_unpacking_was_cut_off_is_installed_again(setup: ModuleType) -> None:
    whole, half = (setup.site_packages() / name for name in ("whole-1.0.dist-info", "half-1.0.dist-info"))
    for info in (whole, half):
        info.mkdir()
        (info / "METADATA").touch()
    (whole / "INSTALLER").touch()
    setup.drop_half_installed()
    assert whole.exists()
    assert not half.exists()
    assert setup.installed_names() == {"whole"}


def test_a_part_is_done_until_its_lock_changes(setup: ModuleType) -> None:
    assert not setup.is_done("core")
    (setup.STAMPS / "core").write_text(setup.digest("core"))
    assert setup.is_done("core")
    lock = setup.ROOT / "requirements" / "core.lock"
    lock.write_text(lock.read_text().replace("aiohttp==", "aiohttp==9"))
    assert not setup.is_done("core")


def test_a_part_is_not_done_when_the_interpreter_has_gone(setup: ModuleType) -> None:
    (setup.STAMPS / "core").write_text(setup.digest("core"))
    setup.PYTHON.unlink()
    assert not setup.is_done("core")


def test_when_all_is_done_nothing_is_started(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("core", "project"):
        (setup.STAMPS / part).write_text(setup.digest(part))
    monkeypatch.setattr(setup.subprocess, "run", None)
    monkeypatch.setattr(setup.subprocess, "Popen", None)
    setup.set_up(["core"], setup.Progress())


def test_a_set_up_that_fails_half_way_leaves_no_stamp(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise setup.SetupError("no network")

    monkeypatch.setattr(setup, "check_compilers", lambda: None)
    monkeypatch.setattr(setup, "ensure_venv", lambda _: None)
    monkeypatch.setattr(setup, "pip_install", fail)
    with pytest.raises(setup.SetupError, match="no network"):
        setup.set_up(["core"], setup.Progress())
    assert not setup.is_done("core")


class Finished:
    """A process that has ended with this code, or has not when it is None."""

    def __init__(self, code: int | None) -> None:
        self.returncode = code
        self.terminated = False

    def poll(self) -> int | None:
        return self.returncode

    def terminate(self) -> None:
        self.terminated = True

    def wait(self) -> int | None:
        return self.returncode
