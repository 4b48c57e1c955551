"""Engines started, watched and stopped through a real keeper. The engines are small scripts that serve HTTP."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from scheduler.engines import reaper
from scheduler.engines import supervisor as supervising
from scheduler.engines.base import EngineExit, EngineKind, ProbeError, Progress, SpawnSpec
from scheduler.engines.keeper_link import KeeperError, KeeperGone, KeeperLink
from scheduler.engines.simulated import SimulatedKind, declared_memory
from scheduler.engines.supervisor import Handle, Supervisor
from tests.fakes import until
from tests.patience import PATIENCE_S
from tests.scheduler.engines.keeper_rig import SLEEP, LendingRig, lives, python

SERVE = """
    import http.server, os, signal, sys
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(int(os.environ.get("STATUS", "200")))
            self.end_headers()
        def log_message(self, *_): pass
    print("step 1", flush=True)
    http.server.HTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"""
FAMILY = """
    import os, signal, time
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("child", os.getpid(), flush=True)
        time.sleep(60)
"""
FAKE_LAUNCHER = """
    import json, os, socket, sys, time
    sock = socket.socket(fileno=int(os.environ["VRAMP_LAUNCHER_FD"]))
    mode = sys.argv[1]
    if mode == "unusable":
        sock.send(json.dumps({"op": "unusable", "reason": "it has two threads"}).encode())
        sys.exit(0)
    sock.send(b'{"op": "ready"}')
    while packet := sock.recv(1 << 18):
        order = json.loads(packet)
        if mode == "fail":
            sock.send(json.dumps({"op": "failed", "id": order["id"], "reason": "no memory"}).encode())
            continue
        read, write = os.pipe()
        if os.fork() == 0:
            if os.fork() == 0:
                os.setsid()
                os.write(write, str(os.getpid()).encode())
                os.environ.update(order["env"])
                log = os.open(order["log"], os.O_WRONLY | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                os.execvp(order["argv"][0], order["argv"])
            os._exit(0)
        os.wait()
        if mode == "die":
            os.read(read, 10)
            os._exit(3)
        sock.send(json.dumps({"op": "forked", "id": order["id"], "pid": int(os.read(read, 10))}).encode())
"""


class ScriptKind:
    """A kind whose engine is a script; it answers on GET /."""

    name = "script"

    def __init__(self, code: str = SERVE, *, warm: bool = False, **env: str) -> None:
        self.code, self.warm, self.env = code, warm, env

    def spawn_spec(self, port: int, device_env: Mapping[str, str]) -> SpawnSpec:
        env = {"PORT": str(port), **device_env, **self.env}
        return SpawnSpec(argv=tuple(python(self.code)), env=env, warm=self.warm)

    def progress(self, line: str) -> Progress | None:
        return Progress(0.5, line) if line.startswith("step") else None

    def explain(self, log_tail: Sequence[str]) -> str | None:
        return next((line for line in log_tail if line.startswith("cause:")), None)

    async def probe(self, session: aiohttp.ClientSession, base_url: str) -> bool:
        async with session.get(base_url) as reply:
            if reply.status == 400:
                raise ProbeError("it refuses")
            return reply.status == 200


class World:
    """A keeper, a link and a supervisor; `revive` is what a restarted proxy does."""

    def __init__(self, state_dir: Path, session: aiohttp.ClientSession) -> None:
        self.rig = LendingRig(state_dir)
        self.session = session
        self.deaths: list[tuple[str, str, list[str]]] = []
        self.died = asyncio.Event()
        self.progress: list[Progress] = []
        self.revive()

    def revive(self) -> None:
        self.link = KeeperLink(self.rig.borrow())
        self.link.on_lost = lambda: None
        self.supervisor = Supervisor(self.link, self.session, self.rig.state_dir / "logs")
        self.supervisor.on_exit = self._on_exit

    def _on_exit(self, engine_id: str, reason: str, tail: Sequence[str]) -> None:
        self.deaths.append((engine_id, reason, list(tail)))
        self.died.set()

    async def start(self, kind: EngineKind | None = None, engine_id: str = "m-1", **options: Any) -> Handle:
        limits = {"start_timeout_s": PATIENCE_S, "stop_timeout_s": 0.05, **options}
        return await self.supervisor.start(
            engine_id, "m", kind or ScriptKind(), {}, device="sim0", on_progress=self.progress.append, **limits
        )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervising, "POLL_S", 0.01)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with aiohttp.ClientSession() as session:
        made = World(tmp_path / "state", session)
        yield made
        made.link.close()
        made.rig.close()


async def test_an_engine_starts_serves_and_is_gone_after_its_stop(world: World) -> None:
    handle = await world.start()
    assert world.supervisor.pids("m-1") == [handle.pid]
    assert world.supervisor.log_tail("m-1") == ["step 1"]
    assert world.progress == [Progress(0.5, "step 1")]
    async with world.session.get(handle.base_url) as reply:
        assert reply.status == 200
    await world.supervisor.stop("m-1", 2.0)
    assert not lives(handle.pid)
    assert world.supervisor.pids("m-1") == []
    await world.supervisor.stop("m-1", 2.0)
    assert world.deaths == []
    await world.start()


async def test_what_an_engine_said_just_before_it_answered_is_told(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log is looked at now and then: a quick engine spoke and served between two looks, and nobody heard it."""

    class Quick(ScriptKind):
        async def probe(self, session: aiohttp.ClientSession, base_url: str) -> bool:
            await until(lambda: world.supervisor.log_tail("m-1") == ["step 1"])
            return True

    monkeypatch.setattr(supervising, "POLL_S", 60.0)
    await world.start(Quick())
    assert world.progress == [Progress(0.5, "step 1")]


async def test_an_engine_that_is_not_spawned_yet_has_no_processes(world: World) -> None:
    """A pid of 0 would name session 0, which is init's: its memory was counted, and a test once killed it."""
    starting = asyncio.create_task(world.start())
    await asyncio.sleep(0)
    assert world.supervisor.pids("m-1") == []
    handle = await starting
    assert world.supervisor.pids("m-1") == [handle.pid]


async def test_what_an_engine_leaves_in_its_temporary_folder_goes_with_it(world: World) -> None:
    leaves = SERVE.replace("print(", "open(os.environ['TMPDIR'] + '/socket', 'x'); print(")
    handle = await world.start(ScriptKind(leaves))
    assert os.listdir(handle.tmp_dir) == ["socket"]
    await world.supervisor.stop(handle.engine_id, 5.0)
    await until(lambda: not os.path.exists(handle.tmp_dir))


async def test_a_child_that_ignores_sigterm_is_gone_after_a_stop(world: World) -> None:
    await world.start(ScriptKind(f"{FAMILY}{SERVE}"))
    tail = world.supervisor.log_tail("m-1")
    child = int(next(line for line in tail if line.startswith("child")).split()[1])
    assert child in world.supervisor.pids("m-1")
    await world.supervisor.stop("m-1", 2.0)
    assert not lives(child)


@pytest.mark.parametrize(("limit_s", "warnings"), [(0.05, 1), (0.0, 0)])
async def test_an_engine_that_ignores_sigterm_is_killed_at_the_limit(
    world: World, caplog: pytest.LogCaptureFixture, limit_s: float, warnings: int
) -> None:
    stubborn = SERVE.replace("class", "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    class")
    handle = await world.start(ScriptKind(stubborn))
    await world.supervisor.stop("m-1", limit_s)
    assert not lives(handle.pid)
    assert len(caplog.records) == warnings, "that it is killed at once was decided, and is no surprise"


async def test_an_early_end_is_explained_by_the_log(world: World) -> None:
    kind = ScriptKind("import sys; print('cause: no weights'); print('traceback'); sys.exit(3)")
    with pytest.raises(EngineExit, match=r"^ended with exit status 3: cause: no weights$") as raised:
        await world.start(kind)
    assert raised.value.log_tail == ["cause: no weights", "traceback"]
    await world.start()


async def test_a_program_that_is_not_there_is_named(world: World) -> None:
    kind = ScriptKind()
    kind.spawn_spec = lambda port, env: SpawnSpec(argv=("/no/such",), env={})  # type: ignore[method-assign]
    with pytest.raises(EngineExit, match=r"cannot start it: .*'/no/such'"):
        await world.start(kind)
    await world.start()


@pytest.mark.parametrize(
    ("kind", "limit_s", "reason"),
    [
        (ScriptKind(SLEEP), 0.3, "not ready within 0.3 s"),
        (ScriptKind(STATUS="503"), 0.3, "not ready within 0.3 s"),
        (ScriptKind(STATUS="400"), 4.0, "it refuses"),
    ],
)
async def test_an_engine_that_never_serves_is_ended_before_the_start_fails(
    world: World, kind: ScriptKind, limit_s: float, reason: str
) -> None:
    with pytest.raises(EngineExit, match=reason):
        await world.start(kind, start_timeout_s=limit_s)
    assert (await world.link.list()).engines == []
    await world.start()


async def test_a_cancelled_start_leaves_nothing(world: World) -> None:
    for pause_s in (0.0, 0.002, 0.1):  # before the keeper was asked, before it answered, while the engine loads
        starting = asyncio.create_task(world.start(ScriptKind(SLEEP)))
        await asyncio.sleep(pause_s)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert (await world.link.list()).engines == []
    await world.start()


async def test_a_stop_ends_a_start(world: World) -> None:
    starting = asyncio.create_task(world.start(ScriptKind(SLEEP)))
    await asyncio.sleep(0.05)
    await world.supervisor.stop("m-1", 1.0)
    with pytest.raises(EngineExit, match="it was stopped"):
        await starting


async def test_a_stop_goes_on_when_its_caller_is_cancelled(world: World) -> None:
    handle = await world.start()
    stopping = asyncio.create_task(world.supervisor.stop("m-1", 1.0))
    await asyncio.sleep(0)
    stopping.cancel()
    await world.supervisor.stop("m-1", 1.0)
    assert not lives(handle.pid)


async def test_a_stolen_port_is_replaced_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as thief:
        free = supervising._free_port()
        ports = iter([thief.getsockname()[1], free])
        monkeypatch.setattr(supervising, "_free_port", lambda: next(ports))
        kind = ScriptKind()
        monkeypatch.setattr(kind, "probe", _probe_only(free))
        handle = await world.start(kind)
    assert handle.port == free


def _probe_only(port: int) -> Callable[..., Any]:
    async def probe(session: aiohttp.ClientSession, base_url: str) -> bool:
        return base_url.endswith(f":{port}") and await ScriptKind().probe(session, base_url)

    return probe


async def test_the_death_of_a_ready_engine_is_told_with_its_last_words(world: World) -> None:
    handle = await world.start()
    os.kill(handle.pid, signal.SIGKILL)
    await world.died.wait()
    assert world.deaths == [("m-1", "killed by SIGKILL", ["step 1"])]
    await world.start()


async def test_a_new_proxy_adopts_the_living_engines(world: World) -> None:
    before = await world.start(revision="r1")
    world.link.close()
    os.kill(world.rig.proxy_pid(), signal.SIGKILL)
    world.revive()
    (after,) = await world.supervisor.adopt()
    assert (after.pid, after.revision, after.base_url) == (before.pid, "r1", before.base_url)
    os.kill(after.pid, signal.SIGKILL)
    await world.died.wait()
    assert world.deaths[0][:2] == ("m-1", "killed by SIGKILL")


async def test_an_engine_of_another_version_is_not_adopted_but_ended(world: World) -> None:
    log = str(world.rig.state_dir / "log")
    await world.link.spawn("old", python(SLEEP), {}, log=log, meta={"shape": "old"})
    assert await world.supervisor.adopt() == []
    while (await world.link.list()).engines:
        await asyncio.sleep(0.005)


async def test_only_the_last_logs_are_kept(world: World) -> None:
    kind = ScriptKind("import sys; sys.exit(1)")
    for number in range(7):
        with pytest.raises(EngineExit):
            await world.start(kind, engine_id=f"m-{number}")
    names = sorted(path.name for path in (world.rig.state_dir / "logs" / "m").iterdir())
    assert [name.rpartition("Z")[2][-7:] for name in names] == [f"m-{number}.log" for number in range(2, 7)]


async def test_whoever_asks_a_keeper_that_has_gone_is_told(world: World) -> None:
    lost = asyncio.Event()
    world.link.on_lost = lost.set
    asked = asyncio.create_task(world.link.signal("nobody", 15))
    with pytest.raises(KeeperError, match="there is no engine nobody"):
        await asked
    world.rig.process.kill()
    await lost.wait()
    with pytest.raises(KeeperGone):
        await world.link.list()


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have the supervisor start this fake in place of the warm launcher."""

    def use(mode: str) -> None:
        original = KeeperLink.launcher

        async def launch(self: KeeperLink, name: str, argv: Sequence[str], env: Mapping[str, str], log: str) -> Any:
            return await original(self, name, [*python(FAKE_LAUNCHER), mode], env, log)

        monkeypatch.setattr(KeeperLink, "launcher", launch)

    return use


async def test_a_warm_start_is_forked_by_the_launcher(world: World, launcher: Callable[[str], None]) -> None:
    launcher("fork")
    handle = await world.start(ScriptKind(warm=True))
    (pid,) = world.supervisor.launcher_pids()
    assert pid != handle.pid
    assert world.supervisor.pids("m-1") == [handle.pid]
    await world.supervisor.stop("m-1", 2.0)
    assert lives(pid)
    assert not lives(handle.pid)


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        ("unusable", "its launcher is unusable. it has two threads"),
        ("fail", "its launcher could not fork: no memory"),
        ("die", "its launcher ended with status 3"),
    ],
)
async def test_a_launcher_that_cannot_is_replaced_by_a_plain_start_and_said_once(
    world: World, launcher: Callable[[str], None], mode: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    launcher(mode)
    for engine_id in ("m-1", "m-2"):
        handle = await world.start(ScriptKind(warm=True), engine_id=engine_id)
        assert (await world.session.get(handle.base_url)).status == 200
    said = [record.getMessage() for record in caplog.records if "cold" in record.getMessage()]
    assert len(said) == 1
    assert why in said[0]
    # Nothing else lives below the keeper: not the fork either whose launcher did not live to tell of it.
    known = {pid for engine_id in ("m-1", "m-2") for pid in world.supervisor.pids(engine_id)}
    tag = reaper.environment(handle.pid)["VRAMP_KEEPER"]

    def engines() -> set[int]:
        marked = {each.pid for each in reaper.processes() if reaper.environment(each.pid).get("VRAMP_KEEPER") == tag}
        return marked - {world.rig.proxy_pid(), *world.supervisor.launcher_pids()}

    await until(lambda: engines() == known)  # what was killed takes a moment to go


async def test_a_simulated_engine_loads_answers_and_crashes_when_asked_to(world: World) -> None:
    kind = SimulatedKind(model="m", memory_bytes=5 << 30, load_s=0.05, ttft_ms=0, tokens_per_s=1e5)
    handle = await world.start(kind)
    assert {each.note for each in world.progress} == {"loading (simulated)"}
    assert declared_memory(handle.pid) == 5 << 30
    asked = {"model": "m", "messages": [{"role": "user", "content": "[[fault:crash]]"}], "stream": True}
    async with world.session.post(f"{handle.base_url}/v1/chat/completions", json=asked) as reply:
        with pytest.raises(aiohttp.ClientError):
            await reply.read()
    await world.died.wait()
    assert world.deaths[0][1] == "ended with exit status 70"
    assert world.deaths[0][2][-1] == "simulated crash"
    assert declared_memory(handle.pid) == 0


async def test_a_launcher_that_dies_again_and_again_is_given_up(
    world: World, launcher: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervising, "LAUNCHER_STARTS", 2)
    launcher("die")
    for engine_id in ("m-1", "m-2", "m-3"):
        await world.start(ScriptKind(warm=True), engine_id=engine_id)
    folder = world.rig.state_dir / "logs" / "launcher"
    assert len(list(folder.iterdir())) == 2


async def test_a_launcher_that_has_forked_may_die_as_often_as_it_likes(
    world: World, launcher: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervising, "LAUNCHER_STARTS", 1)
    launcher("fork")
    for engine_id in ("m-1", "m-2", "m-3"):
        await world.start(ScriptKind(warm=True), engine_id=engine_id)
        (pid,) = world.supervisor.launcher_pids()
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not world.supervisor.launcher_pids())
