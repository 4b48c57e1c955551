"""The proxy's end of the keeper's socket, on the event loop.

Requests: `spawn`, `signal`, `list`, `launcher` (each with an `id`, each answered once: `spawned`, `done`, `listed`,
`launcher` or `failed`) and `take_over` (answered `taken_over`), and the words `alive` (every `ALIVE_EVERY_S`), `ready`,
`reloaded` and `stop` that need no answer. Unasked come `exited` (an engine has ended and no process of it is left) and
`launcher` (its state changed). Ids carry our pid, so that an answer meant for a proxy that crashed is never taken for
one of ours.

Of an upgrade (`scheduler.engines.keeper_proxies`) come `hand_over`, to be answered by `handed`, and `go_on`, when it is
called off. `peer` carries a message from the one proxy to the other, and `left` says that the other has ended.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal as signals
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

LOG = logging.getLogger(__name__)
PACKET_LIMIT = 1 << 17
ALIVE_EVERY_S = 2.0


class KeeperError(Exception):
    """The keeper could not do it; its own words."""


class KeeperGone(KeeperError):
    """The keeper's end is closed: whoever sees this is an orphan and about to exit."""


class Spawned(msgspec.Struct, frozen=True):
    """An engine was started. `why` tells why it was not warm although that was asked for."""

    pid: int
    warm: bool = False
    why: str | None = None


class Living(msgspec.Struct, frozen=True):
    """An engine that the keeper has. `meta` is what its `spawn` gave, `started_s` is Unix time."""

    tag: str
    pid: int
    meta: dict[str, Any]
    started_s: float


class Exited(msgspec.Struct, frozen=True):
    """An engine has ended, its last process included. `status`: exit code, or minus the signal's number."""

    tag: str
    pid: int
    status: int
    meta: dict[str, Any] = {}


class LauncherState(msgspec.Struct, frozen=True):
    """A warm launcher: `state` is starting, ready, ended (it died), or unusable (trying again cannot help)."""

    name: str
    state: str
    reason: str = ""
    pid: int | None = None


class Listing(msgspec.Struct, frozen=True):
    """What the keeper has now."""

    engines: list[Living]
    launchers: list[LauncherState]


