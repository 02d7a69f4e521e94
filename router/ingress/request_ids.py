"""Which request ids of clients are taken over: one rule for both protocols."""

from __future__ import annotations

import re
from typing import Final

_VALID: Final = re.compile(r"[\x21-\x7e]{1,128}").fullmatch


def accepted(given: str | None) -> str:
    """The id as given where it fits into a header, a metadata value and a log line, else empty.

    Valid are 1 to 128 printable ASCII characters without spaces. A bad id is no error: its request gets a new one.
    """
    return given if given is not None and _VALID(given) else ""
