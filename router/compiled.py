"""Whether the compiled parts are used: hot loops that exist twice, as Python and as C made of a `.pyx` file by Cython.

The rule: both give the same answers, so that a machine without a compiler pays with time alone. `KVLANE_COMPILED=0`
leaves the compiled ones out; with `KVLANE_COMPILED=1` kvlane does not start without them.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Final

from router.errors import ConfigError

VARIABLE: Final = "KVLANE_COMPILED"
PARTS: Final = (
    "router.prefix._blocks",
    "router.prefix._chats",
    "router.policies._costs",
    "router.load._outlooks",
    "router.load._steps",
    "router.lane._relay",
    "engine._lane_stream",
)
"""All there are; each is a `.pyx` file beside its Python twin."""


def part(name: str) -> ModuleType | None:
    """One compiled part; None where its Python twin is to be used. Raises `ConfigError` where that is forbidden, and
    for a `KVLANE_COMPILED` that is neither 0 nor 1."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "0", "1"):
        raise ConfigError(f"{VARIABLE}={wanted}: expected 0 or 1")
    if wanted == "0":
        return None
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if wanted == "1":
            raise ConfigError(f"{VARIABLE}=1, and {name} is not there compiled: {error}") from error
        return None


def missing(parts: Sequence[str] | None = None) -> tuple[str, ...]:
    """Those of them, or of all, that are not in use. Raises as `part`."""
    return tuple(name for name in (PARTS if parts is None else parts) if part(name) is None)


def told(parts: Sequence[str] | None = None) -> str:
    """The same for people. Raises as `part`."""
    lacking = missing(parts)
    if not lacking:
        return "compiled parts: in use"
    if os.environ.get(VARIABLE) == "0":
        return f"compiled parts: left out ({VARIABLE}=0)"
    return (
        f"compiled parts: not there ({', '.join(lacking)}); all works without them, and takes more CPU. They are built "
        "where kvlane is installed with a C compiler and Python's headers at hand."
    )


def note(log: logging.Logger, parts: Sequence[str] | None = None) -> None:
    """Says so in the log, as a warning where nobody chose it. Raises as `part`."""
    chosen = not missing(parts) or os.environ.get(VARIABLE) == "0"
    log.log(logging.INFO if chosen else logging.WARNING, "%s", told(parts))
