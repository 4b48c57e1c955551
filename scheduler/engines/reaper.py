"""Processes as /proc shows them, and the end of those that a dead keeper left behind.

Every process below a keeper carries the keeper's tag in the environment it was started with, and that part of a
process is inherited by whatever it forks. The tag names the keeper (pid and start time: a pid alone comes round again)
and the state directory, so two installations never touch each other's. Names and ports are not evidence; a process
that somebody else started as `python -m vllm` is none of ours. Standard library only, because the keeper uses it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import time
from typing import NamedTuple

KEEPER_VAR = "VRAMP_KEEPER"
TAG_VAR = "VRAMP_TAG"


class Process(NamedTuple):
    """One line of /proc. `state` is Z for a process that has ended and waits for its parent to notice."""

    pid: int
    state: str
    parent: int
    group: int
    session: int
    start_ticks: int


class Reaped(NamedTuple):
    """A process that was killed, with what it called itself."""

    pid: int
    command: str


def read(pid: int) -> Process | None:
    """What the process is now; None when there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # the name before it may hold blanks and brackets
    except OSError:
        return None
    if len(fields) < 20:
        return None
    return Process(pid, fields[0].decode(), int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]))


def processes() -> list[Process]:
    """Every process of this user, our own included. Some 30 µs for each process of the machine."""
    user = os.geteuid()
    pids = (int(entry) for entry in os.listdir("/proc") if entry.isdigit() and _owner(entry) == user)
    return [process for pid in pids if (process := read(pid)) is not None]


def sessions() -> dict[int, list[int]]:
    """Every pid of the machine by its session. Reads no file: some 1 µs for each process."""
    found: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                found.setdefault(os.getsid(int(entry)), []).append(int(entry))
    return found


def environment(pid: int) -> dict[str, str]:
    """The environment that the process was started with; empty when it has gone or is not ours to read."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            pairs = os.fsdecode(file.read()).split("\0")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def keeper_tag(state_dir: str) -> str:
    """The tag of this process as keeper of `state_dir`."""
    myself = read(os.getpid())
    assert myself is not None
    return f"{myself.pid}-{myself.start_ticks}-{_place(state_dir)}"


def members(session: int, keeper: str, tag: str | None) -> list[Process]:
    """The processes of a session, and those below `keeper` that carry `tag` but left it (setsid).

    Costs a walk through /proc: for the end of a process, not for every request.
    """
    return [
        process
        for process in processes()
        if process.session == session or (tag is not None and _carries(process.pid, keeper, tag))
    ]


def kill(process: Process) -> bool:
    """SIGKILL to exactly this process: a pidfd pins it, so a pid that was given out anew meanwhile is spared."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except OSError:
        return False
    try:
        now = read(process.pid)
        if now is None or now.start_ticks != process.start_ticks:
            return False
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def reap(state_dir: str, wait_s: float = 10.0) -> list[Reaped]:
    """Kill what keepers of `state_dir` that live no more left behind, their process groups included.

    Returns once the processes have gone (their memory with them), at the latest after `wait_s`.
    """
    place = _place(state_dir)
    reaped: dict[int, Reaped] = {}
    deadline = time.monotonic() + wait_s
    while orphans := _orphans(place):
        for orphan in orphans:
            command = _command(orphan.pid)
            if kill(orphan):
                reaped.setdefault(orphan.pid, Reaped(orphan.pid, command))
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    return list(reaped.values())


def sweep(keeper: str) -> int:
    """SIGKILL to whatever carries the tag of this keeper. Returns how many there were."""
    left = [process for process in processes() if environment(process.pid).get(KEEPER_VAR) == keeper]
    return sum(kill(process) for process in left if process.pid != os.getpid())


def _orphans(place: str) -> list[Process]:
    # The group is taken too: a process may have overwritten its environment (setproctitle does), and what it forked
    # after that shows no tag. All that a keeper starts leads a session, so such a group holds nothing foreign.
    every = [process for process in processes() if process.state != "Z"]
    tagged = [process for process in every if _is_orphan(environment(process.pid).get(KEEPER_VAR, ""), place)]
    groups = {process.group for process in tagged} - {os.getpgrp()}
    pids = {process.pid for process in tagged}
    return [process for process in every if process.pid in pids or process.group in groups]


def _is_orphan(tag: str, place: str) -> bool:
    pid, _, rest = tag.partition("-")
    ticks, _, where = rest.partition("-")
    if where != place or not (pid.isdigit() and ticks.isdigit()):
        return False
    keeper = read(int(pid))
    return keeper is None or keeper.state == "Z" or keeper.start_ticks != int(ticks)


def _carries(pid: int, keeper: str, tag: str) -> bool:
    found = environment(pid)
    return found.get(KEEPER_VAR) == keeper and found.get(TAG_VAR) == tag


def _owner(pid: str) -> int:
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return -1


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return os.fsdecode(file.read(200)).replace("\0", " ").strip()
    except OSError:
        return ""


def _place(state_dir: str) -> str:
    return hashlib.sha256(os.fsencode(os.path.realpath(state_dir))).hexdigest()[:12]
