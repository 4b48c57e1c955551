"""Reading a request's body within its limits of size, time and kind."""

from __future__ import annotations

import asyncio

from aiohttp import web
from aiohttp.web_protocol import RequestPayloadError

from proxy.errors import InvalidRequest, RequestTimedOut, TooLarge, UnsupportedMediaType

CODINGS = frozenset({"", "identity", "gzip", "deflate"})  # what aiohttp undoes while it reads, counting what comes out


async def read_body(request: web.BaseRequest, max_bytes: int, timeout_s: float) -> bytes:
    """The body, decompressed. Raises 400, 408, 413 or 415; an over-long body is refused before it is read.

    A body that came in one packet with its headers, as small ones do, is taken without waiting or a timer.
    """
    _check_headers(request, max_bytes)
    content = request.content
    if content.is_eof():
        return _checked(content.read_nowait(), max_bytes)
    if request.headers.get("expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # an interim answer is not the answer
    try:
        async with asyncio.timeout(timeout_s):
            return await _read_all(request, max_bytes)
    except TimeoutError:
        raise RequestTimedOut(f"The body did not arrive in {timeout_s:g} s ([timeouts] read_body_s).") from None
    except RequestPayloadError as error:
        why = str(error).rpartition("\n")[2].strip().rstrip(".")
        raise InvalidRequest(f"The body cannot be read: {why}.") from None


def _check_headers(request: web.BaseRequest, max_bytes: int) -> None:
    length = request.content_length
    if length is not None and length > max_bytes:
        raise _too_large(max_bytes)
    # Exactly JSON, and never nothing: a page in a browser can send any other kind across origins without asking.
    if request.content_type != "application/json":
        raise UnsupportedMediaType("The body must be JSON: send 'Content-Type: application/json'.")
    coding = request.headers.get("content-encoding", "").lower()
    if coding not in CODINGS:
        raise UnsupportedMediaType(f"Content-Encoding {coding[:50]!r} is not understood: send gzip, deflate or none.")


async def _read_all(request: web.BaseRequest, max_bytes: int) -> bytes:
    body = bytearray()
    while chunk := await request.content.readany():
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(body)


def _checked(body: bytes, max_bytes: int) -> bytes:
    if len(body) > max_bytes:
        raise _too_large(max_bytes)
    return body


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"The body is larger than {max_bytes} bytes ([limits] max_body).")
