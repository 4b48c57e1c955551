"""The official SDK, which real clients are: what it does with our answers, our errors and our progress comments."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from proxy.server import journey
from scheduler.model import RefusalCode
from tests.fakes import chunk, die, stream
from tests.proxy.server.conftest import Proxy

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture
async def sdk(proxy: Proxy) -> AsyncIterator[AsyncOpenAI]:
    http = httpx.AsyncClient(trust_env=False)
    async with AsyncOpenAI(base_url=proxy.url + "/v1", api_key="any", max_retries=0, http_client=http) as client:
        yield client


async def test_it_chats(sdk: AsyncOpenAI) -> None:
    answer = await sdk.chat.completions.create(model="demo-chat", messages=HI)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == "Hello."
    assert answer.usage is not None


async def test_it_streams_through_progress(proxy: Proxy, sdk: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journey, "FIRST_COMMENT_S", 0.01)
    proxy.upstream.behave = stream()
    proxy.scheduler.base_url = None
    answer = await sdk.chat.completions.create(model="demo-chat", messages=HI, stream=True)  # type: ignore[arg-type]
    await asyncio.sleep(0.03)
    proxy.scheduler.waiting[0].grant(proxy.upstream.base_url)
    assert [each.choices[0].delta.content async for each in answer] == ["Hel", "lo.", None]


async def test_an_error_in_mid_stream_is_an_exception(proxy: Proxy, sdk: AsyncOpenAI) -> None:
    proxy.upstream.behave = stream(chunk("Hel"), then=die)
    answer = await sdk.chat.completions.create(model="demo-chat", messages=HI, stream=True)  # type: ignore[arg-type]
    with pytest.raises(openai.APIError, match="broke off"):
        async for _ in answer:
            pass
    await proxy.still_works()


async def test_our_errors_are_its_exceptions(proxy: Proxy, sdk: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        await sdk.chat.completions.create(model="nope", messages=HI)  # type: ignore[arg-type]
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        await sdk.chat.completions.create(model="demo-chat", messages=HI, max_tokens=-1)  # type: ignore[arg-type]
    assert bad.value.param == "max_tokens"
    proxy.scheduler.refusal = (RefusalCode.QUEUE_FULL, 0.01)
    with pytest.raises(openai.InternalServerError) as full:
        await sdk.chat.completions.create(model="demo-chat", messages=HI)  # type: ignore[arg-type]
    assert full.value.status_code == 503


async def test_it_retries_overload_by_itself_and_never_a_mistake(proxy: Proxy, sdk: AsyncOpenAI) -> None:
    patient = sdk.with_options(max_retries=2)
    proxy.scheduler.refusal = (RefusalCode.QUEUE_FULL, 0.01)
    call = asyncio.create_task(patient.chat.completions.create(model="demo-chat", messages=HI))  # type: ignore[arg-type]
    await proxy.scheduler.submitted.wait()
    proxy.scheduler.refusal = None
    assert (await call).choices[0].message.content == "Hello."
    count = len(proxy.scheduler.waiting)
    proxy.scheduler.refusal = (RefusalCode.NEVER_FITS, None)
    with pytest.raises(openai.BadRequestError):
        await patient.chat.completions.create(model="demo-chat", messages=HI)  # type: ignore[arg-type]
    assert len(proxy.scheduler.waiting) == count + 1


async def test_it_lists_models_and_embeds(proxy: Proxy, sdk: AsyncOpenAI) -> None:
    assert [each.id async for each in sdk.models.list()][:2] == ["demo-chat", "demo-embed"]
    with pytest.raises(openai.BadRequestError):
        await sdk.embeddings.create(model="demo-chat", input="Hi")
