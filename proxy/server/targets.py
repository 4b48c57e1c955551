"""Where the fast lane can send at once: numeric addresses, their pools, and the heads of requests made once."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl

import msgspec

from ext.relay import Pool
from proxy.providers.base import Provider, Straight

RESOLVED_S = 30.0  # how long a name's address is used before it is asked for again, in the background
MOST = 1024  # of anything that is kept here


class Addresses:
    """Numeric addresses of host names. Never waits: a name that is not known yet is looked up for the next who asks."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._known: dict[str, tuple[str, float]] = {}
        self._asked: dict[str, asyncio.Task[None]] = {}

    def find(self, host: str) -> str | None:
        """The address; None if nothing is known of it yet."""
        if is_numeric(host):
            return host
        address, until_s = self._known.get(host, (None, 0.0))
        if self._loop.time() >= until_s and host not in self._asked:
            self._asked[host] = self._loop.create_task(self._look_up(host), name=f"resolve {host}")
        return address

    def close(self) -> None:
        """End the look-ups under way."""
        for task in self._asked.values():
            task.cancel()

    async def _look_up(self, host: str) -> None:
        try:
            found = await self._loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            # IPv4 first: a server on `localhost` often listens on that alone, and there is no second try here.
            found.sort(key=lambda each: each[0] != socket.AF_INET)
            if len(self._known) >= MOST:
                self._known.clear()
            self._known[host] = str(found[0][4][0]), self._loop.time() + RESOLVED_S
        except OSError:
            self._known.pop(host, None)  # the ordinary lane asks again, and tells the client
        finally:
            del self._asked[host]


def is_numeric(host: str) -> bool:
    """Whether this is an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class Target(msgspec.Struct):
    """One way to send. `pool` is None where a host name stands for addresses that may change (`Targets.resolved`)."""

    straight: Straight
    pool: Pool | None


class Targets:
    """Ways to send, by provider, path and lease. Pools outlive a reload, the rest is forgotten at one."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._addresses = Addresses(loop)
        self._pools: dict[tuple[str, int, float, ssl.SSLContext | None, str], Pool] = {}
        self._made: dict[tuple[Provider, str, str | None], Target | None] = {}

    def find(self, provider: Provider, path: str, base_url: str | None) -> Target | None:
        """How to send there; None if this is not for the fast lane."""
        key = (provider, path, base_url)
        try:
            return self._made[key]
        except KeyError:
            target = self._made[key] = self._make(provider.straight(path, base_url))
            return target

    def resolved(self, straight: Straight) -> Pool | None:
        """The pool of a host name's address; None while that is looked up."""
        address = self._addresses.find(straight.host)
        return None if address is None else self._pool(address, straight)

    def forget(self) -> None:
        """The configuration has changed."""
        self._made.clear()

    def close(self) -> None:
        """End what is under way."""
        self._addresses.close()

    def _make(self, straight: Straight | None) -> Target | None:
        if len(self._made) >= MOST:
            self._made.clear()  # engines come and go, and each has its own address
        if straight is None:
            return None
        pool = self._pool(straight.host, straight) if is_numeric(straight.host) else None
        return Target(straight, pool)

    def _pool(self, address: str, straight: Straight) -> Pool:
        # Two names at one address are two servers to TLS: what the one's certificate allows is not said to the other.
        name = "" if straight.tls is None else straight.host.rstrip(".")
        key = (address, straight.port, straight.keepalive_s, straight.tls, name)
        pool = self._pools.get(key)
        if pool is None:
            if len(self._pools) >= MOST:
                self._pools = {each: kept for each, kept in self._pools.items() if kept.idle}
            pool = self._pools[key] = Pool(*key)
        return pool
