"""Files that are read again when they change: certificates and keys that somebody rotates under a running router.

Rule: what cannot be used is refused whole, said once, and what was in use stays in use. Changes are looked for by
`stat`: Kubernetes changes a mounted Secret by swapping a link above its files, which watches on the files miss.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from typing import Final

from router.errors import ConfigError

log = logging.getLogger(__name__)

LOOK_S: Final = 2.0
"""Between two looks; a look takes microseconds."""

Stamp = tuple[tuple[int, ...], ...]


class Followed:
    """Some files that are read together."""

    def __init__(
        self, what: str, paths: Sequence[str], read: Callable[[], None], told: Callable[[str, str], None]
    ) -> None:
        """They have just been read. `read` does so again and raises `ConfigError` where it cannot use them; `told` is
        called with `what` and ``ok`` or ``failed`` each time. `follow` calls both in a thread."""
        self._what = what
        self._paths = paths
        self._read = read
        self._told = told
        self._stamp: Stamp | None = None  # The first look reads them again: they may have changed since the start.

    def look(self) -> None:
        """Reads them where they have changed; never raises."""
        stamp = self._seen()  # Before they are read: what changes meanwhile is seen by the next look.
        if stamp == self._stamp:
            return
        first, self._stamp = self._stamp is None, stamp
        try:
            self._read()
        except ConfigError as error:
            log.error("%s changed and cannot be used, the ones in use stay: %s", self._what, error.message)
            self._told(self._what, "failed")
            return
        except Exception:
            log.exception("%s changed and could not be read, the ones in use stay", self._what)
            self._told(self._what, "failed")
            return
        if not first:
            log.info("%s changed and are in use", self._what)
            self._told(self._what, "ok")

    def _seen(self) -> Stamp:
        return tuple(map(_stamp, self._paths))


async def follow(files: Sequence[Followed]) -> None:
    """Looks again and again, until cancelled. In a thread: a thousand keys take 50 ms to read, and streams go on."""
    while True:
        for each in files:
            await asyncio.to_thread(each.look)
        await asyncio.sleep(LOOK_S)


def _stamp(path: str) -> tuple[int, ...]:
    try:
        seen = os.stat(path)
    except OSError:
        return ()
    return seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns
