"""One end of the socket between the proxy and a worker: what is said in one turn of the loop goes in one write."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import msgspec

log = logging.getLogger("vramp.workers")

LENGTH_BYTES = 4
MOST_UNSENT = 64 << 20  # bytes; a peer that takes nothing is as good as gone long before

Heard = TypeVar("Heard")


class Channel(asyncio.Protocol, Generic[Heard]):
    """Sends messages of any kind, hears those of `kind`. `on_lost` is called once, when the other end has gone.

    Messages arrive whole and in order.
    """

    def __init__(self, kind: Any, hear: Callable[[Heard], None], on_lost: Callable[[], None]) -> None:
        self._hear = hear
        self._on_lost = on_lost
        self._decoder: msgspec.msgpack.Decoder[list[Heard]] = msgspec.msgpack.Decoder(list[kind])
        self._encoder = msgspec.msgpack.Encoder()
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._unsent: list[object] = []
        self._read = bytearray()

    async def open(self, connection: socket.socket) -> None:
        """Speak over this socket, which is ours from now on."""
        await self._loop.create_unix_connection(lambda: self, sock=connection)

    def send(self, message: object) -> None:
        """At the end of this turn of the loop. Silently nowhere once the other end has gone."""
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent.append(message)

    def close(self) -> None:
        """Send what is unsent, and end; `on_lost` is not called for that. Idempotent."""
        self._on_lost = lambda: None
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def _flush(self) -> None:
        messages, self._unsent = self._unsent, []
        if not messages or self._transport is None or self._transport.is_closing():
            return
        frame = self._encoder.encode(messages)
        self._transport.write(len(frame).to_bytes(LENGTH_BYTES, "big") + frame)
        if self._transport.get_write_buffer_size() > MOST_UNSENT:
            log.error("the other end takes nothing: giving it up")
            self._transport.abort()

    # ---- what the transport tells (`asyncio.Protocol`)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass of it

    def data_received(self, data: bytes) -> None:
        """Hear every message that is whole."""
        self._read += data
        begin = 0
        while (body := begin + LENGTH_BYTES) <= len(self._read):
            end = body + int.from_bytes(self._read[begin:body], "big")
            if end > len(self._read):
                break
            for message in self._decoder.decode(self._read[body:end]):
                try:
                    self._hear(message)
                except Exception:  # a bug of ours must not cost everything that the other end has under way
                    log.exception("a message could not be dealt with: %s", type(message).__name__)
            begin = end
        del self._read[:begin]

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._transport = None
        self._on_lost()
