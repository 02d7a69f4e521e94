"""The admin port: what operators ask one router process for.

The same HTTP server as the ingress with other pages, and nothing behind it: no request on it reaches a replica. There
is no authentication, so it listens on loopback unless the configuration says otherwise.
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable
from typing import Final

from router.errors import MethodNotAllowed, PathNotFound, cut
from router.ingress.base import Fleet
from router.ingress.http import HttpServer
from router.ingress.http_parser import HttpRequest
from router.ingress.http_response import Reply
from router.ingress.http_routes import Metrics, Routes, Target
from router.lane.frames import End
from router.options import AdminOptions, HttpOptions
from router.types import Request, Sink

ROUTES_PATH: Final = "/debug/routes"
_SHARED: Final = frozenset({"/healthz", "/readyz", "/metrics"})
_MAX_CONNECTIONS: Final = 64


class AdminPort(HttpServer):
    """Serves the admin pages. `metrics` makes ``/metrics``, `routes` makes ``/debug/routes`` from the query."""

    def __init__(
        self,
        options: AdminOptions,
        fleet: Fleet,
        *,
        metrics: Metrics,
        routes: Callable[[str], bytes],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        http = HttpOptions(
            host=options.host, port=options.port, cors_origins=(), max_connections=_MAX_CONNECTIONS, max_body_bytes=1
        )
        pages = AdminPages(http, fleet, metrics, wall, routes)
        super().__init__(http, _Nowhere(), pages, clock=clock, wall=wall, refused=lambda rpc, error: None)


class AdminPages(Routes):
    """What is to be had at the admin port."""

    def __init__(
        self,
        options: HttpOptions,
        fleet: Fleet,
        metrics: Metrics,
        wall: Callable[[], float],
        routes: Callable[[str], bytes],
    ) -> None:
        super().__init__(options, fleet, metrics, wall, random.Random())
        self._routes = routes

    def own(self, request: HttpRequest, target: Target) -> Reply | Awaitable[Reply] | None:
        """The page. Raises `PathNotFound`, `MethodNotAllowed`, and `InvalidRequest` for a query that says nothing."""
        path = target.path
        if path in _SHARED:
            return super().own(request, target)
        if path != ROUTES_PATH:
            raise PathNotFound(f"There is nothing at {cut(path)}")
        if request.method not in ("GET", "HEAD"):
            raise MethodNotAllowed(f"{request.method} is not allowed at {path}", allow=("GET", "HEAD"))
        return Reply(200, "application/json", self._routes(target.query))


class _Nowhere:
    """Dispatch of a port that relays nothing."""

    async def run(self, request: Request, sink: Sink) -> End:
        raise PathNotFound("nothing is relayed here")
