"""Any server that speaks OpenAI's API, an engine of ours or a remote one: bytes there, bytes back.

The key belongs to the backend's own `base_url` and goes nowhere else: redirects are not followed, and a request to a
lease's URL carries no key. Nothing of the client's headers passes but an allow-list that the journey has applied.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import TracebackType

from yarl import URL

from proxy.config import LOCAL_KINDS, BackendConfig, Secret
from proxy.providers.base import Broken, Straight
from proxy.providers.connections import Connections, Destination, HttpUpstream, lines_of
from proxy.providers.slots import Slots
from proxy.providers.tls import AUTHORITIES

# uvicorn, which serves vLLM, closes an idle connection after 5 s: leave before it does, or race with its FIN.
ENGINE_KEEPALIVE_S = 4.0
SLOT_WAIT_S = 30.0  # for one of `max_connections`; a remote that is slower than that is not a place to queue for
WAITERS_PER_CONNECTION = 4
# A connection that the server closed while idle breaks at once when it is used. Later breaks were of live requests,
# which may have been executed and charged for: they are not sent twice.
STALE_S = 1.0
MOST_DESTINATIONS = 1024


class OpenAIProvider:
    """One backend: its connections, slots and key. Make it on the running loop, close it after its last request."""

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
        https = self._base_url is not None and self._base_url.lower().startswith("https:")
        tls = AUTHORITIES.tls() if https else None
        self._connections = Connections(backend.name, connect_s=connect_s, keepalive_s=self.keepalive_s, tls=tls)
        self._destinations: dict[tuple[str, str | None], Destination] = {}

    def send(self, path: str, body: bytes, headers: Mapping[str, str], *, base_url: str | None = None) -> Sending:
        """See `Provider.send`."""
        return Sending(self, self._destination(path, base_url), body, lines_of(headers) if headers else b"")

    def straight(self, path: str, base_url: str | None = None) -> Straight | None:
        """How to POST there without these connections."""
        to = self._destination(path, base_url)
        if to.url.host is None or to.url.port is None:
            return None
        tls = AUTHORITIES.tls() if to.url.scheme == "https" else None
        return Straight(to.url.host, to.url.port, to.head, self.keepalive_s, tls)

    async def close(self) -> None:
        """Close all connections; what is in flight breaks."""
        await self._connections.close()

    def _destination(self, path: str, base_url: str | None) -> Destination:
        """Parsing a URL takes as long as authenticating does, and there are few of them."""
        known = self._destinations.get((path, base_url))
        if known is None:
            if len(self._destinations) >= MOST_DESTINATIONS:
                self._destinations.clear()  # engines come and go, and each has its own address
            headers = dict(self._headers)
            if self._key is not None and base_url is None:
                headers["authorization"] = f"Bearer {self._key.reveal()}"
            url = _joined((base_url or self._base_url or "").rstrip("/"), path)
            known = self._destinations[path, base_url] = Destination.of(url, headers, self._loop)
        return known

    async def post(self, to: Destination, body: bytes, lines: bytes) -> HttpUpstream:
        """The answer's headers, from one connection or, where that one had gone stale, from another."""
        sent_s = self._loop.time()
        try:
            return await self._connections.post(to, lines, body)
        except Broken:
            if self._loop.time() - sent_s >= STALE_S:
                raise
        return await self._connections.post(to, lines, body)


class Sending:
    """One request on its way: from a free slot to the last byte of its answer, as `async with`.

    A class, since the generator that `asynccontextmanager` wants costs as much again as all that is done here.
    """

    __slots__ = ("_body", "_lines", "_provider", "_to", "_upstream")

    def __init__(self, provider: OpenAIProvider, to: Destination, body: bytes, lines: bytes) -> None:
        self._provider = provider
        self._to = to
        self._body = body
        self._lines = lines

    async def __aenter__(self) -> HttpUpstream:
        slots = self._provider.slots
        if slots is not None and not slots.take_now():
            await slots.take(SLOT_WAIT_S)
        try:
            self._upstream = await self._provider.post(self._to, self._body, self._lines)
        except BaseException:
            self._give()
            raise
        return self._upstream

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._upstream.end()
        self._give()

    def _give(self) -> None:
        if self._provider.slots is not None:
            self._provider.slots.give()


def _joined(base: str, path: str) -> URL:
    if base.endswith("/v1") and path.startswith("/v1/"):
        path = path[3:]  # both ways of writing a base URL are common
    return URL(base + path, encoded=True)
