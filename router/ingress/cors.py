"""Cross-origin rules of the HTTP ingress: which lines a response needs so that a browser hands it to a page.

Done at the edge, so that replicas never see an `origin`. Methods and headers are all allowed, credentials are not;
only origins are restricted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

_METHODS: Final = "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT"
_EXPOSED: Final = "x-request-id, x-kvlane-route, x-kvlane-error, retry-after"
_MAX_AGE_S: Final = 600
_VARY_PREFLIGHT: Final = "vary: origin, access-control-request-method, access-control-request-headers\r\n"


class Cors:
    """Header lines for given origins; `("*",)` allows all, an empty tuple turns CORS off."""

    def __init__(self, origins: Sequence[str]) -> None:
        self.enabled = bool(origins)
        self._all = "*" in origins
        self._origins = frozenset(origins)

    def lines(self, origin: str | None) -> str:
        """The header lines that a response to a request from `origin` carries."""
        if not self.enabled:
            return ""
        if origin is None:
            return "" if self._all else "vary: origin\r\n"
        if self._all:
            return f"access-control-allow-origin: *\r\naccess-control-expose-headers: {_EXPOSED}\r\n"
        if origin in self._origins:
            return (
                f"access-control-allow-origin: {origin}\r\n"
                f"access-control-expose-headers: {_EXPOSED}\r\nvary: origin\r\n"
            )
        return "vary: origin\r\n"

    def preflight(self, noted: Mapping[str, str]) -> tuple[int, str, bytes] | None:
        """Status, header lines and body of the answer to a preflight; None where CORS is off."""
        if not self.enabled:
            return None
        origin = noted["origin"]
        lines = [_VARY_PREFLIGHT, f"access-control-allow-methods: {_METHODS}\r\n"]
        lines.append(f"access-control-max-age: {_MAX_AGE_S}\r\n")
        if "access-control-request-headers" in noted:
            lines.append(f"access-control-allow-headers: {noted['access-control-request-headers']}\r\n")
        if not (self._all or origin in self._origins):
            return 400, "".join(lines), b"Disallowed CORS origin"
        lines.append(f"access-control-allow-origin: {'*' if self._all else origin}\r\n")
        if noted["access-control-request-method"] not in _METHODS.split(", "):
            return 400, "".join(lines), b"Disallowed CORS method"
        return 200, "".join(lines), b"OK"
