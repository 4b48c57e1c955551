"""Usage rows in the listener, on both lanes: one for each call of a known caller, however it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from proxy.accounting import usage
from proxy.config import LimitsConfig, TimeoutsConfig
from tests.fakes import chunk, hang, plain, stream
from tests.patience import PATIENCE_S
from tests.proxy.server import ends
from tests.proxy.server.conftest import Proxy
from tests.proxy.server.ends import connect

FIELDS = set(usage.Row.__struct_fields__)


async def left_while_loading_and_told_so(proxy: Proxy) -> None:
    proxy.scheduler.base_url = None
    reader, writer = await connect(proxy, streaming=True)
    await reader.readuntil(b": vramp loading")
    writer.close()


async def took_nothing(proxy: Proxy) -> None:
    proxy.configure(timeouts=TimeoutsConfig(write_stall_s=0.2))
    proxy.upstream.behave = stream(*[chunk("x" * 50_000)] * 400, then=hang)
    _, writer = await connect(proxy, streaming=True)
    await asyncio.wait_for(proxy.upstream.aborted.wait(), PATIENCE_S)
    writer.close()


async def failed_over(proxy: Proxy) -> None:
    proxy.upstream.behave = plain(b"{}", status=503)
    assert (await proxy.chat(model="both")).status == 200


async def took_too_long(proxy: Proxy) -> None:
    proxy.configure(timeouts=TimeoutsConfig(first_byte_s=0.05))
    proxy.upstream.behave = hang
    await proxy.chat()


async def refused_by_a_limit(proxy: Proxy) -> None:
    proxy.configure(limits=LimitsConfig(tokens_per_minute=10))
    await proxy.chat(max_tokens=11)


async def no_such_model(proxy: Proxy) -> None:
    await proxy.chat(model="nope")


async def no_sense(proxy: Proxy) -> None:
    await proxy.chat(max_tokens=-1)


ENDS: list[tuple[Callable[[Proxy], Awaitable[None]], dict[str, Any]]] = [
    (ends.answered, {"status": 200, "error": None, "prompt_tokens": 7, "output_tokens": 2, "model": "demo-chat"}),
    (ends.streamed, {"status": 200, "error": None, "prompt_tokens": 7, "output_tokens": 2, "stream": True}),
    (ends.left_while_queued, {"status": 499, "error": "client_left", "prompt_tokens": None, "attempts": 1}),
    (left_while_loading_and_told_so, {"status": 499, "error": "client_left", "stream": True}),
    (ends.left_before_the_first_byte, {"status": 499, "error": "client_left", "output_tokens": None}),
    (ends.left_in_mid_stream, {"status": 499, "error": "client_left", "backend": "local/engines"}),
    (took_nothing, {"status": 499, "error": "client_stalled"}),
    (failed_over, {"status": 200, "error": None, "attempts": 2, "backend": "remote/cloud", "output_tokens": 2}),
    (ends.failed_upstream, {"status": 502, "error": "upstream_error"}),
    (ends.broke_off_in_mid_stream, {"status": 200, "error": "upstream_error"}),
    (took_too_long, {"status": 504, "error": "upstream_timeout"}),
    (ends.refused_by_the_scheduler, {"status": 503, "error": "queue_full"}),
    (refused_by_a_limit, {"status": 400, "error": "max_tokens_above_limit"}),
    (no_such_model, {"status": 404, "error": "model_not_found", "model": ""}),
    (no_sense, {"status": 400, "error": "invalid_request_error"}),
]


@pytest.mark.parametrize(("end", "told"), ENDS, ids=[end.__name__ for end, _ in ENDS])
async def test_however_a_call_ends_it_has_one_row(proxy: Proxy, end: Any, told: dict[str, Any]) -> None:
    await end(proxy)
    await proxy.settled()
    (row,) = await proxy.rows()
    assert row.keys() == FIELDS
    assert row | told | {"tenant": "local", "path": "/v1/chat/completions"} == row
    proxy.configure()
    await proxy.still_works()
    assert len(await proxy.rows()) == 2


async def test_a_stop_gives_what_is_in_flight_its_row(proxy: Proxy) -> None:
    _, waiting = await ends.both_kinds_in_flight(proxy)
    await proxy.server.close()
    await waiting
    assert sorted((row["status"], row["error"]) for row in await proxy.rows()) == [(200, "stopping"), (503, "stopping")]


async def test_strangers_and_pages_have_no_rows(proxy: Proxy) -> None:
    proxy.configure(keys=("sk-0",))
    assert (await proxy.chat()).status == 401
    await proxy.session.get("/v1/models", headers={"authorization": "Bearer sk-0"})
    await proxy.session.get("/nowhere")
    await proxy.raw(b"nonsense\r\n\r\n")
    await proxy.settled()
    assert await proxy.rows() == []
    body = {"model": "demo-chat", "messages": ["Hi"]}
    await proxy.session.post("/v1/chat/completions", json=body, headers={"authorization": "Bearer sk-0"})
    assert [row["tenant"] for row in await proxy.rows()] == ["tenant-0"]


async def test_while_rows_cannot_be_written_nobody_is_served_unrecorded(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "MOST_PENDING", 0)
    response = await proxy.chat()
    assert (response.status, (await response.json())["error"]["code"]) == (503, "usage_unwritable")
    assert response.headers["retry-after"] == "1"
    assert (await proxy.session.get("/readyz")).status == 503
    assert (await proxy.session.get("/v1/models")).status == 200
    monkeypatch.undo()
    await proxy.still_works()
