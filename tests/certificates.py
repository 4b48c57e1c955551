"""Certificates made on the spot, and a TLS server whose every byte on the wire is in a test's hand."""

from __future__ import annotations

import asyncio
import re
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from proxy.config import ServerConfig

Result = TypeVar("Result")
MOST = 1 << 17  # bytes of an answer that are sealed before the first of them is sent


class Pair(NamedTuple):
    cert: Path
    key: Path

    def server(self, **other: Any) -> ServerConfig:
        return ServerConfig(tls_cert=str(self.cert), tls_key=str(self.key), **other)

    def context(self, **settings: Any) -> ssl.SSLContext:
        """For a server."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.cert, self.key)
        for name, value in settings.items():
            setattr(context, name, value)
        return context


def make_pair(folder: Path, *options: str, names: str = "DNS:localhost,IP:127.0.0.1") -> Pair:
    """A certificate for localhost, or for these names, made here: one day long, signed by itself."""
    pair = Pair(folder / "cert.pem", folder / "key.pem")
    folder.mkdir(exist_ok=True)
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "1"]
    command += ["-subj", "/CN=localhost", "-addext", f"subjectAltName={names}"]
    command += ["-out", str(pair.cert), "-keyout", str(pair.key), *(options or ("-noenc",))]
    subprocess.run(command, check=True, capture_output=True)
    pair.key.chmod(0o600)
    return pair


def expire(pair: Pair) -> None:
    """Let the certificate be one of yesterday."""
    command = ["openssl", "x509", "-in", str(pair.cert), "-signkey", str(pair.key), "-days", "-1"]
    subprocess.run([*command, "-out", str(pair.cert)], check=True, capture_output=True)


class SealedUpstream:
    """Answers every request over TLS: `answer` in records of `record` bytes, on the wire `piece` bytes at a time."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.context = context
        self.context.sni_callback = lambda _, name, __: self.names.append(name)
        self.answer = b""
        self.record = 16 << 10
        self.piece = 1 << 20
        self.ends = ""  # after an answer: "" not at all, "tls" as TLS demands, "tcp" without that
        self.garble = 0  # which byte of an answer's sealed ones is another
        self.written = 0  # bytes on the wire
        self.names: list[str | None] = []
        self.resumed: list[bool] = []
        self.requests: list[bytes] = []
        self.parted = 0  # connections that were ended as TLS demands
        self.gone = asyncio.Event()
        self.base_url = ""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[SealedUpstream]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.base_url = "https://{}:{}".format(*server.sockets[0].getsockname())
        yield self
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await Sealed(self, reader, writer).serve()
        except (ssl.SSLError, ConnectionError):
            pass
        finally:
            self.gone.set()
            writer.close()


class Sealed:
    """One connection of such a server."""

    def __init__(self, upstream: SealedUpstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.upstream, self.reader, self.writer = upstream, reader, writer
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = upstream.context.wrap_bio(self.incoming, self.outgoing, server_side=True)

    async def serve(self) -> None:
        upstream = self.upstream
        await self.step(self.tls.do_handshake)
        upstream.resumed.append(bool(self.tls.session_reused))
        while request := await self.request():
            upstream.requests.append(request)
            await self.say(upstream.answer)
            if upstream.ends == "tls":
                await self.step(self.tls.unwrap)
            if upstream.ends:
                return
        upstream.parted += 1

    async def request(self) -> bytes:
        """The next request's body; empty when there is none any more."""
        data = b""
        while b"\r\n\r\n" not in data:
            more = await self.step(lambda: self.tls.read(65536))
            if not more:
                return b""
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])  # type: ignore[index]
        while len(body) < length:
            body += await self.step(lambda: self.tls.read(65536))
        return body

    async def step(self, action: Callable[[], Result]) -> Result:
        while True:
            try:
                result = action()
            except ssl.SSLWantReadError:
                await self.flush()
                data = await self.reader.read(65536)
                if not data:
                    raise ConnectionResetError from None
                self.incoming.write(data)
            except ssl.SSLError:
                await self.flush()  # the alert
                raise
            else:
                await self.flush()
                return result

    async def say(self, answer: bytes) -> None:
        upstream, ends = self.upstream, len(answer)
        for at in range(0, ends, MOST):
            for record in range(at, min(at + MOST, ends), upstream.record):
                self.tls.write(answer[record : min(record + upstream.record, at + MOST)])
            await self.flush(upstream.garble)

    async def flush(self, garble: int = 0) -> None:
        data = bytearray(self.outgoing.read())
        if garble:
            data[garble] ^= 1
        for at in range(0, len(data), self.upstream.piece):
            self.writer.write(data[at : at + self.upstream.piece])
            await self.writer.drain()
            self.upstream.written += min(self.upstream.piece, len(data) - at)
            await asyncio.sleep(0)
