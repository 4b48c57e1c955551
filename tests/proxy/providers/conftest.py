"""Providers of one server, and a request to them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Protocol

import pytest

from proxy.config import BackendConfig, Secret
from proxy.providers.openai import OpenAIProvider


class Connect(Protocol):
    def __call__(
        self, origin: str, *, slots: int = 1, key: Secret | None = None, connect_s: float = 1.0
    ) -> OpenAIProvider: ...


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """connect("http://127.0.0.1:8000") makes a provider of that server; the end of the test closes it."""
    made: list[OpenAIProvider] = []

    def to(origin: str, *, slots: int = 1, key: Secret | None = None, connect_s: float = 1.0) -> OpenAIProvider:
        backend = BackendConfig(name="cloud", kind="openai", base_url=f"{origin}/v1", max_connections=slots)
        made.append(OpenAIProvider(backend, key, connect_s=connect_s))
        return made[-1]

    yield to
    for provider in made:
        await provider.close()


async def ask(
    provider: OpenAIProvider,
    body: bytes = b"{}",
    headers: Mapping[str, str] | None = None,
    *,
    base_url: str | None = None,
) -> tuple[int, bytes]:
    """The status and the whole body of an answer."""
    async with provider.send("/v1/chat/completions", body, headers or {}, base_url=base_url) as answer:
        return answer.status, b"".join([chunk async for chunk in answer.chunks()])
