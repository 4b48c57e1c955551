"""The dispatch table of the public listener: paths as data, decided from the parsed path alone.

One dict look-up for every path of the API. aiohttp's own router costs more than the rest of a small request's handling,
and answers 404 and 405 in no client's dialect.
"""

from __future__ import annotations

import difflib

import msgspec

from proxy.dialects.call import Endpoint
from proxy.dialects.endpoints import ENDPOINTS
from proxy.errors import MethodNotAllowed, NotFound

MODELS = "/v1/models"
HEALTH, READY = "/healthz", "/readyz"
_READ = ("GET", "HEAD")
LONGEST_TYPO = 64


class Route(msgspec.Struct, frozen=True):
    """What a path is. `endpoint` for a call of a model; otherwise a page named by its path, `rest` what followed it."""

    page: str
    methods: tuple[str, ...]
    endpoint: Endpoint | None = None
    rest: str = ""

    @property
    def allow(self) -> str:
        """The `Allow` header."""
        return ", ".join((*self.methods, "OPTIONS"))


_ROUTES = {path: Route(path, ("POST",), endpoint) for path, endpoint in ENDPOINTS.items()} | {
    path: Route(path, _READ) for path in (MODELS, HEALTH, READY)
}


def _instead(path: str) -> str:
    """What to call: the path that was probably meant (a base_url with too little or too much in it), or all."""
    if path == "/metrics" or path.startswith("/admin"):
        return "Operators' pages are on another port, [server] admin_listen."
    # looking for the nearest takes a millisecond for a long one
    near = difflib.get_close_matches(path, _ROUTES, n=1, cutoff=0.8) if len(path) <= LONGEST_TYPO else []
    return f"Did you mean {near[0]}?" if near else f"Models are called at {', '.join(ENDPOINTS)}."


def find(method: str, path: str) -> Route:
    """The route. Raises `NotFound`, or `MethodNotAllowed` naming the methods that are; OPTIONS always is."""
    route = _ROUTES.get(path)
    if route is None:
        if not path.startswith(MODELS + "/"):
            raise NotFound(f"There is no path {path[:200]} here. {_instead(path)}")
        route = Route(MODELS, _READ, rest=path.removeprefix(MODELS + "/"))
    if method not in route.methods and method != "OPTIONS":
        raise MethodNotAllowed(f"{method[:20]} is not allowed on {route.page}: use {route.methods[0]}.", route.allow)
    return route
