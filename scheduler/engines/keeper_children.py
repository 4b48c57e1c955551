"""The keeper's children: started in sessions of their own, watched, and cleared away to the last process.

All that is started here dies with the keeper (parent-death signal) and carries its tag in the environment. A child's
end is told only when no process of its session is left, because only then are its memory and its ports free.
Forking with Python code between fork and exec is safe because the keeper has one thread.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from scheduler.engines import keeper_systemd, reaper
from scheduler.engines.keeper_loop import Loop

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
_LIBC = ctypes.CDLL(None, use_errno=True)
_NOT_INHERITED = ("PYTHONDONTWRITEBYTECODE", "VRAMP_LISTEN_FDS", "VRAMP_KEEPER_FD", *keeper_systemd.VARIABLES)


class Child:
    """A process that we started or had forked, with its session: `pid` is the session's id too."""

    def __init__(self, kind: str, tag: str, pid: int, gone: Callable[[int], None], meta: Any = None) -> None:
        self.kind, self.tag, self.pid, self.gone, self.meta = kind, tag, pid, gone, meta
        self.started_s = time.time()
        self.status: int | None = None  # set when the leader has ended; the rest of the session is then being killed

    def signal(self, number: int) -> None:
        """To the whole process group, while its leader lives: until it is waited for, the pid cannot be another's."""
        if self.status is None:
            os.killpg(self.pid, number)


class Children:
    """Every session that is not gone yet.

    Holds: a pid is in `_by_pid` from its start until no process of its session is left; then `gone(status)` is called,
    once. The status is the exit code, or minus the signal's number.
    """

    def __init__(self, loop: Loop, keeper_tag: str, signals: Iterable[int]) -> None:
        self._loop, self._keeper_tag, self._signals = loop, keeper_tag, tuple(signals)
        self._by_pid: dict[int, Child] = {}
        self._ended_early: dict[int, int] = {}  # forks that ended before their launcher told us of them

    def __len__(self) -> int:
        return len(self._by_pid)

    def __iter__(self) -> Iterator[Child]:
        return iter(list(self._by_pid.values()))

    def marks(self, tag: str) -> dict[str, str]:
        """The environment by which a process is known as ours."""
        # SPT_NOENV: setproctitle, which vLLM uses, would otherwise overwrite the environment that carries the marks.
        return {reaper.KEEPER_VAR: self._keeper_tag, reaper.TAG_VAR: tag, "SPT_NOENV": "1"}

    def start(
        self,
        argv: list[str],
        env: Mapping[str, str],
        tag: str,
        cwd: str | None = None,
        log: str | None = None,
        inherited: Iterable[int] = (),
    ) -> int:
        """Fork and exec; returns the pid. Raises OSError with the child's reason. `log` is appended to, mode 0600."""
        ours = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600) if log else None
        # Blocked, or a signal to the child before its exec would be written into the wake-up socket that it shares.
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        try:
            process = subprocess.Popen(
                argv,
                env={**ours, **env, **self.marks(tag)},
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=tuple(inherited),
                start_new_session=True,
                preexec_fn=self._between_fork_and_exec(os.getpid()),  # noqa: PLW1509 - there is no other thread
            )
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals)
            if output is not None:
                os.close(output)
        process.returncode = 0  # we wait for all children ourselves; Popen must never wait for a reused pid
        return process.pid

    def add(self, child: Child) -> None:
        """Watch it from now on."""
        self._by_pid[child.pid] = child
        if child.pid in self._ended_early:
            self._leader_ended(child, self._ended_early.pop(child.pid))

    def wait(self, forks_pending: bool) -> None:
        """Collect who ended (SIGCHLD). An unknown pid is an orphan that we adopted, or a fork not yet told of."""
        while True:
            try:
                pid, wait_status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            status = os.waitstatus_to_exitcode(wait_status)
            if (child := self._by_pid.get(pid)) is not None:
                self._leader_ended(child, status)
            elif forks_pending:
                self._ended_early[pid] = status
            else:
                self._ended_early.clear()

    def kill_strays(self, tags: Iterable[str]) -> None:
        """SIGKILL to what was forked without our being told: our orphans with these tags in sessions unknown to us."""
        marks = set(tags)
        orphans = [process for process in reaper.processes() if process.parent == os.getpid()]
        for orphan in orphans:
            if orphan.session not in self._by_pid and reaper.environment(orphan.pid).get(reaper.TAG_VAR) in marks:
                reaper.kill(orphan)

    def sweep(self) -> None:
        """SIGKILL to whatever still carries our tag; returns when nothing does."""
        while reaper.sweep(self._keeper_tag):
            self.wait(forks_pending=False)
            time.sleep(0.01)

    def _leader_ended(self, child: Child, status: int) -> None:
        child.status = status
        self._clear(child, status, 0.005)

    def _clear(self, child: Child, status: int, again_s: float) -> None:
        # A launcher's forks show the launcher's marks, so its tag does not say whose they are.
        tag = None if child.kind == "launcher" else child.tag
        left = reaper.members(child.pid, self._keeper_tag, tag)
        for process in left:
            reaper.kill(process)
        if left:
            self._loop.after(again_s, lambda: self._clear(child, status, min(again_s * 2, 1.0)))
        else:
            del self._by_pid[child.pid]
            child.gone(status)

    def _between_fork_and_exec(self, keeper_pid: int) -> Callable[[], None]:
        def run() -> None:
            signal.set_wakeup_fd(-1)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals)
            _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != keeper_pid:  # it died before the line above could matter
                os._exit(1)

        return run


def become_subreaper() -> None:
    """Orphaned descendants become our children from now on, not init's. Raises OSError."""
    if _LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
