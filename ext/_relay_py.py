"""The relay's pure twin is the ordinary lane of the proxy's server: here is nothing, and `Relay` says so."""

from __future__ import annotations

Relay = None
