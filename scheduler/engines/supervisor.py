"""Starts, watches and stops engines of every kind, through the keeper.

An engine is in `_engines` from the moment its start is asked for until the keeper reports that its last process has
gone; `start` raises and `stop` returns only then, so whoever awaits them may count its memory as free. Stopping goes
on when the caller is cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from scheduler.engines import logs, reaper
from scheduler.engines.base import EngineExit, EngineKind, ProbeError, Progress, SpawnSpec
from scheduler.engines.keeper_link import Exited, KeeperError, KeeperLink, LauncherState, Living
from scheduler.engines.sleeping import Said, SleepControls, SleepError

log = logging.getLogger("vramp.scheduler")

POLL_S = 0.1  # between two looks at a starting engine: its log and its answer
PROBE_LIMIT_S = 60.0
LAUNCHER_WAIT_S = 60.0
LAUNCHER_STARTS = 3  # of one that forks nothing, until engines are started without it
TAIL_LINES = 40
EXPLAIN_LINES = 400  # the cause of a failed start stands above its traceback
PIDS_AGE_S = 1.0
LAUNCHER = Path(__file__).with_name("launcher.py")


class Handle(msgspec.Struct, frozen=True):
    """A running engine. `kind` is the kind's name, `started_s` Unix time, `partners` the devices it has besides the
    first. The keeper keeps it for the next proxy."""

    engine_id: str
    model: str
    device: str
    kind: str
    revision: str
    port: int
    log_path: str
    tmp_dir: str = ""
    partners: tuple[str, ...] = ()
    pid: int = 0
    started_s: float = 0.0

    @property
    def base_url(self) -> str:
        """Where it answers, without a trailing slash."""
        return f"http://127.0.0.1:{self.port}"


class _Engine:
    """One engine that we know of. Once `gone` is set, no process of it is left."""

    def __init__(self, handle: Handle) -> None:
        self.handle = handle
        self.ready = False
        self.gone = asyncio.Event()
        self.exited: Exited | None = None
        self.spawning: asyncio.Task[None] | None = None
        self.ending: asyncio.Task[None] | None = None

    @property
    def log_path(self) -> Path:
        return Path(self.handle.log_path)


class Supervisor:
    """The processes of all engines. Belongs to the loop that runs when it is made.

    `on_exit(engine_id, reason, log_tail)` is called for a ready engine that died by itself.
    """

    def __init__(self, link: KeeperLink, session: aiohttp.ClientSession, log_dir: Path) -> None:
        self.on_exit: Callable[[str, str, Sequence[str]], None] = lambda *_: None
        self._link, self._session, self._log_dir = link, session, log_dir
        self._engines: dict[str, _Engine] = {}
        self._launchers: dict[str, LauncherState] = {}
        self._launcher_starts: dict[str, int] = {}
        self._launcher_changed = asyncio.Event()
        self._said_cold: set[str] = set()
        self._sessions: dict[int, list[int]] = {}
        self._sessions_read_s = 0.0
        link.on_exit = self._exited
        link.on_launcher = self._launcher_told

    async def start(
        self,
        engine_id: str,
        model: str,
        kind: EngineKind,
        device_env: Mapping[str, str],
        *,
        device: str,
        start_timeout_s: float,
        stop_timeout_s: float,
        on_progress: Callable[[Progress], None],
        revision: str = "",
        partners: tuple[str, ...] = (),
    ) -> Handle:
        """Start an engine and wait until it answers a real request.

        Raises EngineExit when it ends, will never serve or takes too long; cancelling ends it. In every case it has
        had SIGTERM and `stop_timeout_s`, and its last process has gone, before this raises.
        """
        path = logs.new_log(self._log_dir, model, engine_id)
        for last_try in (False, True):
            tmp_dir = tempfile.mkdtemp(prefix="vramp-")  # not in our own folder: sockets' paths end at 107 bytes
            handle = Handle(engine_id, model, device, kind.name, revision, _free_port(), str(path), tmp_dir, partners)
            engine = self._enter(handle)
            try:
                async with asyncio.timeout(start_timeout_s):
                    await self._start(engine, kind, device_env, on_progress)
            except TimeoutError:
                await self._end_failed(engine, stop_timeout_s)
                why = f"not ready within {start_timeout_s:g} s (start_timeout_s)"
                raise EngineExit(why, self._tail(engine)) from None
            except EngineExit:
                await self._end_failed(engine, stop_timeout_s)
                if last_try or not _port_was_taken(self._tail(engine)):
                    raise
                log.warning("engine %s: somebody took port %d first; trying another", engine_id, handle.port)
            except BaseException:
                await self._end_failed(engine, stop_timeout_s)
                raise
            else:
                return engine.handle
        raise AssertionError("the last try returns or raises")

    async def stop(self, engine_id: str, timeout_s: float) -> None:
        """SIGTERM to its process group, SIGKILL after the limit; returns when no process of it is left. Idempotent."""
        engine = self._engines.get(engine_id)
        if engine is not None:
            await asyncio.shield(self._end(engine, timeout_s))

    async def sleep(self, engine_id: str, kind: EngineKind) -> None:
        """Have it sleep; returns when it says so. Raises SleepError or aiohttp.ClientError."""
        controls, url = self._controls(engine_id, kind)
        await controls.sleep(self._session, url)

    async def wake(self, engine_id: str, kind: EngineKind) -> None:
        """Have it wake; returns when it says so. Raises SleepError or aiohttp.ClientError."""
        controls, url = self._controls(engine_id, kind)
        await controls.wake(self._session, url)

    async def ask(self, engine_id: str, kind: EngineKind) -> Said:
        """What it answers to the fixed question. Raises SleepError or aiohttp.ClientError."""
        controls, url = self._controls(engine_id, kind)
        return await controls.ask(self._session, url)

    def _controls(self, engine_id: str, kind: EngineKind) -> tuple[SleepControls, str]:
        engine = self._engines.get(engine_id)
        if engine is None:
            raise SleepError("it has gone")
        if kind.sleep_controls is None:
            raise SleepError(f"engines of kind {kind.name} cannot sleep")
        return kind.sleep_controls, engine.handle.base_url

    async def gone(self, engine_id: str, within_s: float) -> bool:
        """Whether the engine has ended, or does within the limit; `on_exit` has then been called."""
        engine = self._engines.get(engine_id)
        if engine is None:
            return True
        try:
            async with asyncio.timeout(within_s):
                await engine.gone.wait()
        except TimeoutError:
            return False
        return True

    async def adopt(self) -> list[Handle]:
        """The engines that outlived an earlier proxy. They count as ready; probe them, and stop the one that is not."""
        listing = await self._link.list()
        for state in listing.launchers:
            self._launcher_told(state)
        return [handle for living in listing.engines if (handle := await self._adopt(living)) is not None]

    async def warm_up(self, kind: EngineKind) -> None:
        """Start the warm launcher that this kind forks from, if it uses one, before the first engine is wanted."""
        spec = kind.spawn_spec(0, {})
        if spec.warm and spec.argv[0] not in self._launchers:
            await self._start_launcher(spec)

    def pids(self, engine_id: str) -> list[int]:
        """Every process of the engine's session; not older than a second. About 1 µs for each of the machine's."""
        engine = self._engines.get(engine_id)
        if engine is None or not engine.handle.pid:  # not spawned yet; session 0 is init's and the kernel's
            return []
        return self._pids_of(engine.handle.pid)

    def launcher_pids(self) -> list[int]:
        """The processes of all warm launchers, without what they forked."""
        return [pid for state in self._launchers.values() if state.pid for pid in self._pids_of(state.pid)]

    def log_tail(self, engine_id: str, lines: int = TAIL_LINES) -> list[str]:
        """The last lines of a living engine's log."""
        engine = self._engines.get(engine_id)
        return logs.tail(engine.log_path, lines) if engine is not None else []

    # -- starting ----------------------------------------------------------------------------------------------------

    def _enter(self, handle: Handle) -> _Engine:
        if handle.engine_id in self._engines:
            raise ValueError(f"there is an engine {handle.engine_id} already")
        engine = self._engines[handle.engine_id] = _Engine(handle)
        return engine

    async def _start(
        self,
        engine: _Engine,
        kind: EngineKind,
        device_env: Mapping[str, str],
        on_progress: Callable[[Progress], None],
    ) -> None:
        spec = kind.spawn_spec(engine.handle.port, device_env)
        if spec.warm:
            await self._await_launcher(spec, on_progress)
        if engine.ending is not None:  # stopped meanwhile
            raise EngineExit(self._why(engine), [])
        engine.spawning = asyncio.create_task(self._spawn(engine, spec))
        # Shielded: the order is with the keeper already, and only its answer tells what there is to end.
        await asyncio.shield(engine.spawning)
        await self._become_ready(engine, kind, on_progress)

    async def _spawn(self, engine: _Engine, spec: SpawnSpec) -> None:
        handle = engine.handle
        try:
            spawned = await self._link.spawn(
                handle.engine_id,
                spec.argv,
                {**spec.env, "TMPDIR": handle.tmp_dir},
                cwd=spec.cwd,
                log=handle.log_path,
                meta=msgspec.to_builtins(handle),
                launcher=spec.argv[0] if spec.warm else None,
            )
        except KeeperError as error:
            self._forget(engine)
            raise EngineExit(str(error), []) from error
        if spawned.why is not None:
            self._say_cold(spec.argv[0], spawned.why)
        elif spawned.warm:  # it works: what becomes of it later, in a month perhaps, is another matter
            self._launcher_starts[spec.argv[0]] = 0
            self._said_cold.discard(spec.argv[0])
        engine.handle = msgspec.structs.replace(handle, pid=spawned.pid, started_s=time.time())

    async def _become_ready(self, engine: _Engine, kind: EngineKind, on_progress: Callable[[Progress], None]) -> None:
        tell = _teller(engine.log_path, kind, on_progress)
        gone = asyncio.create_task(engine.gone.wait())
        answers = asyncio.create_task(self._probe_until_ready(engine, kind))
        follows = asyncio.create_task(_follow(tell))
        tasks: list[asyncio.Task[Any]] = [gone, answers, follows]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if gone in done:
            want = logs.tells_of_want(logs.tail(engine.log_path, EXPLAIN_LINES))
            raise EngineExit(self._explained(engine, kind), self._tail(engine), out_of_memory=want)
        for task in done:
            task.result()
        tell()  # what it wrote after our last look and before it answered
        engine.ready = True

    async def _probe_until_ready(self, engine: _Engine, kind: EngineKind) -> None:
        while True:
            try:
                async with asyncio.timeout(PROBE_LIMIT_S):
                    if await kind.probe(self._session, engine.handle.base_url):
                        return
            except ProbeError as error:
                raise EngineExit(str(error), self._tail(engine)) from error
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                log.debug("engine %s does not answer yet: %r", engine.handle.engine_id, error)
            await asyncio.sleep(POLL_S)

    # -- ending ------------------------------------------------------------------------------------------------------

    def _end(self, engine: _Engine, timeout_s: float) -> asyncio.Task[None]:
        if engine.ending is None:
            engine.ending = asyncio.create_task(self._do_end(engine, timeout_s))
        return engine.ending

    async def _do_end(self, engine: _Engine, timeout_s: float) -> None:
        if engine.spawning is not None:
            await asyncio.gather(engine.spawning, return_exceptions=True)
        elif not engine.handle.pid:
            self._forget(engine)  # cancelled before the keeper was asked
        for number, limit_s in ((signal.SIGTERM, timeout_s), (signal.SIGKILL, None)):
            if engine.gone.is_set() or not await self._signal(engine, number):
                break
            try:
                async with asyncio.timeout(limit_s):
                    await engine.gone.wait()
            except TimeoutError:
                if timeout_s:  # without, it was to be killed: a load on a guess that a request wants the place of
                    log.warning("engine %s did not stop within %g s: killing it", engine.handle.engine_id, timeout_s)

    async def _signal(self, engine: _Engine, number: int) -> bool:
        try:
            await self._link.signal(engine.handle.engine_id, number)
        except KeeperError:
            self._forget(engine)  # the keeper has no such engine, or has gone itself and took the engine along
            return False
        return True

    async def _end_failed(self, engine: _Engine, timeout_s: float) -> None:
        await _despite_cancelling(self._end(engine, timeout_s))

    def _exited(self, exited: Exited) -> None:
        engine = self._engines.get(exited.tag)
        if engine is None or engine.handle.pid not in (0, exited.pid):
            log.info("engine %s (%d) ended while there was no proxy", exited.tag, exited.pid)
            return
        engine.exited = exited
        self._forget(engine)
        if engine.ready and engine.ending is None:
            self.on_exit(exited.tag, self._why(engine), self._tail(engine))

    def _forget(self, engine: _Engine) -> None:
        self._engines.pop(engine.handle.engine_id, None)
        engine.gone.set()
        if engine.handle.tmp_dir:
            # vLLM leaves sockets and files behind however it ends: a swap a minute would fill /tmp in a month
            asyncio.get_running_loop().run_in_executor(None, shutil.rmtree, engine.handle.tmp_dir, True)

    def _why(self, engine: _Engine) -> str:
        if engine.ending is not None:
            return "it was stopped"
        status = engine.exited.status if engine.exited is not None else 0
        if status < 0:
            return f"killed by {signal.Signals(-status).name}"
        return f"ended with exit status {status}"

    def _explained(self, engine: _Engine, kind: EngineKind) -> str:
        explanation = kind.explain(logs.tail(engine.log_path, EXPLAIN_LINES)) if engine.ending is None else None
        return f"{self._why(engine)}: {explanation}" if explanation else self._why(engine)

    def _tail(self, engine: _Engine) -> list[str]:
        return logs.tail(engine.log_path, TAIL_LINES)

    async def _adopt(self, living: Living) -> Handle | None:
        try:
            handle = msgspec.convert({**living.meta, "pid": living.pid, "started_s": living.started_s}, Handle)
        except msgspec.ValidationError as error:
            log.warning("engine %s was started by another version (%s): ending it", living.tag, error)
            await self._link.signal(living.tag, signal.SIGKILL)
            return None
        self._enter(handle).ready = True
        return handle

    # -- warm launchers ----------------------------------------------------------------------------------------------

    async def _await_launcher(self, spec: SpawnSpec, on_progress: Callable[[Progress], None]) -> None:
        # Waiting for a launcher that still imports is sooner than a plain start, which would import the same again.
        name = spec.argv[0]
        if name not in self._launchers or self._launchers[name].state == "ended":
            await self._start_launcher(spec)
        if self._launchers[name].state == "starting":
            on_progress(Progress(0.0, "waiting for the warm launcher"))
        try:
            async with asyncio.timeout(LAUNCHER_WAIT_S):
                while self._launchers[name].state == "starting":
                    await self._launcher_changed.wait()
        except TimeoutError:
            log.warning("the warm launcher of %s takes longer than %.0f s", name, LAUNCHER_WAIT_S)

    async def _start_launcher(self, spec: SpawnSpec) -> None:
        name = spec.argv[0]
        self._launcher_starts[name] = self._launcher_starts.get(name, 0) + 1
        if self._launcher_starts[name] > LAUNCHER_STARTS:
            return
        path = logs.new_log(self._log_dir, "launcher", "launcher")
        try:
            state = await self._link.launcher(name, [name, str(LAUNCHER)], spec.launcher_env, str(path))
        except KeeperError as error:
            state = LauncherState(name, "unusable", str(error))
        self._launcher_told(state)

    def _launcher_told(self, state: LauncherState) -> None:
        self._launchers[state.name] = state
        self._launcher_changed.set()
        self._launcher_changed = asyncio.Event()

    def _say_cold(self, name: str, why: str) -> None:
        reason = self._launchers[name].reason if name in self._launchers else ""
        if name not in self._said_cold:
            self._said_cold.add(name)
            log.warning("engines of %s are started cold (slow): %s. %s", name, why, reason)

    def _pids_of(self, session: int) -> list[int]:
        now_s = time.monotonic()
        if now_s - self._sessions_read_s > PIDS_AGE_S or session not in self._sessions:
            self._sessions, self._sessions_read_s = reaper.sessions(), now_s
        return self._sessions.get(session, [])


def _teller(path: Path, kind: EngineKind, on_progress: Callable[[Progress], None]) -> Callable[[], None]:
    """A function that tells of the progress in the lines that were written since its last call."""
    follower = logs.Follower(path)
    told: Progress | None = None

    def tell() -> None:
        nonlocal told
        for line in follower.lines():
            progress = kind.progress(line)
            if progress is not None and progress != told:
                told = progress
                on_progress(progress)

    return tell


async def _follow(tell: Callable[[], None]) -> None:
    while True:
        tell()
        await asyncio.sleep(POLL_S)


async def _despite_cancelling(task: asyncio.Task[None]) -> None:
    """Wait for the task to its end; a cancellation meanwhile is raised afterwards."""
    cancelled = False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
    task.result()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def _port_was_taken(tail: Sequence[str]) -> bool:
    return any("address already in use" in line.lower() for line in tail)
