"""How the keeper meets the world: listening sockets, lines on stderr. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
from typing import Any

BACKLOG = 4096
NO_SUCH_FAMILY = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

Listener = tuple[str, socket.socket]


def bind(name: str, address: str) -> list[Listener]:
    """Listening sockets for HOST:PORT, one for each address that HOST stands for. Raises OSError or ValueError.

    A name such as localhost may stand for an address of a family that this machine lacks: skipped if another is there.
    """
    host, _, port = address.rpartition(":")
    if not (port.isascii() and port.isdigit() and int(port) < 1 << 16):  # the C library would take it modulo 65536
        raise ValueError(f"the port is {port!r}; use 0 to 65535")
    found = socket.getaddrinfo(host.strip("[]") or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    listeners: list[Listener] = []
    skipped: OSError | None = None
    for family, _, _, _, where in found:
        try:
            listeners.append((name, _listener(family, where)))
        except OSError as error:
            if error.errno not in NO_SUCH_FAMILY:
                raise
            skipped = error
    if not listeners and skipped is not None:
        raise skipped
    return listeners


def bind_all(wanted: dict[str, list[str]]) -> list[Listener]:
    """All listening sockets, or SystemExit(2) after a line that names the address."""
    listeners = []
    for name, addresses in wanted.items():
        for address in addresses:
            try:
                listeners += bind(name, address)
            except (OSError, ValueError) as error:
                say(f"cannot listen on {address}: {getattr(error, 'strerror', None) or error}")
                sys.exit(2)
    return listeners


def say(text: str) -> None:
    """One line on stderr; a keeper whose terminal has gone goes on."""
    with contextlib.suppress(OSError):
        print(f"vramp keeper: {text}", file=sys.stderr, flush=True)


def ended(status: int) -> str:
    """A process' end in words."""
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


def _listener(family: int, where: Any) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(where)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock
