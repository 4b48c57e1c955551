"""TLS to upstreams, the same in both lanes."""

from __future__ import annotations

import ssl
from functools import cache


@cache
def upstream_tls() -> ssl.SSLContext:
    """TLS 1.2 or 1.3 to servers that prove their names to an authority this system trusts, or one in SSL_CERT_FILE.

    One for the process: to read the authorities takes 20 ms and a megabyte.
    """
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    # Only to ask for a client's certificate would a server want that, and we have none.
    context.options |= ssl.OP_NO_RENEGOTIATION
    return context
