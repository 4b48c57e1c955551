"""Sleep, wake and the fixed question over HTTP, against the simulated engine, which speaks vLLM's routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp.test_utils import TestServer

from scheduler.attest import difference
from scheduler.engines import logs
from scheduler.engines.simulated_server import Engine, Settings
from scheduler.engines.sleeping import SleepControls, SleepError
from scheduler.engines.vllm import VllmKind
from scheduler.events import ProbeAnswered

CONTROLS = SleepControls("sim")


async def serve(fault: str) -> TestServer:
    settings = {"port": 0, "model": "sim", "task": "generate", "ttft_ms": 0.0, "tokens_per_s": 1e6, "load_s": 0.0}
    server = TestServer(Engine(Settings(**settings, max_sequences=4, fault=fault, fault_after=0)).app())
    await server.start_server()
    return server


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def answers(session: aiohttp.ClientSession, url: str) -> tuple[ProbeAnswered, ProbeAnswered]:
    """What it says before it sleeps, and after it has woken."""
    before = await CONTROLS.ask(session, url)
    await CONTROLS.sleep(session, url)
    await CONTROLS.wake(session, url)
    after = await CONTROLS.ask(session, url)
    return ProbeAnswered("e", before.token, before.logprob), ProbeAnswered("e", after.token, after.logprob)


async def test_what_slept_well_says_the_same(session: aiohttp.ClientSession) -> None:
    async with await serve("none") as server:
        before, after = await answers(session, str(server.make_url("")).rstrip("/"))
        assert before.token
        assert difference(before, after) is None


async def test_a_corrupted_wake_is_caught_every_time(session: aiohttp.ClientSession) -> None:
    async with await serve("corrupt") as server:
        url = str(server.make_url("")).rstrip("/")
        before, after = await answers(session, url)
        assert "before it slept" in (difference(before, after) or "")
        for _ in range(20):
            assert difference(before, (await answers(session, url))[1]) is not None


async def test_a_sleeper_lets_requests_hang_until_it_is_woken(session: aiohttp.ClientSession) -> None:
    async with await serve("none") as server:
        url = str(server.make_url("")).rstrip("/")
        await CONTROLS.sleep(session, url)
        body = {"model": "sim", "prompt": "Hi", "max_tokens": 1}
        asked = asyncio.create_task(session.post(f"{url}/v1/completions", json=body))
        await asyncio.sleep(0)
        async with session.get(f"{url}/is_sleeping") as answer:
            assert (await answer.json())["is_sleeping"] is True
        assert not asked.done()
        await CONTROLS.wake(session, url)
        async with await asked as reply:
            assert reply.status == 200


async def test_an_engine_without_the_routes_says_so(session: aiohttp.ClientSession) -> None:
    async with await serve("none") as server:
        url = str(server.make_url("/nowhere"))
        with pytest.raises(SleepError, match="/sleep answers 404"):
            await CONTROLS.sleep(session, url)
        with pytest.raises(SleepError, match="answers 404"):
            await SleepControls("other").ask(session, str(server.make_url("")).rstrip("/"))


def test_vllm_is_started_so_that_it_can_sleep_on_a_gpu_only() -> None:
    def kind(*, cpu: bool, task: str = "generate", sleep: bool = True) -> VllmKind:
        return VllmKind(model="m", path="/m", kv_cache_bytes=1, cpu=cpu, task=task, sleep=sleep)

    spec = kind(cpu=False).spawn_spec(1, {})
    assert "--enable-sleep-mode" in spec.argv
    assert spec.env["VLLM_SERVER_DEV_MODE"] == "1"
    for other in (kind(cpu=True), kind(cpu=False, task="embed"), kind(cpu=False, sleep=False)):
        assert other.sleep_controls is None
        assert "--enable-sleep-mode" not in other.spawn_spec(1, {}).argv
        assert "VLLM_SERVER_DEV_MODE" not in other.spawn_spec(1, {}).env


@pytest.mark.parametrize(
    "line",
    [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "ValueError: Free memory on device cuda:0 (1.0/80.0 GiB) on startup is less than desired GPU memory",
        "ValueError: Available memory on node 0 (1.97/13.84 GiB) on startup is less than desired CPU memory",
        "ggml_backend_cuda_buffer_type_alloc_buffer: failed to allocate CUDA0 buffer of size 1",
        "OSError: [Errno 12] Cannot allocate memory",
    ],
)
def test_a_log_tells_of_want_of_memory(line: str) -> None:
    assert logs.tells_of_want(["INFO starting", line, "Engine core initialization failed."])
    assert not logs.tells_of_want(["INFO Available KV cache memory: 2.0 GiB", "exited with code 1"])
