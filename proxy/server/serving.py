"""What serves clients: the handler and its lanes, providers, the access log; under one configuration after another."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ext.rate_counters import RateCounters
from proxy.accounting.usage import UsageLog
from proxy.catalog.catalog import Catalog, Deployment
from proxy.config import Config, ServerConfig
from proxy.config_secrets import ResolvedSecrets
from proxy.gate.keys import Keys
from proxy.observe.access_log import AccessLog
from proxy.observe.metrics import Metrics
from proxy.providers.base import Provider
from proxy.providers.openai import OpenAIProvider
from proxy.providers.tls import AUTHORITIES
from proxy.server import http
from proxy.server.handler import Handler
from proxy.server.journey import Leases
from proxy.server.state import State
from proxy.server.trim import Trimmer, malloc_trim
from proxy.tls import Tls

log = logging.getLogger("vramp.server")


class Front(Protocol):
    """The public side, as the proxy sees it."""

    @property
    def in_flight(self) -> int:
        """Requests that are being answered."""
        ...

    @property
    def ready(self) -> bool:
        """Whether new requests are welcome."""
        ...

    async def start(self, sockets: Sequence[socket.socket]) -> None:
        """Serve on these listening sockets, which stay the caller's."""
        ...

    def configure(self, config: Config, secrets: ResolvedSecrets) -> None:
        """New requests follow this configuration; those in flight keep the one they began with."""
        ...

    def reopen_logs(self) -> None:
        """Open the access log and the usage rows anew, after logrotate moved them."""
        ...

    async def drain(self, timeout_s: float) -> bool:
        """Let what is in flight finish; True when all of it did in time. See `http.Server.drain`."""
        ...

    def stop_accepting(self) -> None:
        """Leave new connections to another process. See `http.Server.stop_accepting`."""
        ...

    async def finish(self) -> None:
        """After `stop_accepting`: return when nothing is in flight, or is for longer than a request may."""
        ...

    async def close(self) -> None:
        """Cut off what is left, and close everything."""
        ...


class Serving:
    """The `Front` of a process that serves by itself, or of a worker. Made inside the running loop.

    What `counters` have counted of the limits outlives each configuration.
    """

    def __init__(
        self,
        config: Config,
        secrets: ResolvedSecrets,
        leases: Leases,
        metrics: Metrics,
        *,
        counters: RateCounters,
        residency: Callable[[Deployment], str],
    ) -> None:
        self._config = config
        self._counters = counters
        self._access_log = AccessLog(config.observe.access_log)
        self._usage = UsageLog(_usage_file(config))
        metrics.usage_rows = self._usage.rows
        self._providers = _providers_of(config, secrets)
        self._retiring: dict[asyncio.Task[None], Mapping[str, Provider]] = {}  # of configurations before this one
        self._server: http.Server | None = None
        self._tls: Tls | None = None
        self._handler = Handler(
            self._state(config, secrets, self._providers),
            leases,
            metrics,
            self._access_log,
            self._usage,
            residency=residency,
        )
        trim = malloc_trim()
        self._trimmer = Trimmer(lambda: self.in_flight, trim) if trim is not None else None

    @property
    def in_flight(self) -> int:
        """Requests that are being answered."""
        return self._handler.in_flight

    @property
    def ready(self) -> bool:
        """Whether new requests are welcome."""
        return self._handler.ready

    async def start(self, sockets: Sequence[socket.socket], *, shared: bool = False) -> None:
        """See `Front`. `shared`: other processes accept from the same sockets."""
        limits = http.Limits(
            write_stall_s=self._config.timeouts.write_stall_s,
            shared=shared,
        )
        server = self._config.server
        self._tls = Tls(server) if server.tls_cert else None
        tls = self._tls.context if self._tls is not None else None
        self._server = await http.start(self._handler, sockets, limits, fast=server.fast_lane, tls=tls)
        if self._trimmer is not None:
            self._trimmer.start()

    def configure(self, config: Config, secrets: ResolvedSecrets) -> None:
        """New requests follow this configuration; those in flight keep the one they began with. Raises OverflowError,
        and has changed nothing, where `counters` have no room for its limits."""
        AUTHORITIES.read_again()
        providers = _providers_of(config, secrets)
        self._handler.configure(self._state(config, secrets, providers))
        self._retire(self._providers, self._config.timeouts.total_s)
        self._config, self._providers = config, providers
        self._renew(config.server)

    def _renew(self, server: ServerConfig) -> None:
        """Certificates may have been renewed."""
        if self._server is None or (self._tls is None) != (server.tls_cert is None):
            return  # to begin or to end TLS takes a restart
        try:
            if self._tls is not None:
                self._tls.load(server)
        except OSError as error:
            log.error("server.tls_cert: the certificate before stays in use: %s", error)

    def reopen_logs(self) -> None:
        """Open the access log and the usage rows anew, after logrotate moved them."""
        self._access_log.reopen()
        self._usage.reopen()

    async def drain(self, timeout_s: float) -> bool:
        """Let what is in flight finish; True when all of it did in time. See `http.Server.drain`."""
        if self._server is None:
            return True
        log.info("draining: %d requests in flight", self.in_flight)
        drained = await self._server.drain(timeout_s)
        if not drained:
            log.warning("%d requests were cut off after %g s", self.in_flight, timeout_s)
        return drained

    def stop_accepting(self) -> None:
        """See `Front`."""
        if self._server is not None:
            self._server.stop_accepting()

    async def finish(self) -> None:
        """See `Front`."""
        if self._server is not None:
            await self._server.finish(self._config.timeouts.total_s)

    async def close(self) -> None:
        """Cut off what is left, and close everything."""
        if self._trimmer is not None:
            self._trimmer.stop()
        if self._server is not None:
            await self._server.close()
        await self._access_log.close()
        await self._usage.close()
        for task in self._retiring:
            task.cancel()
        for providers in (*self._retiring.values(), self._providers):
            await _close(providers)

    def _state(self, config: Config, secrets: ResolvedSecrets, providers: Mapping[str, Provider]) -> State:
        return State.of(config, Catalog(config), Keys(secrets.api_keys), providers, self._counters)

    def _retire(self, providers: Mapping[str, Provider], total_s: float) -> None:
        """Close the old pools once nothing that uses them can be in flight any more: requests have the time of the
        configuration that they began with."""

        async def later() -> None:
            await asyncio.sleep(total_s)
            await _close(providers)

        task = asyncio.create_task(later())
        self._retiring[task] = providers
        task.add_done_callback(self._retiring.pop)


async def _close(providers: Mapping[str, Provider]) -> None:
    for provider in providers.values():
        await provider.close()


def _providers_of(config: Config, secrets: ResolvedSecrets) -> dict[str, Provider]:
    return {
        backend.name: OpenAIProvider(
            backend, secrets.backend_keys.get(backend.name), connect_s=config.timeouts.connect_s
        )
        for backend in config.backends
    }


def _usage_file(config: Config) -> str:
    usage = config.store.usage
    return usage if usage == "off" else str(Path(config.store.dir, usage))
