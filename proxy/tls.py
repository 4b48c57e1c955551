"""TLS on the clients' listener: what is wrong with its files, and new ones without a dropped connection.

OpenSSL does the rest. The context stays the same for as long as we listen: connections keep the certificate with which
they began, and the next handshake sees the one that was loaded last.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from proxy.config import ServerConfig
from proxy.config_shape import Problem, show

CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
KEY = re.compile(rb"^-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----", re.MULTILINE)
ENCRYPTED = re.compile(rb"^(?:-----BEGIN |Proc-Type: 4,)ENCRYPTED", re.MULTILINE)
UTC_TIME = 0x17  # ASN.1 tag; the other kind of time is GeneralizedTime, 0x18
CONTEXT_0 = 0xA0


class Tls:
    """What a TLS listener needs. Raises OSError (ssl.SSLError is one) for files that `tls_problems` complains about."""

    def __init__(self, server: ServerConfig) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.set_alpn_protocols(["http/1.1"])
        self.load(server)

    def load(self, server: ServerConfig) -> None:
        """The next handshakes use these files; on an error, those before."""
        # Twice: a context into which loading has failed half-way holds one certificate and another's key.
        for context in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self.context):
            _load(context, server)


def tls_problems(server: ServerConfig) -> Iterator[Problem]:
    """What makes the files unusable. Reads them."""
    cert, key = server.tls_cert, server.tls_key
    if (cert is None) != (key is None):
        given, missing = ("tls_cert", "tls_key") if key is None else ("tls_key", "tls_cert")
        yield Problem(f"server.{missing}", f"is missing, and server.{given} is given; TLS needs both")
    if cert is None or key is None:
        return
    unfit = [*_cert_problems(cert), *_key_problems(key)]
    yield from unfit
    if unfit:
        return
    try:
        _load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), server)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            says = f"is {show(key)}, which is not the key of {cert}; name the two that belong together"
            yield Problem("server.tls_key", says)
        else:
            yield Problem("server.tls_cert", f"and tls_key cannot be used: {error.reason or error}; make them anew")


def tls_warnings(server: ServerConfig, now: datetime) -> Iterator[str]:
    """What is wrong with files that can be used: `tls_problems` has found nothing."""
    if server.tls_cert is None or server.tls_key is None:
        return
    begins, ends = validity(Path(server.tls_cert).read_bytes())
    if now > ends:
        yield f"server.tls_cert is {show(server.tls_cert)}, which expired on {ends:%Y-%m-%d}; renew it"
    elif now < begins:
        yield f"server.tls_cert is {show(server.tls_cert)}, which is not valid before {begins:%Y-%m-%d %H:%M} UTC"
    if Path(server.tls_key).stat().st_mode & 0o004:
        yield f"server.tls_key: everyone on this machine can read {server.tls_key}; chmod 600 {server.tls_key}"


def validity(pem: bytes) -> tuple[datetime, datetime]:
    """From when and until when the first certificate holds. Raises ValueError for what is none.

    The standard library tells it of a peer's certificate only, so the few bytes before it are stepped over here:
    Certificate { TBSCertificate { [version] serial algorithm issuer validity { from, until } ... } ... }
    """
    found = CERTIFICATE.search(pem)
    der = ssl.PEM_cert_to_DER_cert(found.group().decode("ascii")) if found else b""
    try:
        _, body, _ = _element(der)
        _, fields, _ = _element(body)
        if fields[0] == CONTEXT_0:
            _, _, fields = _element(fields)
        for _ in range(3):
            _, _, fields = _element(fields)
        _, times, _ = _element(fields)
        kind_from, since, times = _element(times)
        kind_until, until, _ = _element(times)
    except IndexError:
        raise ValueError("not a certificate") from None
    return _time(kind_from, since), _time(kind_until, until)


def _cert_problems(path: str) -> Iterator[Problem]:
    pem = _read(path)
    if isinstance(pem, str):
        yield Problem("server.tls_cert", f"is {show(path)}, which cannot be read ({pem}); name the certificate's file")
        return
    try:
        validity(pem)
    except ValueError:
        yield Problem("server.tls_cert", f"is {show(path)}, which has no certificate in it; name a chain in PEM form")


def _key_problems(path: str) -> Iterator[Problem]:
    pem = _read(path)
    if isinstance(pem, str):
        yield Problem("server.tls_key", f"is {show(path)}, which cannot be read ({pem}); name the private key's file")
    elif ENCRYPTED.search(pem):
        says = "which is encrypted, and nobody is there to type its password; decrypt it, and chmod 600"
        yield Problem("server.tls_key", f"is {show(path)}, {says}")
    elif not KEY.search(pem):
        yield Problem("server.tls_key", f"is {show(path)}, which has no private key in it; name one in PEM form")


def _read(path: str) -> bytes | str:
    """What is in the file, or why that cannot be known."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        return error.strerror or str(error)


def _load(context: ssl.SSLContext, server: ServerConfig) -> None:
    assert server.tls_cert is not None
    context.load_cert_chain(server.tls_cert, server.tls_key, password=_no_password)


def _no_password() -> str:
    """OpenSSL would ask at the terminal."""
    return ""


def _element(der: bytes) -> tuple[int, bytes, bytes]:
    """The first element of DER: its tag, its content, what follows it. Raises IndexError when it is cut off."""
    size, at = der[1], 2
    if size & 0x80:
        at += size & 0x7F
        size = int.from_bytes(der[2:at], "big")
    if len(der) < at + size:
        raise IndexError
    return der[0], der[at : at + size], der[at + size :]


def _time(kind: int, text: bytes) -> datetime:
    form = "%y%m%d%H%M%SZ" if kind == UTC_TIME else "%Y%m%d%H%M%SZ"
    return datetime.strptime(text.decode("ascii"), form).replace(tzinfo=UTC)
