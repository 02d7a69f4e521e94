"""When certificates expire. The standard library says so of other sides' certificates only.

Sans-IO: a walk over the DER of X.509 (RFC 5280, 4.1) up to the validity, and no further.
"""

from __future__ import annotations

import datetime
import re
import ssl
from typing import Final

_PEM: Final = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_UTC_TIME: Final = 0x17
_GENERALIZED_TIME: Final = 0x18
_VERSION: Final = 0xA0


def expires_at(pem: bytes) -> float:
    """When the first of these certificates expires, in seconds since 1970; infinite where none can be read."""
    return min((_expiry(found.decode("latin-1")) for found in _PEM.findall(pem)), default=float("inf"))


def _expiry(pem: str) -> float:
    try:
        return _not_after(ssl.PEM_cert_to_DER_cert(pem))
    except (ValueError, IndexError):
        return float("inf")  # OpenSSL has judged it; this is for a metric.


def _not_after(der: bytes) -> float:
    at, _, _ = _element(der, 0)  # Certificate
    at, _, _ = _element(der, at)  # TBSCertificate
    if der[at] == _VERSION:
        at = _behind(der, at)
    for _ in ("serialNumber", "signature", "issuer"):
        at = _behind(der, at)
    at, _, _ = _element(der, at)  # Validity
    at = _behind(der, at)  # notBefore
    start, end, kind = _element(der, at)
    text = der[start:end].decode("ascii")
    if kind == _UTC_TIME:  # Years 1950 to 2049, in two digits.
        text = ("20" if text < "5" else "19") + text
    elif kind != _GENERALIZED_TIME:
        raise ValueError("no time")
    moment = datetime.datetime.strptime(text, "%Y%m%d%H%M%SZ")
    return moment.replace(tzinfo=datetime.UTC).timestamp()


def _element(der: bytes, at: int) -> tuple[int, int, int]:
    """Where the content of the element at that place begins and ends, and its tag."""
    size = der[at + 1]
    start = at + 2
    if size & 0x80:
        digits = size & 0x7F
        size = int.from_bytes(der[start : start + digits])
        start += digits
    return start, start + size, der[at]


def _behind(der: bytes, at: int) -> int:
    return _element(der, at)[1]
