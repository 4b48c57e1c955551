"""Who is calling: one extractor for every way a key can be sent, one check for all paths.

Keys live in memory as SHA-256 digests only. They are random strings of high entropy, so a plain hash is enough (no
salt, no slow function: those are for passwords, and would cost milliseconds per request).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping

from proxy.config_secrets import NamedKey
from proxy.errors import Forbidden, Unauthenticated
from proxy.gate.origin import loopback_name

LOCAL_TENANT = "local"


def extract(headers: Mapping[str, str]) -> str | None:
    """The key as OpenAI's, Anthropic's or Azure's clients send it; a Bearer token comes first."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key") or headers.get("api-key") or None


class Keys:
    """The keys that may call. Without any, everybody may: the config then allows a loopback listener only."""

    __slots__ = ("_known",)

    def __init__(self, keys: Iterable[NamedKey]) -> None:
        digests = ((hashlib.sha256(key.secret.reveal().encode()).digest(), key.name) for key in keys)
        self._known = {digest: (digest, name) for digest, name in digests}

    def __len__(self) -> int:
        return len(self._known)

    @property
    def tenants(self) -> set[str]:
        """Everybody that `authenticate` may return."""
        return {name for _, name in self._known.values()} or {LOCAL_TENANT}

    def authenticate(self, headers: Mapping[str, str]) -> str:
        """The tenant: the key's name. Raises `Unauthenticated`, or `Forbidden` for another host's name on loopback; the
        message never repeats what was sent.

        The dict finds a candidate in time that depends on the digest, not on the key: nobody who guesses can choose
        digests, so timing tells nothing. `compare_digest` then looks at the whole digest.
        """
        if not self._known:
            if not loopback_name(headers.get("host", "localhost")):
                raise Forbidden("Without api_keys this server answers to localhost only; configure [server] api_keys.")
            return LOCAL_TENANT
        key = extract(headers)
        if key is None:
            raise Unauthenticated("No API key: send 'Authorization: Bearer KEY' or 'x-api-key: KEY'.")
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        known, tenant = self._known.get(digest, (b"", ""))
        if not hmac.compare_digest(known, digest):
            raise Unauthenticated("This API key is not known here.")
        return tenant
