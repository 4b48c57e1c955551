"""Host memory, for engines that compute on the CPU.

An engine counts with its USS: the pages that ending it frees. Engines forked from a warm launcher share with it what
they have not written to, and that belongs to none of them. The launcher is counted once, by its RSS less its file
pages (`Anonymous`): everything that lives as long as it does, whether or not a fork shares it at the moment, and not
the libraries' text, which the kernel drops when it needs the room. PSS would make the launcher's figure fall with each
engine started and rise with each stopped, as if an eviction freed less than it does.

    used    = USS of the engines + Anonymous of the launchers
    foreign = what is missing when capacity - used is more than the machine (or the cgroup) can still give

so a budget is ours alone for as long as the machine can honour it, and after that a floor that moves with the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import psutil

from scheduler.devices.base import Reading
from scheduler.model import DeviceSpec

SHARE_OF_AVAILABLE = 0.8  # without a budget and a cgroup limit: the rest is for the page cache and everybody else
_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as the largest page-aligned number


class Cgroup:
    """The memory limits above this process, version 1 or 2. Reading one costs tens of microseconds.

    `root` is where cgroups are mounted and `proc` a process's folder in /proc: tests have their own.
    """

    def __init__(self, root: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc/self")) -> None:
        self._folders = list(_folders(root, proc))

    def limit(self) -> int | None:
        """The least of the limits above us, in bytes; None without one."""
        return min((limit for folder in self._folders if (limit := _limit(folder)) is not None), default=None)

    def available(self) -> int | None:
        """Bytes until the nearest limit; page cache that the kernel can drop counts as available."""
        rooms = (
            limit - (_number(folder, _USED) or 0) + _reclaimable(folder)
            for folder in self._folders
            if (limit := _limit(folder)) is not None
        )
        return min(rooms, default=None)


_LIMIT = ("memory.max", "memory.limit_in_bytes")
_USED = ("memory.current", "memory.usage_in_bytes")


def _folders(root: Path, proc: Path) -> Iterable[Path]:
    """Our cgroup's folder and all above it: the nearest limit is not always the least."""
    try:
        lines = (proc / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        inner = top / path.lstrip("/")
        yield from (folder for folder in (inner, *inner.parents) if folder == top or top in folder.parents)


def _limit(folder: Path) -> int | None:
    limit = _number(folder, _LIMIT)
    return None if limit is None or limit >= _UNLIMITED else limit


def _number(folder: Path, names: Iterable[str]) -> int | None:
    for name in names:
        try:
            return int((folder / name).read_text())
        except (OSError, ValueError):  # no such file in this version, or "max"
            continue
    return None


def _reclaimable(folder: Path) -> int:
    try:
        fields = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(fields.get("total_inactive_file") or fields.get("inactive_file") or 0)


def available_bytes(cgroup: Cgroup) -> int:
    """What a new process can take before something is killed."""
    machine = int(psutil.virtual_memory().available)
    within = cgroup.available()
    return machine if within is None else max(0, min(machine, within))


def unique_bytes(pid: int) -> int:
    """USS: what ending the process frees. 0 for one that has gone. Milliseconds for a large process."""
    return _rollup(pid, ("Private_Clean:", "Private_Dirty:", "Private_Hugetlb:"))


def launcher_bytes(pid: int) -> int:
    """What a launcher holds, shared with its forks or not (see above). 0 for one that has gone."""
    return _rollup(pid, ("Anonymous:",))


def _rollup(pid: int, fields: Sequence[str]) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            lines = file.read().decode().splitlines()[1:]
    except (ProcessLookupError, FileNotFoundError, PermissionError):
        return 0  # gone, a zombie, or not ours any more: nothing that we could free
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(tuple(fields)))


class HostDevice:
    """`budget_bytes` is for engines alone; without it the cgroup's limit or a share of what is available now."""

    def __init__(
        self,
        budget_bytes: int | None = None,
        reserve_bytes: int = 0,
        *,
        name: str = "host",
        cgroup: Cgroup | None = None,
        available: Callable[[Cgroup], int] = available_bytes,
    ) -> None:
        self._cgroup = cgroup or Cgroup()
        self._available = available
        self._spec = DeviceSpec(name, "host", budget_bytes or self._default_budget(), reserve_bytes)

    def _default_budget(self) -> int:
        available = self._available(self._cgroup)
        return available if self._cgroup.limit() is not None else int(available * SHARE_OF_AVAILABLE)

    @property
    def spec(self) -> DeviceSpec:
        """What the ledger is opened with."""
        return self._spec

    def measure(self, engines: Mapping[str, Sequence[int]], overhead: Sequence[int]) -> Reading:
        """Some milliseconds per process. Processes that have gone count nothing."""
        held = {name: sum(map(unique_bytes, pids)) for name, pids in engines.items()}
        launchers = sum(map(launcher_bytes, overhead))
        ours = sum(held.values()) + launchers
        capacity = self._spec.capacity_bytes
        foreign = max(0, capacity - ours - self._available(self._cgroup))
        return Reading(capacity, min(capacity, ours + foreign), foreign, held, launchers)

    def engine_env(self) -> dict[str, str]:
        """No GPU for an engine whose memory is counted here."""
        return {"CUDA_VISIBLE_DEVICES": ""}
