"""What the keeper waits on: packet sockets, signals and timers, in one thread and with the standard library only."""

from __future__ import annotations

import heapq
import itertools
import json
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

Message = dict[str, Any]

PACKET_LIMIT = 1 << 17  # bytes of one message; the kernel's default socket buffer takes more than that


class Loop:
    """A selector with timers and signals. A signal is handled between two turns, never inside one."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._signals: tuple[socket.socket, ...] = ()

    def close(self) -> None:
        """Give everything back; signals are no longer heard."""
        if self._signals:
            signal.set_wakeup_fd(-1)
        for sock in self._signals:
            sock.close()
        self.selector.close()

    def turn(self) -> None:
        """Wait for the next socket, signal or timer, and call what belongs to it."""
        wait_s = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
        for key, ready in self.selector.select(wait_s):
            key.data(ready)
        while self._timers and self._timers[0][0] <= time.monotonic():
            heapq.heappop(self._timers)[2]()

    def after(self, delay_s: float, call: Callable[[], None]) -> None:
        """Call once, later."""
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._order), call))

    def on_signals(self, handlers: Mapping[int, Callable[[], None]]) -> None:
        """From now on these signals call their handlers, in the order in which they came."""
        receiver, sender = socket.socketpair()
        receiver.setblocking(False)
        sender.setblocking(False)
        signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        for number in handlers:
            signal.signal(number, lambda *_: None)

        def came(_: int) -> None:
            for number in receiver.recv(4096):
                if number in handlers:
                    handlers[number]()

        self._signals = (receiver, sender)  # held: the signal machinery knows the sender by its number only
        self.selector.register(receiver, selectors.EVENT_READ, came)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handlers)  # `vramp serve` has us start with a stop held back


class Channel:
    """Our end of a packet socket, one JSON message a packet.

    Sends never block: what the other side does not take yet waits in `_outbox`, which stays small because it holds
    only answers to that side's requests and one line for each child's end. `say` is told of what makes no sense.
    """

    def __init__(
        self, loop: Loop, sock: socket.socket, hear: Callable[[Message], None], say: Callable[[str], None]
    ) -> None:
        self._loop, self._sock, self._hear, self._say = loop, sock, hear, say
        self._outbox: deque[bytes] = deque()
        sock.setblocking(False)
        loop.selector.register(sock, selectors.EVENT_READ, self._turn)

    @property
    def is_open(self) -> bool:
        """Whether the other side may still hear us."""
        return self._sock.fileno() >= 0

    def send(self, message: Message) -> bool:
        """Queue one message, answered to the other side as failed when it is too long. False: that side has gone."""
        packet = json.dumps(message).encode()
        if len(packet) > PACKET_LIMIT:
            self._say(f"a message of {len(packet)} bytes is longer than {PACKET_LIMIT}")
            packet = json.dumps({"op": "failed", "id": message.get("id"), "reason": "the answer is too long"}).encode()
        if not self.is_open:
            return False
        self._outbox.append(packet)
        return self._flush()

    def drain(self) -> None:
        """Hear what was sent before the other side went."""
        while self.is_open and self._receive():
            pass

    def close(self) -> None:
        """Give the socket back; further sends are lost. May be called again."""
        if self.is_open:
            self._loop.selector.unregister(self._sock)
            self._sock.close()

    def _turn(self, ready: int) -> None:
        if self.is_open and ready & selectors.EVENT_WRITE:
            self._flush()
        if self.is_open and ready & selectors.EVENT_READ:
            self._receive()

    def _receive(self) -> bool:
        try:
            packet = self._sock.recv(2 * PACKET_LIMIT)
        except BlockingIOError:
            return False
        except OSError:
            packet = b""
        if not packet:
            self.close()
            return False
        try:
            self._hear(json.loads(packet))
        except (ValueError, TypeError, LookupError) as error:
            # Whoever sends nonsense is wrong; whoever dies of it takes every engine with it.
            self._say(f"refused a message that makes no sense ({error!r}): {packet[:200]!r}")
        return True

    def _flush(self) -> bool:
        has_gone = False
        try:
            while self._outbox:
                self._sock.send(self._outbox[0])
                self._outbox.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self._outbox.clear()
            has_gone = True  # what follows from it follows when SIGCHLD tells of its end, not here
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outbox else 0)
        self._loop.selector.modify(self._sock, wanted, self._turn)
        return not has_gone
