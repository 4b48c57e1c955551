"""What a client hears while its model loads."""

from __future__ import annotations

import asyncio
import json

import pytest

from proxy.server import journey
from scheduler.model import RefusalCode
from tests.fakes import DONE, STREAM, USAGE_CHUNK, plain, stream
from tests.proxy.server.conftest import Proxy

PROGRESS = b": vramp loading demo-chat, 62 %, 2 before you, about 3 s\n\n"


@pytest.fixture(autouse=True)
def _impatient(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journey, "FIRST_COMMENT_S", 0.01)
    monkeypatch.setattr(journey, "COMMENT_EVERY_S", 0.01)
    proxy.scheduler.base_url = None


async def test_a_stream_hears_progress_then_its_answer(proxy: Proxy) -> None:
    proxy.upstream.behave = stream()
    response = await proxy.chat(stream=True)
    assert response.status == 200
    assert response.headers["x-vramp-model"] == "demo-chat"
    assert not {"x-vramp-backend", "x-vramp-wait-ms", "x-vramp-attempts"} & {name.lower() for name in response.headers}
    for _ in range(3):
        assert await response.content.readexactly(len(PROGRESS)) == PROGRESS
    proxy.scheduler.waiting[0].grant(proxy.upstream.base_url, queue_s=0.25, load_s=3.5)
    rest = (await response.read()).replace(PROGRESS, b"")
    closing, _, answer = rest.partition(b"\n\n")
    assert closing.startswith(b": vramp x-request-id=")
    assert b"x-vramp-backend=local/engines" in closing
    assert b"x-vramp-wait-ms=queue=250,load=3500,upstream=" in closing
    assert answer == STREAM.replace(USAGE_CHUNK, b"")


async def test_a_refusal_after_progress_is_an_error_event(proxy: Proxy) -> None:
    response = await proxy.chat(stream=True)
    assert await response.content.readexactly(len(PROGRESS)) == PROGRESS
    proxy.scheduler.waiting[0].refuse(RefusalCode.LOAD_FAILED, 5.0)
    events = (await response.read()).replace(PROGRESS, b"")
    assert json.loads(events.removeprefix(b"data: "))["error"]["code"] == "load_failed"
    await proxy.settled()
    assert (await proxy.lines())[-1]["error"] == "load_failed"
    await proxy.still_works()


async def test_an_upstream_error_after_progress_is_an_error_event(proxy: Proxy) -> None:
    proxy.upstream.behave = plain(b'{"error":{"message":"too long","type":"t","param":null,"code":"c"}}', 400)
    response = await proxy.chat(stream=True)
    assert await response.content.readexactly(len(PROGRESS)) == PROGRESS
    proxy.scheduler.waiting[0].grant(proxy.upstream.base_url)
    events = (await response.read()).replace(PROGRESS, b"")
    assert json.loads(events.removeprefix(b"data: "))["error"] == {
        "message": "too long", "type": "t", "param": None, "code": "c"
    }  # fmt: skip
    assert DONE not in events


async def test_progress_fixes_the_status_but_not_the_candidate(proxy: Proxy) -> None:
    proxy.remote.behave = stream()
    response = await proxy.chat(model="both", stream=True)
    await response.content.readuntil(b"\n\n")
    proxy.scheduler.waiting[0].refuse(RefusalCode.LOAD_FAILED)
    assert (await response.read()).endswith(DONE)
    assert len(proxy.remote.requests) == 1


async def test_a_plain_call_waits_in_silence_and_keeps_its_status(proxy: Proxy) -> None:
    call = asyncio.create_task(proxy.chat())
    await proxy.scheduler.submitted.wait()
    await asyncio.sleep(0.05)
    proxy.scheduler.waiting[0].refuse(RefusalCode.LOAD_FAILED, 5.0)
    response = await call
    assert (response.status, response.headers["retry-after"]) == (503, "5")


async def test_a_stream_that_is_admitted_at_once_has_its_waits_in_headers(proxy: Proxy) -> None:
    proxy.upstream.behave = stream()
    proxy.scheduler.base_url = proxy.upstream.base_url
    response = await proxy.chat(stream=True)
    assert response.headers["x-vramp-wait-ms"].startswith("queue=0,load=0,upstream=")
    assert not (await response.read()).startswith(b":")


async def test_leaving_during_progress_withdraws_the_ticket(proxy: Proxy) -> None:
    response = await proxy.chat(stream=True)
    await response.content.readexactly(len(PROGRESS))
    response.close()
    await proxy.settled()
    assert proxy.scheduler.all_returned_once
    assert (await proxy.lines())[-1]["status"] == 499
    await proxy.still_works()
