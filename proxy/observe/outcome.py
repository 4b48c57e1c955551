"""What became of one request: filled in along its way, read by the response headers, the metrics and the access log."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ext.rate_counters import Grant


class Outcome(msgspec.Struct, gc=False):  # nothing in it leads back to it, and thousands wait for their lines
    """One request, from its first byte to its end. Times are in seconds; `started_s` is monotonic.

    `status` is what the client saw, or 499 when it left first. An error after the first byte leaves the status at 200
    and is told by `error`.
    """

    request_id: str
    method: str
    path: str
    started_s: float
    remote: str = ""
    tenant: str = ""
    model: str = ""
    backend: str = ""
    reason: str = ""
    latency_class: str = ""
    stream: bool = False
    status: int = 0
    error: str | None = None
    attempts: int = 0
    queue_s: float = 0.0
    load_s: float = 0.0
    upstream_s: float = 0.0
    first_byte_s: float | None = None
    duration_s: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str | None = None
    packed: int = 1  # callers whose inputs went upstream in one call
    limited: str = ""  # the limit that refused it
    rate_limits: str = ""  # what its limits leave, as header lines
    grant: Grant | None = None  # of its limits, until it is settled

    def headers(self, passed: Mapping[str, str], *, waiting: bool = False) -> dict[str, str]:
        """Response headers: the upstream's that are `passed` on, and ours over them, but for `rate_limits`.

        Where the caller has limits here, the upstream's own are ours and not the caller's.
        """
        if self.rate_limits:
            passed = {name: value for name, value in passed.items() if not name.startswith("x-ratelimit-")}
        return {**passed, **self.facts(waiting=waiting)}

    def facts(self, *, waiting: bool = False) -> dict[str, str]:
        """What is known by now, by header names. While still `waiting`, nobody knows yet who will answer."""
        known = {"x-request-id": self.request_id}
        if self.model:
            known["x-vramp-model"] = self.model
            known["x-vramp-class"] = self.latency_class
        if self.attempts and not waiting:
            known["x-vramp-backend"] = self.backend
            known["x-vramp-reason"] = self.reason
            known["x-vramp-wait-ms"] = self.wait_ms()
            known["x-vramp-attempts"] = str(self.attempts)
            if self.packed > 1:
                known["x-vramp-packed"] = str(self.packed)
        return known

    def wait_ms(self) -> str:
        """The waits in whole milliseconds, as `x-vramp-wait-ms` has them."""
        upstream = round(self.upstream_s * 1000)
        if not (self.queue_s or self.load_s):
            return f"queue=0,load=0,upstream={upstream}"
        return f"queue={round(self.queue_s * 1000)},load={round(self.load_s * 1000)},upstream={upstream}"