class KeeperLink:
    """Talks to the keeper. One per proxy, made inside the running loop that it then belongs to.

    `on_exit` and the others may be set at any time and are called on the loop. `on_lost` is called once when the
    keeper's end closes; unless replaced it ends this process at once, for its engines and sockets have no owner.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.on_exit: Callable[[Exited], None] = lambda _: None
        self.on_launcher: Callable[[LauncherState], None] = lambda _: None
        self.on_lost: Callable[[], None] = _exit_as_orphan
        self.on_hand_over: Callable[[], None] = lambda: None
        self.on_go_on: Callable[[], None] = lambda: None
        self.on_peer: Callable[[dict[str, Any]], None] = lambda _: None
        self.on_left: Callable[[], None] = lambda: None
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._pending: dict[str, asyncio.Future[Any]] = {}
        self._outbox: deque[bytes] = deque()
        self._pulse: asyncio.TimerHandle | None = None
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._receive)
        self._beat()

    @classmethod
    def from_environment(cls) -> KeeperLink:
        """The link that the keeper left open for us (VRAMP_KEEPER_FD). Raises KeyError outside a keeper."""
        descriptor = int(os.environ.pop("VRAMP_KEEPER_FD"))
        os.set_inheritable(descriptor, False)
        return cls(socket.socket(fileno=descriptor))

    async def spawn(
        self,
        tag: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        *,
        cwd: str | None = None,
        log: str,
        meta: Mapping[str, Any],
        launcher: str | None = None,
    ) -> Spawned:
        """Start an engine, by a fork of this launcher if it is named and ready. Raises KeeperError."""
        order = {"tag": tag, "argv": list(argv), "env": dict(env), "cwd": cwd, "log": log, "meta": dict(meta)}
        answer = await self._ask("spawn", {**order, "warm": launcher is not None, "launcher": launcher})
        return msgspec.convert(answer, Spawned)

    async def signal(self, tag: str, number: int) -> None:
        """Signal the engine's process group. Raises KeeperError when there is no such engine."""
        await self._ask("signal", {"tag": tag, "sig": int(number)})

    async def list(self) -> Listing:
        """What lives: after a restart, the engines of the proxy before us."""
        return msgspec.convert(await self._ask("list", {}), Listing)

    async def launcher(self, name: str, argv: Sequence[str], env: Mapping[str, str], log: str) -> LauncherState:
        """Start the warm launcher if it does not live yet; its further states come by `on_launcher`."""
        order = {"name": name, "argv": list(argv), "env": dict(env), "log": log}
        return msgspec.convert(await self._ask("launcher", order), LauncherState)

    async def take_over(self, protocol: int) -> Any:
        """What the proxy before us hands over, once it does: what it gave to `handed`. None when there is none, which
        is known at once. `protocol`: two that speak different ones are not joined."""
        return (await self._ask("take_over", {"protocol": protocol}))["handed"]

    def handed(self, what: Any) -> None:
        """We decide no more: the answer to `on_hand_over`, after all that the other proxy is to hear first."""
        self._send({"op": "handed", "handed": what})

    def peer(self, body: dict[str, Any]) -> None:
        """To the other proxy; lost when there is none."""
        self._send({"op": "peer", "body": body})

    def ready(self) -> None:
        """The proxy serves (and systemd is told)."""
        self._send({"op": "ready"})

    def reloaded(self, note: str) -> None:
        """The configuration was read again; `note` says with what success (systemd shows it)."""
        self._send({"op": "reloaded", "note": note})

    def stop(self) -> None:
        """Ask for a full stop: SIGTERM to us, then to the engines."""
        self._send({"op": "stop"})

    def close(self) -> None:
        """Let go of the socket; whoever waits gets KeeperGone. May be called again."""
        if self._sock.fileno() < 0:
            return
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        if self._pulse is not None:
            self._pulse.cancel()
        for future in self._pending.values():
            if not future.done():
                future.set_exception(KeeperGone("the keeper has gone"))
        self._pending.clear()

    def _beat(self) -> None:
        """Our loop turns. From a timer of that loop, so that it is not said when it does not."""
        if not self._outbox:  # a keeper that takes nothing need not be told again
            self._send({"op": "alive"})
        self._pulse = self._loop.call_later(ALIVE_EVERY_S, self._beat)

    async def _ask(self, op: str, message: Mapping[str, Any]) -> dict[str, Any]:
        number = f"{os.getpid()}-{next(self._numbers)}"
        future = self._pending[number] = self._loop.create_future()
        try:
            self._send({"op": op, "id": number, **message})
            answer: dict[str, Any] = await future
        finally:
            self._pending.pop(number, None)
        if answer["op"] == "failed":
            raise KeeperError(answer["reason"])
        return answer

    def _send(self, message: Mapping[str, Any]) -> None:
        packet = msgspec.json.encode(message)
        if len(packet) > PACKET_LIMIT:
            raise KeeperError(
                f"a request of {len(packet)} bytes is longer than {PACKET_LIMIT}; is an `env` that large?"
            )
        if self._sock.fileno() < 0:
            raise KeeperGone("the keeper has gone")
        self._outbox.append(packet)
        self._flush()

    def _flush(self) -> None:
        try:
            while self._outbox:
                self._sock.send(self._outbox[0])
                self._outbox.popleft()
        except BlockingIOError:
            self._loop.add_writer(self._sock.fileno(), self._flush)
            return
        except OSError:
            self._outbox.clear()  # the reader is about to see the end
        self._loop.remove_writer(self._sock.fileno())

    def _receive(self) -> None:
        try:
            packet = self._sock.recv(2 * PACKET_LIMIT)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            packet = b""
        if packet:
            self._hear(msgspec.json.decode(packet))
        else:
            self.close()
            self.on_lost()

    def _hear(self, message: dict[str, Any]) -> None:
        future = self._pending.get(message.get("id", ""))
        if future is not None:
            if not future.done():
                future.set_result(message)
        elif message["op"] == "exited":
            self.on_exit(msgspec.convert(message, Exited))
        elif message["op"] == "launcher":
            self.on_launcher(msgspec.convert(message, LauncherState))
        elif message["op"] == "peer":
            self.on_peer(message["body"])
        elif message["op"] in (words := {"hand_over": self.on_hand_over, "go_on": self.on_go_on, "left": self.on_left}):
            words[message["op"]]()
        else:
            LOG.info("an answer that nobody waits for: %s", message)


def inherited_listeners() -> dict[str, list[socket.socket]]:
    """The listening sockets that the keeper opened, by name (http, admin); empty outside a keeper."""
    listeners: dict[str, list[socket.socket]] = {}
    for item in filter(None, os.environ.pop("VRAMP_LISTEN_FDS", "").split(",")):
        name, _, descriptor = item.partition("=")
        os.set_inheritable(int(descriptor), False)
        listeners.setdefault(name, []).append(socket.socket(fileno=int(descriptor)))
    return listeners


def _exit_as_orphan() -> None:
    LOG.critical("the keeper has gone: this process ends too")
    os._exit(128 + signals.SIGKILL)
