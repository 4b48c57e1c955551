"""Launcher and kind with a real vLLM: forked and plain, generating and embedding, failing and killed."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import aiohttp
import psutil
import pytest

from scheduler.devices.host import unique_bytes
from scheduler.engines.base import SpawnSpec
from scheduler.engines.estimate import estimate_memory, kv_tokens
from scheduler.engines.vllm import LAUNCHER_ENV, VllmKind
from tests.scheduler.engines.launcher_rig import LauncherRig

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[3]
MODELS = ROOT / ".models"
KV_CACHE = 64 << 20
TASKS = {"generate": "demo-chat", "embed": "demo-embed"}


@pytest.fixture(scope="module", autouse=True)
def models() -> None:
    wanted = [argument for name in TASKS.values() for argument in ("--only", name)]
    subprocess.run([sys.executable, str(ROOT / "scripts/make_demo_models.py"), *wanted], check=True)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LauncherRig]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # vLLM would be compiled anew at every start
        with LauncherRig(tmp_path_factory.mktemp("launcher"), None, env=LAUNCHER_ENV) as rig:
            assert rig.hear() == {"op": "ready"}
            yield rig


def kind(task: str = "generate", **changed: int) -> VllmKind:
    name = TASKS[task]
    return VllmKind(model=name, path=str(MODELS / name), task=task, cpu=True, **{"kv_cache_bytes": KV_CACHE, **changed})


def fork(rig: LauncherRig, spec: SpawnSpec, log: Path) -> psutil.Process:
    answer = rig.order(argv=list(spec.argv), env=spec.env, log=str(log))
    assert answer["op"] == "forked", answer
    return psutil.Process(answer["pid"])


async def ready(kind: VllmKind, port: int, engine: psutil.Process) -> None:
    async with aiohttp.ClientSession() as session:
        while not await kind.probe(session, f"http://127.0.0.1:{port}"):
            assert engine.status() != psutil.STATUS_ZOMBIE, "it ended during its start"
            await asyncio.sleep(0.1)


@contextmanager
def killed_at_the_end(engine: psutil.Process) -> Iterator[None]:
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess, ChildProcessError):
            engine.kill()
            os.waitpid(engine.pid, 0)


def family(engine: psutil.Process) -> list[psutil.Process]:
    return [engine, *engine.children(recursive=True)]


def assert_gone(processes: Sequence[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes[1:], timeout=10)
    assert alive == []


@pytest.mark.parametrize("task", TASKS)
async def test_a_forked_engine_answers_within_its_estimate_and_kill_9_leaves_nothing(
    rig: LauncherRig, tmp_path: Path, unused_tcp_port: int, task: str
) -> None:
    engine_kind = kind(task)
    began = time.monotonic()
    engine = fork(rig, engine_kind.spawn_spec(unused_tcp_port, {}), tmp_path / "log")
    with killed_at_the_end(engine):
        await ready(engine_kind, unused_tcp_port, engine)
        print(f"{task}: first answer {time.monotonic() - began:.1f} s after the order")
        processes = family(engine)
        held = sum(unique_bytes(process.pid) for process in processes)
        assert KV_CACHE < held <= estimate_memory(str(MODELS / TASKS[task]), kv_cache_bytes=KV_CACHE, cpu=True)
        assert "HTTP/1.1" not in (tmp_path / "log").read_text(), "a line for each request would fill the disk"
    assert len(processes) > 1
    assert_gone(processes)


async def test_a_cache_holds_as_many_tokens_as_we_count(rig: LauncherRig, tmp_path: Path, unused_tcp_port: int) -> None:
    engine = fork(rig, kind().spawn_spec(unused_tcp_port, {}), tmp_path / "log")
    with killed_at_the_end(engine):
        await ready(kind(), unused_tcp_port, engine)
    said = re.search(r"KV cache size: ([\d,]+) tokens", (tmp_path / "log").read_text())
    assert said is not None
    assert int(said[1].replace(",", "")) == kv_tokens(str(MODELS / "demo-chat"), kv_cache_bytes=KV_CACHE)


def test_a_forked_engine_that_fails_is_explained_from_its_log(
    rig: LauncherRig, tmp_path: Path, unused_tcp_port: int
) -> None:
    engine_kind = kind(kv_cache_bytes=1 << 20, max_context=4096)
    engine = fork(rig, engine_kind.spawn_spec(unused_tcp_port, {}), tmp_path / "log")
    _, status = os.waitpid(engine.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 1
    reason = engine_kind.explain((tmp_path / "log").read_text().splitlines())
    assert reason is not None
    assert reason.startswith("the KV cache is too small for one request of 4096 tokens")


async def test_a_plain_start_tells_its_progress_answers_and_stops_when_asked(
    tmp_path: Path, unused_tcp_port: int
) -> None:
    engine_kind = kind()
    spec = engine_kind.spawn_spec(unused_tcp_port, {})
    env = {**os.environ, **spec.env}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    with (tmp_path / "log").open("wb") as log:
        engine = psutil.Popen(spec.argv, env=env, stdout=log, stderr=log, start_new_session=True)
    with killed_at_the_end(engine):
        await ready(engine_kind, unused_tcp_port, engine)
        processes = family(engine)
        engine.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(engine.wait, 30) == 0
    assert_gone(processes)
    lines = (tmp_path / "log").read_text().splitlines()
    seen = [step.fraction for line in lines if (step := engine_kind.progress(line)) is not None]
    assert seen == sorted(seen)
    assert seen[-1] == 0.98


async def test_of_two_requests_that_wait_in_an_engine_the_one_of_the_shorter_class_goes_first(
    rig: LauncherRig, tmp_path: Path, unused_tcp_port: int
) -> None:
    engine_kind = kind(max_sequences=1)
    engine = fork(rig, engine_kind.spawn_spec(unused_tcp_port, {}), tmp_path / "log")
    ended: list[int] = []

    async def ask(session: aiohttp.ClientSession, priority: int, tokens: int) -> None:
        body = {"model": TASKS["generate"], "prompt": "a", "max_tokens": tokens, "ignore_eos": True}
        url = f"http://127.0.0.1:{unused_tcp_port}/v1/completions"
        async with session.post(url, json=body | {"priority": priority}) as answer:
            assert answer.status == 200, await answer.text()
        ended.append(priority)

    with killed_at_the_end(engine):
        await ready(engine_kind, unused_tcp_port, engine)
        async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
            group.create_task(ask(session, -2, 300))
            await asyncio.sleep(0.2)  # it holds the only place; the others come in the wrong order
            group.create_task(ask(session, 2, 8))
            await asyncio.sleep(0.2)
            assert ended == [], "the first was to take longer"
            group.create_task(ask(session, -1, 8))
    assert ended == [-2, -1, 2]
