"""What serves clients goes from one configuration to the next, and ends."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import closing
from typing import Self

import aiohttp
import pytest

from ext.rate_counters import RateCounters
from proxy.config_load import load_text
from proxy.config_secrets import ResolvedSecrets
from proxy.observe.metrics import Metrics
from proxy.server.serving import Serving
from tests.fakes import FakeScheduler, FakeUpstream, until

CONFIG = """
server.api_keys = []
observe.access_log = "off"
store.usage = "off"
[[backends]]
name = "cloud"
kind = "openai"
base_url = "{}/v1"
[[models]]
id = "far"
backend = "cloud"
"""

CALL = {"model": "far", "messages": [{"role": "user", "content": "Hello?"}]}


class Served:
    def __init__(self, upstream: FakeUpstream, *, fast: bool = False) -> None:
        self.config = load_text(CONFIG.format(upstream.base_url), "x.toml", {"server.fast_lane": fast})
        self.serving = Serving(
            self.config,
            ResolvedSecrets(),
            FakeScheduler(),
            Metrics(),
            counters=RateCounters(),
            residency=lambda _: "remote",
        )

    async def __aenter__(self) -> Self:
        sock = socket.create_server(("127.0.0.1", 0))
        self.port = sock.getsockname()[1]
        with closing(sock):
            await self.serving.start([sock])
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.serving.close()

    def reload(self) -> None:
        self.serving.configure(self.config, ResolvedSecrets())

    async def ask(self) -> int:
        async with (
            aiohttp.ClientSession() as client,
            client.post(f"http://localhost:{self.port}/v1/chat/completions", json=CALL) as answer,
        ):
            await answer.read()
            return answer.status


@pytest.fixture
async def upstream() -> AsyncIterator[FakeUpstream]:
    async with FakeUpstream() as upstream:
        yield upstream


async def test_it_leaves_no_connection_of_an_earlier_configuration_behind(upstream: FakeUpstream) -> None:
    async with Served(upstream) as served:
        for number in (1, 2, 3):
            assert await served.ask() == 200
            assert upstream.connections == number
            served.reload()
    await until(lambda: upstream.connections == 0)
