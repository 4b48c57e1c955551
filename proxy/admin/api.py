"""The management API, on its own listener: status, models, load and unload, metrics.

It can stop engines, so it is held apart from the public port: loopback by default, keys when it is not. A web page in
the operator's browser must not be able to reach it either, so requests of another origin are refused, and so are host
names that are not ours while it is bound to loopback (DNS rebinding).
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

import orjson
from aiohttp import web

from proxy.gate.origin import loopback_name
from scheduler.driver import Scheduler
from scheduler.model import Residency

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]
NDJSON = "application/x-ndjson"


class Admin:
    """The handlers. `status`, `models` and `metrics` are callables so that a reload needs no new server."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        status: Callable[[], dict[str, Any]],
        models: Callable[[], list[dict[str, Any]]],
        metrics: Callable[[], Awaitable[tuple[bytes, str]]],
        scheduler_state: Callable[[], dict[str, Any]],
        ready: Callable[[], bool],
        keys: Callable[[], tuple[str, ...]],
    ) -> None:
        self._scheduler = scheduler
        self._status = status
        self._models = models
        self._metrics = metrics
        self._scheduler_state = scheduler_state
        self._ready = ready
        self._keys = keys

    def app(self) -> web.Application:
        """The routes."""
        app = web.Application(middlewares=[self._guard])
        app.add_routes(
            [
                web.get("/healthz", self.healthz),
                web.get("/readyz", self.readyz),
                web.get("/metrics", self.metrics),
                web.get("/admin/api/status", self.status),
                web.get("/admin/api/models", self.models),
                web.get("/admin/api/scheduler", self.scheduler),
                web.post("/admin/api/models/{model:.+}/load", self.load),
                web.post("/admin/api/models/{model:.+}/unload", self.unload),
            ]
        )
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Answer) -> web.StreamResponse:
        try:
            refusal = self._refusal(request)
            return refusal if refusal is not None else await handler(request)
        except web.HTTPException as error:
            return _error(error.status, f"{request.method} {request.path}: {error.reason}")

    def _refusal(self, request: web.Request) -> web.Response | None:
        origin = request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != request.host:
            return _error(403, f"requests from pages of {origin} are refused: the admin API serves its own pages only")
        if _bound_to_loopback(request) and not loopback_name(request.host):
            return _error(403, f"host {request.host!r} is refused on a loopback listener; use 127.0.0.1 or localhost")
        if request.path in ("/healthz", "/readyz"):
            return None
        keys = self._keys()
        if keys and not _knows(keys, request.headers.get("Authorization", "")):
            return _error(
                401, "this needs an admin key: Authorization: Bearer KEY (VRAMP_ADMIN_KEY for the command line)"
            )
        return None

    async def healthz(self, _: web.Request) -> web.Response:
        """Alive."""
        return _json({"status": "ok"})

    async def readyz(self, _: web.Request) -> web.Response:
        """Ready to serve; 503 while starting and draining."""
        return _json({"status": "ready"}) if self._ready() else _json({"status": "not ready"}, 503)

    async def metrics(self, _: web.Request) -> web.Response:
        """Prometheus text."""
        body, content_type = await self._metrics()
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def status(self, _: web.Request) -> web.Response:
        """Everything `vramp status` shows."""
        return _json(self._status())

    async def models(self, _: web.Request) -> web.Response:
        """Models with their whole profiles."""
        return _json({"models": self._models()})

    async def scheduler(self, _: web.Request) -> web.Response:
        """Ledger, residency, queues by class and tenant, the last decisions with their reasons."""
        return _json(self._scheduler_state())

    async def load(self, request: web.Request) -> web.StreamResponse:
        """Make a model resident; NDJSON progress until it is ready or has failed."""
        return await self._follow(request, self._scheduler.load, Residency.READY)

    async def unload(self, request: web.Request) -> web.StreamResponse:
        """Drain and stop a model; NDJSON progress until it is gone."""
        return await self._follow(request, self._scheduler.unload, Residency.COLD)

    async def _follow(
        self,
        request: web.Request,
        act: Callable[[str], AsyncIterator[tuple[Residency, float, str]]],
        goal: Residency,
    ) -> web.StreamResponse:
        name = request.match_info["model"]
        if name not in self._scheduler.core.models:
            known = ", ".join(sorted(self._scheduler.core.models)) or "none"
            return _error(404, f"no local model named {name!r}; local models: {known}")
        response = web.StreamResponse(headers={"Content-Type": NDJSON, "Cache-Control": "no-store"})
        await response.prepare(request)
        last: dict[str, Any] = {"state": "unknown", "progress": 0.0, "note": ""}
        async for state, progress, note in act(name):
            last = {"state": state.value, "progress": round(progress, 3), "note": note}
            await response.write(orjson.dumps(last) + b"\n")
        end: dict[str, Any] = {**last, "done": True}
        if last["state"] != goal.value:
            end["error"] = last["note"] or f"{name} is {last['state']}"
        await response.write(orjson.dumps(end) + b"\n")
        await response.write_eof()
        return response


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")


def _error(status: int, message: str) -> web.Response:
    kind = {401: "authentication_error", 403: "permission_error"}.get(status, "invalid_request_error")
    return _json({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)


def _knows(keys: tuple[str, ...], header: str) -> bool:
    scheme, _, given = header.partition(" ")
    digest = sha256(given.strip().encode()).digest()
    # every key is compared, so the time taken says nothing about which one was near
    matches = [hmac.compare_digest(digest, sha256(key.encode()).digest()) for key in keys]
    return scheme.lower() == "bearer" and any(matches)


def _bound_to_loopback(request: web.Request) -> bool:
    sockname = request.transport.get_extra_info("sockname") if request.transport is not None else None
    return sockname is not None and ipaddress.ip_address(sockname[0]).is_loopback
