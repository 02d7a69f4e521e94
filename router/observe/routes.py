"""The latest route receipts, for ``/debug/routes``.

Rule: bounded, and nothing of a prompt: receipts hold none. `RouteLog` owns the receipts it was given.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final
from urllib.parse import parse_qsl

import msgspec

from router.errors import InvalidRequest, cut
from router.types import Receipt, Request

DEFAULT_LIMIT: Final = 100
_FILTERS: Final = ("request_id", "model", "replica")


class RouteRecord(msgspec.Struct, frozen=True):
    """One try of one request."""

    time_s: float
    """When it was routed, in seconds since 1970."""
    model: str
    tenant: str
    """Whose API key the request came with; empty where none is asked for."""
    route: Receipt


class RouteLog:
    """Remembers the last `size` receipts. `wall` is the time of day in seconds since 1970."""

    def __init__(self, size: int, wall: Callable[[], float] = time.time) -> None:
        self._records: deque[RouteRecord] = deque(maxlen=size)
        self._wall = wall

    def record(self, request: Request, receipt: Receipt) -> None:
        """A replica was chosen."""
        self._records.append(RouteRecord(self._wall(), request.model, request.tenant, receipt))

    def page(self, query: str) -> bytes:
        """The receipts as JSON, newest first: ``{"routes": [...]}``.

        `query` may hold ``request_id``, ``model`` and ``replica``, which must be equal, and ``limit``. Raises
        `InvalidRequest` for anything else.
        """
        wanted = dict(parse_qsl(query, keep_blank_values=True))
        limit = _limit(wanted.pop("limit", str(DEFAULT_LIMIT)))
        if unknown := next((name for name in wanted if name not in _FILTERS), None):
            raise InvalidRequest(f"`{cut(unknown)}` is none of {', '.join(_FILTERS)} and limit", param=cut(unknown))
        found: list[RouteRecord] = []
        for record in reversed(self._records):
            if len(found) == limit:
                break
            if all(_field(record, name) == value for name, value in wanted.items()):
                found.append(record)
        return msgspec.json.encode({"routes": found})


def _field(record: RouteRecord, name: str) -> str:
    if name == "model":
        return record.model
    return record.route.replica if name == "replica" else record.route.request_id


def _limit(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise InvalidRequest("limit must be a whole number", param="limit")
    return int(text)
