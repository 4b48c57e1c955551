"""What the service manager gives the keeper and is told by it: sd_notify, sd_listen_fds and sd_watchdog of systemd.

Without a service manager nothing here does anything. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Collection

from scheduler.engines.keeper_sockets import Listener, say

FIRST_PASSED = 3  # descriptor; fixed by the protocol
VARIABLES = ("NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID", "WATCHDOG_USEC")


def notify(*words: str) -> None:
    """Tell it, if it asked to be told (Type=notify). One that does not listen delays nothing."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.setblocking(False)
        try:
            sock.sendto("\n".join(words).encode(), "\0" + address[1:] if address[0] == "@" else address)
        except OSError as error:
            say(f"systemd did not take {words[0]}: {error}")


def reloading() -> None:
    """The configuration is being read again, until READY=1."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


def watchdog_limit_s() -> float | None:
    """How long it waits for a sign of life before it ends us all; None: for ever."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    with contextlib.suppress(ValueError):
        return int(os.environ["WATCHDOG_USEC"]) / 1e6 if os.environ.get("WATCHDOG_USEC") else None
    return None


def passed_names() -> list[str]:
    """The names of the listening sockets that it opened for this very process, in their order."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = int(os.environ.get("LISTEN_FDS") or 0)
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    return [names[index] if index < len(names) and names[index] else "unknown" for index in range(count)]


def passed(wanted: Collection[str]) -> list[Listener]:
    """Those sockets. Raises ValueError for one that has none of the `wanted` names, or is no TCP listener."""
    return [(_fit(name, wanted), _listener(FIRST_PASSED + index, name)) for index, name in enumerate(passed_names())]


def _fit(name: str, wanted: Collection[str]) -> str:
    if name not in wanted:
        known = " or ".join(f"FileDescriptorName={each}" for each in wanted)
        raise ValueError(f"systemd passed a socket named {name!r}; set {known} in its .socket unit")
    return name


def _listener(descriptor: int, name: str) -> socket.socket:
    try:
        sock = socket.socket(fileno=descriptor)
    except OSError as error:
        raise ValueError(f"systemd's socket {name!r} is none: {error.strerror}") from None
    tcp = sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM
    if not tcp or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ValueError(f"systemd's socket {name!r} does not listen on TCP; set ListenStream=HOST:PORT, Accept=no")
    sock.set_inheritable(False)
    return sock
