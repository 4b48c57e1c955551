"""Any server that speaks OpenAI's API, an engine of ours or a remote one: bytes there, bytes back.

The key belongs to the backend's own `base_url` and goes nowhere else: redirects are not followed, and a request to a
lease's URL carries no key. Nothing of the client's headers passes but an allow-list that the journey has applied.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from functools import lru_cache
from types import TracebackType

import aiohttp
from yarl import URL

from proxy.config import LOCAL_KINDS, BackendConfig, Secret
from proxy.providers.base import Broken, Straight, Unreachable
from proxy.providers.slots import Slots

# uvicorn, which serves vLLM, closes an idle connection after 5 s: leave before it does, or race with its FIN.
ENGINE_KEEPALIVE_S = 4.0
SLOT_WAIT_S = 30.0  # for one of `max_connections`; a remote that is slower than that is not a place to queue for
WAITERS_PER_CONNECTION = 4
# A connection that the server closed while idle breaks at once when it is used. Later breaks were of live requests,
# which may have been executed and charged for: they are not sent twice.
STALE_S = 1.0


class HttpUpstream:
    """`Upstream` over one aiohttp response."""

    __slots__ = ("_response",)

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self._response.status

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers, names in any case."""
        return self._response.headers

    def arrived(self) -> bytes | None:
        """See `Upstream`."""
        content = self._response.content
        return content.read_nowait() if content.is_eof() and content.exception() is None else None

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes; reading pauses when the consumer does."""
        content = self._response.content
        try:
            while chunk := await content.readany():
                yield chunk
        except (aiohttp.ClientError, OSError) as error:
            raise Broken(_why(error)) from error


class OpenAIProvider:
    """One backend: its session, its pool, its key. Make it on the running loop, close it after its last request."""

    def __init__(self, backend: BackendConfig, key: Secret | None, *, connect_s: float) -> None:
        remote = backend.kind not in LOCAL_KINDS
        self._name = backend.name
        self._loop = asyncio.get_running_loop()
        self._base_url = backend.base_url
        self._headers = {"user-agent": "vramp", "accept-encoding": "identity", "content-type": "application/json"}
        self._key = key
        # The scheduler's leases bound what an engine gets; for remotes the pool does.
        most = backend.max_connections
        self.slots = Slots(backend.name, most, most * WAITERS_PER_CONNECTION) if remote else None
        self.keepalive_s = backend.keepalive_s if remote else ENGINE_KEEPALIVE_S
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=self.keepalive_s),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_s),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            skip_auto_headers=("accept",),
        )

    def send(self, path: str, body: bytes, headers: Mapping[str, str], *, base_url: str | None = None) -> Sending:
        """See `Provider.send`."""
        return Sending(self, self._url(path, base_url), body, self._headers_for(headers, base_url))

    def straight(self, path: str, base_url: str | None = None) -> Straight | None:
        """How to POST there without this session; None where that takes TLS."""
        url = self._url(path, base_url)
        if url.scheme != "http" or url.host is None or url.port is None:
            return None
        lines = "".join(f"{name}: {value}\r\n" for name, value in self._headers_for({}, base_url).items())
        host = url.host_port_subcomponent or url.host
        head = f"POST {url.raw_path_qs} HTTP/1.1\r\nhost: {host}\r\n{lines}"
        return Straight(url.host, url.port, head.encode("latin-1"), self.keepalive_s)

    async def close(self) -> None:
        """Close all connections; what is in flight breaks."""
        await self._session.close()

    def _url(self, path: str, base_url: str | None) -> URL:
        return _joined((base_url or self._base_url or "").rstrip("/"), path)

    def _headers_for(self, headers: Mapping[str, str], base_url: str | None) -> dict[str, str]:
        own = {**headers, **self._headers}
        if self._key is not None and base_url is None:
            own["authorization"] = f"Bearer {self._key.reveal()}"
        return own

    async def post(self, url: URL, body: bytes, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        """The answer's headers, from one connection or, where that one had gone stale, from another."""
        sent_s = self._loop.time()
        try:
            return await self._post_once(url, body, headers)
        except Broken:
            if self._loop.time() - sent_s >= STALE_S:
                raise
        return await self._post_once(url, body, headers)

    async def _post_once(self, url: URL, body: bytes, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        try:
            return await self._session.post(url, data=body, headers=headers, allow_redirects=False)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, ssl.SSLError) as error:
            raise Unreachable(f"backend {self._name}: {_why(error)}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Broken(f"backend {self._name}: {_why(error)}") from error


class Sending:
    """One request on its way: from a free slot to the last byte of its answer, as `async with`.

    A class, since the generator that `asynccontextmanager` wants costs as much again as all that is done here.
    """

    __slots__ = ("_body", "_headers", "_provider", "_response", "_url")

    def __init__(self, provider: OpenAIProvider, url: URL, body: bytes, headers: Mapping[str, str]) -> None:
        self._provider = provider
        self._url = url
        self._body = body
        self._headers = headers

    async def __aenter__(self) -> HttpUpstream:
        slots = self._provider.slots
        if slots is not None and not slots.take_now():
            await slots.take(SLOT_WAIT_S)
        try:
            self._response = await self._provider.post(self._url, self._body, self._headers)
        except BaseException:
            self._give()
            raise
        return HttpUpstream(self._response)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        response = self._response
        # Closes the connection unless the body was read to its end: that is what cancels the work upstream.
        if response.content.at_eof():
            response.release()
        else:
            response.close()
        self._give()

    def _give(self) -> None:
        if self._provider.slots is not None:
            self._provider.slots.give()


@lru_cache(maxsize=1024)
def _joined(base: str, path: str) -> URL:
    """Parsing a URL takes as long as authenticating does, and there are few of them."""
    if base.endswith("/v1") and path.startswith("/v1/"):
        path = path[3:]  # both ways of writing a base URL are common
    return URL(base + path, encoded=True)


def _why(error: Exception) -> str:
    return str(error) or type(error).__name__
