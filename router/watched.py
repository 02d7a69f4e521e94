"""A file that somebody else changes while we run.

Job: tell when what was read of it is old. Rule: a file is told of only once it has stood still from one look to the
next, so that nobody reads half of what is being written, and only once for each change. It is followed through
symbolic links to the file itself, since Kubernetes changes a mounted ConfigMap by pointing a link at another folder.
"""

from __future__ import annotations

import os
from typing import Final

LOOK_S: Final = 1.0
"""Between two looks; a change is told of at the second one after it."""

_Stamp = tuple[str, int, int, int, int, int]


class WatchedFile:
    """Make one before the file is first read."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._read = self._seen = _stamp(path)

    def reading(self) -> None:
        """It is read now."""
        self._read = self._seen = _stamp(self.path)

    def changed(self) -> bool:
        """Looks: whether it is another one than when it was read, and the same as at the last look."""
        now, seen = _stamp(self.path), self._seen
        self._seen = now
        return now == seen and now != self._read


def _stamp(path: str) -> _Stamp | None:
    """What is another one for another file or content; None where there is no file."""
    try:
        real = os.path.realpath(path)
        found = os.stat(real)
    except OSError:
        return None
    return real, found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size
