"""What serves clients goes from one configuration to the next, and ends."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Self

import aiohttp
import msgspec
import pytest
from aiohttp import web

from ext.rate_counters import RateCounters
from proxy.config import TimeoutsConfig
from proxy.config_load import load_text
from proxy.config_secrets import ResolvedSecrets
from proxy.observe.metrics import Metrics
from proxy.providers.tls import AUTHORITIES
from proxy.server.serving import Serving
from tests.certificates import Pair, make_pair
from tests.fakes import FakeScheduler, FakeUpstream, plain, until

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

    def reload(self, **sections: object) -> None:
        self.serving.configure(msgspec.structs.replace(self.config, **sections), ResolvedSecrets())

    async def ask(self) -> int:
        async with (
            aiohttp.ClientSession() as client,
            client.post(f"http://localhost:{self.port}/v1/chat/completions", json=CALL) as answer,
        ):
            await answer.read()
            return answer.status


Trust = Callable[..., object]


@pytest.fixture
def trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trust]:
    """trust(pair, ...) writes those into the file of the authorities."""
    file = tmp_path / "authorities.pem"
    with monkeypatch.context() as within:
        within.setenv("SSL_CERT_FILE", str(file))
        yield lambda *pairs: file.write_bytes(b"".join(pair.cert.read_bytes() for pair in pairs))
    AUTHORITIES.read_again()


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


@pytest.mark.parametrize("fast", [False, pytest.param(True, marks=pytest.mark.native)])
async def test_a_reload_that_allows_less_time_cuts_off_nothing_that_began_before(
    upstream: FakeUpstream, fast: bool
) -> None:
    answers = asyncio.Event()

    async def late(request: web.BaseRequest, body: bytes) -> web.StreamResponse:
        await answers.wait()
        return await plain()(request, body)

    upstream.behave = late
    async with Served(upstream, fast=fast) as served:
        before = asyncio.create_task(served.ask())
        await upstream.arrived.wait()
        served.reload(timeouts=TimeoutsConfig(total_s=0.01))
        assert await served.ask() == 504, "by now that time is over"
        answers.set()
        assert await before == 200
        served.reload()
        assert await served.ask() == 200


@pytest.mark.parametrize("fast", [False, pytest.param(True, marks=pytest.mark.native)])
async def test_a_reload_reads_the_certificate_authorities_again(trust: Trust, tmp_path: Path, fast: bool) -> None:
    ours, other = make_pair(tmp_path / "ours"), make_pair(tmp_path / "other")
    async with FakeUpstream(ours.context()) as upstream, Served(upstream, fast=fast) as served:

        async def answer_trusting(*pairs: Pair) -> int:
            trust(*pairs)
            served.reload()
            return await served.ask()

        assert await answer_trusting(other) == 503
        assert await answer_trusting(other, ours) == 200
        assert await answer_trusting() == 200, "none at all is a file that somebody is writing"
        assert await answer_trusting(other) == 503
        assert await answer_trusting(ours) == 200


@pytest.mark.native
async def test_kept_connections_outlive_a_reload_that_finds_the_same_authorities(trust: Trust, tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    trust(pair)
    async with FakeUpstream(pair.context()) as upstream, Served(upstream, fast=True) as served:
        for _ in range(3):
            served.reload()
            assert await served.ask() == 200
        assert upstream.connections == 1
