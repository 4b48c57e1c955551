"""TLS to upstreams, the same in both lanes."""

from __future__ import annotations

import logging
import ssl

log = logging.getLogger("vramp.upstreams")


class Authorities:
    """Whom this system trusts to vouch for a server's name, or whom SSL_CERT_FILE does, and the TLS that goes by it.

    To read them takes 20 ms and a megabyte: once, when an upstream first needs it, and at each reload.
    """

    def __init__(self) -> None:
        self._context: ssl.SSLContext | None = None

    def tls(self) -> ssl.SSLContext:
        """TLS 1.2 or 1.3 to servers that prove their names."""
        if self._context is None:
            self._context = _context()
        return self._context

    def read_again(self) -> None:
        """They may have changed. Kept connections belong to a context, which is a new one only where they have."""
        if self._context is None:
            return
        fresh = _context()
        before, now = (set(each.get_ca_certs(binary_form=True)) for each in (self._context, fresh))
        if before and not now:
            log.error("no certificate authority can be read: those before stay trusted")
        elif now != before:
            log.info("the certificate authorities have changed: %d are trusted", len(now))
            self._context = fresh


def _context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    # Only to ask for a client's certificate would a server want that, and we have none.
    context.options |= ssl.OP_NO_RENEGOTIATION
    return context


AUTHORITIES = Authorities()  # one for the process
