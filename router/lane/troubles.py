"""Why replicas have no lane: what happened last with each of them, and how often each kind of trouble came.

Rule: nothing here holds an address, for `/readyz` shows it to whoever asks. `Troubles` is a router process's own.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Final

from router.errors import ReplicaLost, cut
from router.lane.carriers import TlsFailed
from router.lane.client import Lane, LaneClosed, LaneRefused

KINDS: Final = ("unreachable", "timeout", "tls", "secret", "version", "protocol", "closed", "lost", "carrier")
"""Each is a value of the metric's label; a refusal with another code counts as ``protocol``."""


class Troubles:
    """Of all replicas of one router process."""

    def __init__(self) -> None:
        self.counts = Counter(dict.fromkeys(KINDS, 0))
        self.last: dict[str, str] = {}
        """By replica, of those that have no lane now."""

    def failed(self, replica: str, error: Exception, lane: Lane | None) -> str:
        """A lane could not be opened; returns why, for the log."""
        if isinstance(error, TlsFailed):
            return self._note(replica, "tls", f"lane refused: {error}")
        if isinstance(error, TimeoutError):
            return self._note(replica, "timeout", _timed_out(lane))
        if isinstance(error, OSError):
            self._note(replica, "unreachable", os.strerror(error.errno) if error.errno else "it cannot be reached")
            return str(error)
        return self._note(replica, "carrier", "the carrier failed")

    def lost(self, lane: Lane, error: ReplicaLost, *, expected: bool) -> None:
        """A lane is gone; `expected` where that is no trouble, since the replica drains or is not listed any more."""
        if isinstance(error, LaneClosed):
            return
        if isinstance(error, LaneRefused):
            kind = error.code if error.code in KINDS else "protocol"
            self._note(lane.replica, kind, cut(error.message, 300))
        elif lane.welcome is None:
            self._note(lane.replica, "closed", "the replica closed the lane before it was open")
        elif not expected:
            self._note(lane.replica, "lost", "the lane was lost")

    def over(self, replica: str) -> None:
        """It has a lane again, or is not listed any more."""
        self.last.pop(replica, None)

    def _note(self, replica: str, kind: str, text: str) -> str:
        self.counts[kind] += 1
        self.last[replica] = text
        return text


def _timed_out(lane: Lane | None) -> str:
    if lane is not None and lane.reached and lane.silent:
        return "timed out: it took the connection and said nothing; a lane port with TLS needs lane.tls_ca_file"
    return "timed out"
