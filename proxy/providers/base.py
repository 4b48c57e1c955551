"""What the journey needs of whatever answers: an engine of ours or somebody else's server."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Protocol

import msgspec

if TYPE_CHECKING:
    from proxy.providers.slots import Slots


class Straight(msgspec.Struct, frozen=True):
    """Where a request goes over a socket. `head` lacks the content length, what is forwarded, and the empty line.

    `tls` is None for plain TCP; else the certificate there is to be for `host`.
    """

    host: str
    port: int
    head: bytes
    keepalive_s: float
    tls: ssl.SSLContext | None = None


class Upstream(Protocol):
    """An answer whose headers have come. Leaving its context before the end cancels the work upstream."""

    @property
    def status(self) -> int:
        """The HTTP status."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers, names in any case."""
        ...

    def arrived(self) -> bytes | None:
        """The whole body, if it is here already, as short ones are; asked for at most once, and instead of `chunks`."""
        ...

    def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes. Nothing is read ahead of the consumer beyond a fixed buffer. Raises `Broken`."""
        ...


class Provider(Protocol):
    """One dialect of the outside world. It knows nothing of the scheduler, of clients or of routing."""

    @property
    def slots(self) -> Slots | None:
        """What bounds the requests at once; None where leases do."""
        ...

    def send(
        self, path: str, body: bytes, headers: Mapping[str, str], *, base_url: str | None = None
    ) -> AbstractAsyncContextManager[Upstream]:
        """POST the body. `base_url` is the lease's for a local engine, None for the backend's own.

        Raises `Unreachable` when nothing can have been executed, `Broken` when that is not known.
        """
        ...

    def straight(self, path: str, base_url: str | None = None) -> Straight | None:
        """How to POST there over a socket of one's own; None where that cannot be."""
        ...

    async def close(self) -> None:
        """Close all connections; what is in flight breaks."""
        ...


class Unreachable(Exception):
    """No connection, or no free slot in time: the request was not executed."""


class Broken(Exception):
    """The connection ended before the answer did. What had been sent may have been executed."""
