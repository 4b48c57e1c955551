"""Orphans of dead keepers are found by their tag and by nothing else."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scheduler.engines import reaper
from tests.scheduler.engines.keeper_rig import SLEEP, lives


@pytest.fixture
def process() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    made: list[subprocess.Popen[str]] = []

    def make(tag: str | None, code: str = SLEEP, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        env = {**(env or {}), **({} if tag is None else {reaper.KEEPER_VAR: tag})}
        command = [sys.executable, "-S", "-c", code]
        made.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True))
        while env and not reaper.environment(made[-1].pid):
            os.sched_yield()  # exec closes the pipe that Popen waits for before /proc shows the new environment
        return made[-1]

    yield make
    for each in made:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(each.pid, signal.SIGKILL)
        each.wait()
        if each.stdout is not None:
            each.stdout.close()


def dead_keepers_tag(state_dir: Path) -> str:
    """Our own pid with a start time that is not ours: a keeper that died and whose pid came round again."""
    pid, ticks, place = reaper.keeper_tag(str(state_dir)).split("-")
    return f"{pid}-{int(ticks) - 1}-{place}"


def test_an_orphan_is_killed_and_named(process: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    orphan = process(dead_keepers_tag(tmp_path))
    (reaped,) = reaper.reap(str(tmp_path))
    assert reaped.pid == orphan.pid
    assert reaped.command.endswith(SLEEP)
    assert not lives(orphan.pid)


@pytest.mark.parametrize("whose", ["a living keeper", "another installation", "nobody", "nonsense"])
def test_what_is_not_an_orphan_of_ours_lives_on(
    process: Callable[..., subprocess.Popen[str]], tmp_path: Path, whose: str
) -> None:
    tags = {
        "a living keeper": reaper.keeper_tag(str(tmp_path)),
        "another installation": dead_keepers_tag(tmp_path / "elsewhere"),
        "nobody": None,
        "nonsense": f"x-y-{dead_keepers_tag(tmp_path).split('-')[2]}",
    }
    other = process(tags[whose])
    assert reaper.reap(str(tmp_path)) == []
    assert lives(other.pid)


def test_a_group_member_without_a_tag_goes_with_its_group(
    process: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    # As after setproctitle: what the leader executes next shows no tag, and is still in its group.
    code = f"import os, sys; os.spawnve(os.P_NOWAIT, sys.executable, [sys.executable, '-S', '-c', {SLEEP!r}], {{}})"
    leader = process(dead_keepers_tag(tmp_path), f"{code}; print(1, flush=True); {SLEEP}")
    assert leader.stdout is not None
    leader.stdout.readline()
    group = [each for each in reaper.processes() if each.group == leader.pid]
    assert len(group) == 2
    assert len(reaper.reap(str(tmp_path))) == 2
    assert not any(lives(each.pid) for each in group)


def test_the_state_directory_may_be_named_in_any_way(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    assert reaper.keeper_tag(str(tmp_path / "link")) == reaper.keeper_tag(f"{tmp_path}/./")


def test_a_pid_that_was_given_out_anew_is_spared(process: Callable[..., subprocess.Popen[str]]) -> None:
    other = process(None)
    seen = reaper.read(other.pid)
    assert seen is not None
    assert not reaper.kill(seen._replace(start_ticks=seen.start_ticks - 1))
    assert lives(other.pid)
    assert reaper.kill(seen)


def test_a_process_that_has_gone_is_no_error() -> None:
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    assert reaper.read(gone.pid) is None
    assert reaper.environment(gone.pid) == {}
    assert not reaper.kill(reaper.Process(gone.pid, "S", 1, 1, 1, 1))


def test_every_session_is_seen(process: Callable[..., subprocess.Popen[str]]) -> None:
    leader = process(None)
    sessions = reaper.sessions()
    assert sessions[leader.pid] == [leader.pid]
    assert os.getpid() in sessions[os.getsid(0)]
