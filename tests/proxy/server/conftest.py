from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import orjson
import pytest
import uvloop

from ext.rate_counters import RateCounters
from proxy.accounting.usage import UsageLog
from proxy.catalog.catalog import Catalog
from proxy.config import BackendConfig, Config, ModelConfig, Secret
from proxy.config_secrets import NamedKey
from proxy.gate.keys import Keys
from proxy.observe import lines
from proxy.observe.access_log import AccessLog
from proxy.observe.metrics import Metrics
from proxy.providers.openai import OpenAIProvider
from proxy.server.handler import Handler
from proxy.server.http import Limits, Server, start
from proxy.server.state import State
from tests.fakes import FakeScheduler, FakeUpstream, plain, until


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Any]:
    """The loop that production runs on."""
    return {"uvloop": uvloop.new_event_loop}


class CountingLog(AccessLog):
    """Knows how many lines there will be, so that a test can wait for them."""

    taken = 0

    def take(self, line: bytes) -> None:
        self.taken += 1
        super().take(line)


class CountingUsage(UsageLog):
    """Likewise for rows."""

    taken = 0

    def take(self, line: bytes) -> None:
        self.taken += 1
        super().take(line)


class Proxy:
    """The server under test on a free port, over fake upstreams (engine and remote) and a fake scheduler."""

    def __init__(
        self,
        upstream: FakeUpstream,
        remote: FakeUpstream,
        log: Path,
        *,
        fast: bool = False,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.fast = fast
        self.tls = tls
        self.limits = Limits(write_stall_s=5.0)
        self.upstream = upstream
        self.remote = remote
        self.scheduler = FakeScheduler(upstream.base_url)
        self.metrics = Metrics()
        self.counters = RateCounters()
        self.log_path = log
        self.usage_path = log.with_suffix(".usage.jsonl")
        self.providers: list[OpenAIProvider] = []
        self.handler: Handler
        self.server: Server
        self.session: aiohttp.ClientSession
        self.access_log: CountingLog
        self.usage: CountingUsage

    def config(self, **changes: Any) -> Config:
        config = Config(
            backends=(
                BackendConfig(name="engines", kind="simulated"),
                BackendConfig(name="cloud", kind="openai", base_url=self.remote.base_url + "/v1"),
            ),
            models=(
                ModelConfig(id="demo-chat", backend="engines"),
                ModelConfig(id="demo-embed", backend="engines", task="embed"),
                ModelConfig(id="both", backend="engines"),
                ModelConfig(id="both", backend="cloud", upstream_model="big-one"),
                ModelConfig(id="far", backend="cloud", upstream_model="far-away"),
            ),
        )
        return msgspec.structs.replace(config, **changes)

    def configure(self, keys: tuple[str, ...] = (), **changes: Any) -> None:
        config = self.config(**changes)
        providers = {
            backend.name: OpenAIProvider(
                backend,
                Secret("sk-ours", "literal") if backend.kind == "openai" else None,
                connect_s=config.timeouts.connect_s,
            )
            for backend in config.backends
        }
        self.providers += providers.values()
        named = Keys(NamedKey(f"tenant-{at}", Secret(key, "literal")) for at, key in enumerate(keys))
        self.state = State.of(config, Catalog(config), named, providers, self.counters)
        if hasattr(self, "handler"):
            self.handler.configure(self.state)

    async def start(self) -> None:
        self.configure()
        self.access_log = CountingLog(str(self.log_path))
        self.usage = CountingUsage(str(self.usage_path))
        self.handler = Handler(
            self.state, self.scheduler, self.metrics, self.access_log, self.usage, residency=lambda _: "ready"
        )
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        self.address: tuple[str, int] = listening.getsockname()
        self.server = await start(self.handler, [listening], self.limits, fast=self.fast, tls=self.tls)
        listening.close()
        self.url = "http://{}:{}".format(*self.address)
        self.session = aiohttp.ClientSession(self.url)

    async def stop(self) -> None:
        await self.session.close()
        await self.server.close()
        for provider in self.providers:
            await provider.close()
        await self.access_log.close()
        await self.usage.close()

    async def rows(self) -> list[dict[str, Any]]:
        """The usage rows so far."""
        await until(lambda: self.usage_path.read_bytes().count(b"\n") >= self.usage.taken)
        return [orjson.loads(line) for line in self.usage_path.read_bytes().splitlines()]

    async def lines(self) -> list[dict[str, Any]]:
        """The access log so far."""
        await until(lambda: self.log_path.read_bytes().count(b"\n") >= self.access_log.taken)
        return [orjson.loads(line) for line in self.log_path.read_bytes().splitlines()]

    async def settled(self) -> None:
        """Return when nothing is in flight any more."""
        async with asyncio.timeout(2):
            await self.handler.until_idle()

    async def chat(self, path: str = "/v1/chat/completions", **fields: Any) -> aiohttp.ClientResponse:
        body = {"model": "demo-chat", "messages": [{"role": "user", "content": "Hi"}], **fields}
        return await self.session.post(path, json=body)

    async def raw(self, data: bytes, *, end: bool = False) -> tuple[int, bytes]:
        """Send these bytes and read one whole answer, as long as the server keeps or ends the connection."""
        reader, writer = await asyncio.open_connection(*self.address)
        writer.write(data)
        if end:
            writer.write_eof()
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1]) for line in head.splitlines() if line.lower().startswith(b"content-length:")
        )
        body = await reader.readexactly(length)
        writer.close()
        return int(head.split()[1]), body

    async def still_works(self) -> None:
        """The next request works: nothing leaked, nothing hangs."""
        self.upstream.behave = plain()
        self.scheduler.base_url = self.upstream.base_url
        self.scheduler.refusal = None
        response = await self.chat()
        assert response.status == 200, await response.text()
        assert (await response.json())["choices"][0]["message"]["content"] == "Hello."


@pytest.fixture(params=["ordinary", pytest.param("fast", marks=pytest.mark.native)])
async def proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> AsyncIterator[Proxy]:
    monkeypatch.setattr(lines, "FLUSH_S", 0.001)
    async with FakeUpstream() as upstream, FakeUpstream() as remote:
        proxy = Proxy(upstream, remote, tmp_path / "access.log", fast=request.param == "fast")
        await proxy.start()
        yield proxy
        await proxy.stop()
        assert proxy.scheduler.all_returned_once
        assert [record.getMessage() for record in caplog.get_records("call") if record.levelname == "ERROR"] == []
