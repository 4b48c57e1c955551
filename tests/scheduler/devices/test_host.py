"""Host memory read from the real /proc, and cgroups of both versions from a folder that looks like them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scheduler.devices.host import Cgroup, HostDevice, available_bytes, launcher_bytes, unique_bytes

MIB = 1 << 20
HOLDS_64_MIB = "import sys; kept = bytearray(64 << 20); print(1, flush=True); sys.stdin.read()"
FORKS_WITH_64_MIB = """
import os, sys
kept = bytearray(64 << 20)
child = os.fork()
if child == 0:
    sys.stdin.read()
    os._exit(0)
print(child, flush=True)
sys.stdin.read()
"""


def run(code: str) -> Iterator[tuple[int, int]]:
    with subprocess.Popen([sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process.pid, int(process.stdout.readline())


@pytest.fixture
def engine() -> Iterator[int]:
    for pid, _ in run(HOLDS_64_MIB):
        yield pid


@pytest.fixture
def launcher_and_fork() -> Iterator[tuple[int, int]]:
    yield from run(FORKS_WITH_64_MIB)


def device(available: int, budget: int = 1024 * MIB) -> HostDevice:
    return HostDevice(budget, available=lambda _: available)


def test_an_engine_counts_with_what_its_end_would_free(engine: int) -> None:
    held = device(4096 * MIB).measure({"m#1": [engine]}, []).engines["m#1"]
    assert 64 * MIB < held < 96 * MIB


def test_a_launcher_s_pages_count_once_however_many_forks_share_them(launcher_and_fork: tuple[int, int]) -> None:
    launcher, fork = launcher_and_fork
    reading = device(4096 * MIB).measure({"m#1": [fork]}, [launcher])
    assert 64 * MIB < reading.overhead_bytes < 96 * MIB
    assert reading.engines["m#1"] < 16 * MIB
    assert unique_bytes(launcher) < 16 * MIB  # which is why a launcher is not counted by USS


def test_a_process_that_has_gone_counts_nothing() -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as gone:
        gone.wait()
    assert (unique_bytes(gone.pid), launcher_bytes(gone.pid)) == (0, 0)
    assert device(4096 * MIB).measure({"m#1": [gone.pid]}, [gone.pid]).engines == {"m#1": 0}


def test_a_budget_is_ours_alone_while_the_machine_can_honour_it() -> None:
    reading = device(available=2048 * MIB).measure({}, [])
    assert (reading.total_bytes, reading.foreign_bytes, reading.used_bytes) == (1024 * MIB, 0, 0)


def test_what_the_machine_cannot_give_any_more_is_foreign(engine: int) -> None:
    reading = device(available=256 * MIB).measure({"m#1": [engine]}, [])
    held = reading.engines["m#1"]
    assert reading.foreign_bytes == 1024 * MIB - held - 256 * MIB
    assert reading.used_bytes == held + reading.foreign_bytes


def test_without_a_budget_a_share_of_what_is_available_is_used(tmp_path: Path) -> None:
    free = Cgroup(tmp_path, tmp_path)
    assert HostDevice(cgroup=free, available=lambda _: 1000 * MIB).spec.capacity_bytes == 800 * MIB


def cgroup(tmp_path: Path, line: str, files: dict[str, str]) -> Cgroup:
    proc = tmp_path / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(f"9:name=systemd:/\n{line}\n")
    for name, content in files.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return Cgroup(tmp_path / "cgroup", proc)


V2 = {"a/b/memory.max": "max\n", "a/memory.max": "1000\n", "a/memory.current": "900\n"}
V1 = {
    "memory/a/memory.limit_in_bytes": "1000\n",
    "memory/a/memory.usage_in_bytes": "900\n",
    "memory/memory.limit_in_bytes": "9223372036854771712\n",
}


@pytest.mark.parametrize(("line", "files"), [("0::/a/b", V2), ("4:memory:/a", V1), ("4:cpu,memory:/a", V1)])
def test_a_cgroup_s_limit_is_found_also_above_our_own(tmp_path: Path, line: str, files: dict[str, str]) -> None:
    group = cgroup(tmp_path, line, files)
    assert (group.limit(), group.available()) == (1000, 100)


def test_page_cache_that_the_kernel_can_drop_is_available(tmp_path: Path) -> None:
    group = cgroup(tmp_path, "0::/a/b", {**V2, "a/memory.stat": "anon 500\ninactive_file 300\n"})
    assert group.available() == 400


def test_a_folder_of_a_namespace_that_we_cannot_see_falls_back_to_the_mount(tmp_path: Path) -> None:
    group = cgroup(tmp_path, "0::/../elsewhere/x", {"memory.max": "2000\n", "memory.current": "0\n"})
    assert group.limit() == 2000


def test_without_a_limit_the_machine_says_what_is_available(tmp_path: Path) -> None:
    group = cgroup(tmp_path, "0::/a", {"a/memory.max": "max\n"})
    assert (group.limit(), group.available()) == (None, None)
    assert available_bytes(group) > 0


def test_a_cgroup_s_limit_is_the_capacity_where_nothing_is_configured(tmp_path: Path) -> None:
    group = cgroup(tmp_path, "0::/a/b", V2)
    assert HostDevice(cgroup=group).spec.capacity_bytes == 100


def test_a_cgroup_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    group = cgroup(tmp_path, "0::/a/b", {**V2, "a/memory.current": "5000\n"})
    assert available_bytes(group) == 0


def test_engines_of_the_host_see_no_gpu() -> None:
    assert device(1).engine_env() == {"CUDA_VISIBLE_DEVICES": ""}
