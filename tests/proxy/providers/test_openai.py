from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from proxy.config import Secret
from proxy.providers.base import Broken, Unreachable
from proxy.providers.openai import OpenAIProvider
from tests.fakes import FakeUpstream, die, hang, plain, until
from tests.proxy.providers.conftest import Connect, ask


@pytest.fixture
async def upstream() -> AsyncIterator[FakeUpstream]:
    async with FakeUpstream() as upstream:
        yield upstream


@pytest.fixture
async def provider(upstream: FakeUpstream, connect: Connect) -> OpenAIProvider:
    return connect(upstream.base_url, slots=2, key=Secret("sk-ours", "literal"))


async def test_the_key_goes_to_its_own_server_only(provider: OpenAIProvider, upstream: FakeUpstream) -> None:
    await ask(provider)
    await ask(provider, base_url=upstream.base_url)
    (path, with_key, _), (_, without, _) = upstream.requests
    assert path == "/v1/chat/completions"
    assert with_key["authorization"] == "Bearer sk-ours"
    assert "authorization" not in without
    assert with_key["accept-encoding"] == "identity"
    assert with_key["user-agent"] == "vramp"


async def test_a_redirect_is_not_followed(provider: OpenAIProvider, upstream: FakeUpstream) -> None:
    upstream.behave = plain(b"", 307, location=upstream.base_url + "/elsewhere")
    assert (await ask(provider))[0] == 307
    assert len(upstream.requests) == 1


async def test_a_connection_closed_while_idle_costs_nobody_anything(
    provider: OpenAIProvider, upstream: FakeUpstream
) -> None:
    await ask(provider)
    calls = 0

    async def close_once(request: web.BaseRequest, body: bytes) -> web.StreamResponse:
        nonlocal calls
        calls += 1
        if calls == 1:
            await die(request)
        return await plain()(request, body)

    upstream.behave = close_once
    assert (await ask(provider))[0] == 200


async def test_a_request_that_ran_for_a_while_is_not_sent_twice(
    provider: OpenAIProvider, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.providers.openai.STALE_S", 0.02)

    async def work_then_die(request: web.BaseRequest, _: bytes) -> web.StreamResponse:
        await asyncio.sleep(0.05)
        await die(request)
        return web.Response()

    upstream.behave = work_then_die
    with pytest.raises(Broken):
        await ask(provider)
    assert len(upstream.requests) == 1


async def test_nobody_there_is_unreachable(provider: OpenAIProvider) -> None:
    with pytest.raises(Unreachable, match="backend cloud"):
        await ask(provider, base_url="http://127.0.0.1:1")


async def test_leaving_before_the_end_cancels_and_frees_the_slot(
    provider: OpenAIProvider, upstream: FakeUpstream
) -> None:
    upstream.behave = hang
    calls = [asyncio.create_task(ask(provider)) for _ in range(2)]
    await until(lambda: len(upstream.requests) == 2)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    await until(lambda: upstream.aborts == 2)
    upstream.behave = plain()
    assert (await ask(provider))[0] == 200


async def test_an_answer_read_to_its_end_leaves_its_connection_for_the_next(
    provider: OpenAIProvider, upstream: FakeUpstream
) -> None:
    ports = set()

    async def note_port(request: web.BaseRequest, body: bytes) -> web.StreamResponse:
        assert request.transport is not None
        ports.add(request.transport.get_extra_info("peername")[1])
        return await plain()(request, body)

    upstream.behave = note_port
    for _ in range(5):
        await ask(provider)
    assert len(ports) == 1
