"""What servers of other people's making may do to a connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Self

import pytest

from proxy.providers.base import Broken, Unreachable
from proxy.providers.openai import OpenAIProvider
from tests.proxy.providers.conftest import Connect, ask

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
ANSWERED = (200, b"ok")
LARGE = b"x" * (8 << 20)  # more than the buffers of both sockets hold


class RawServer:
    """Answers each request with the next of `answers`, once it has read the body if it `takes` bodies."""

    def __init__(self) -> None:
        self.answers: list[bytes] = []
        self.takes = True
        self.requests: list[bytes] = []
        self.port = 0
        self._serving: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.connections = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        self.connections += 1
        try:
            while self.answers:
                request = await reader.readuntil(b"\r\n\r\n")
                length = int(request.partition(b"content-length: ")[2].partition(b"\r\n")[0])
                if self.takes:
                    request += await reader.readexactly(length)
                self.requests.append(request)
                writer.write(self.answers.pop(0))
                if not self.takes:
                    break
            await asyncio.Event().wait()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.transport.abort()


@pytest.fixture
async def server() -> AsyncIterator[RawServer]:
    async with RawServer() as server:
        yield server


@pytest.fixture
async def provider(server: RawServer, connect: Connect) -> OpenAIProvider:
    return connect(f"http://127.0.0.1:{server.port}")


async def test_what_only_announces_an_answer_is_passed_over(server: RawServer, provider: OpenAIProvider) -> None:
    server.answers = [b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + OK, OK]
    assert [await ask(provider), await ask(provider)] == [ANSWERED, ANSWERED]
    assert server.connections == 1


async def test_what_is_no_http_is_told_in_one_line_and_the_next_request_works(
    server: RawServer, provider: OpenAIProvider
) -> None:
    server.answers = [b"SSH-2.0-OpenSSH_9.2\r\n\r\n"] * 2 + [OK]  # a broken connection is tried once more
    with pytest.raises(Broken, match=r"^backend cloud: its answer is no HTTP: .*$") as broken:
        await ask(provider)
    assert "\n" not in str(broken.value)
    assert await ask(provider) == ANSWERED


async def test_a_body_of_any_size_arrives_as_it_is(server: RawServer, provider: OpenAIProvider) -> None:
    sizes = (2, 1 << 14, (1 << 14) + 1, 1 << 20)
    server.answers = [OK] * len(sizes)
    for size in sizes:
        await ask(provider, b"y" * size)
        assert server.requests[-1].endswith(b"content-length: %d\r\n\r\n" % size + b"y" * size)
    assert server.connections == 1


async def test_an_answer_before_the_request_was_taken_ends_the_connection(
    server: RawServer, provider: OpenAIProvider
) -> None:
    server.takes, server.answers = False, [OK, OK]
    assert await ask(provider, LARGE) == ANSWERED
    server.takes = True
    assert await ask(provider) == ANSWERED
    assert server.connections == 2


async def test_a_clients_header_goes_on_byte_for_byte(server: RawServer, provider: OpenAIProvider) -> None:
    said = b"a=caf\xc3\xa9, b=\xff"
    server.answers = [OK]
    await ask(provider, headers={"tracestate": said.decode("utf-8", "surrogateescape")})
    assert b"\r\ntracestate: %b\r\n" % said in server.requests[0]


async def test_a_server_that_never_says_hello_is_unreachable(server: RawServer, connect: Connect) -> None:
    provider = connect(f"https://127.0.0.1:{server.port}", connect_s=0.02)
    for _ in range(2):  # the slot was given back
        with pytest.raises(Unreachable, match="Connection timeout to host https://127"):
            await ask(provider)
