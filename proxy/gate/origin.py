"""Which names a listener on loopback answers to.

A web page can make its own host name point to 127.0.0.1 (DNS rebinding) and then talk to a server there as to its own.
The browser still sends the page's host name: on loopback, without keys, only loopback's names are ours.
"""

from __future__ import annotations

import ipaddress
from functools import lru_cache
from urllib.parse import urlsplit


@lru_cache(maxsize=256)
def loopback_name(host: str) -> bool:
    """Whether a Host header names this machine to itself: localhost, *.localhost, 127.0.0.0/8, [::1]; any port."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
