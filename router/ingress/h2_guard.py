"""Floods that a single HTTP/2 connection could keep a router busy with, and how much of each is let through.

Sans-IO; the clock is given. Rule: what costs us more than it costs the client is counted; a client that goes on beyond
its burst is told ENHANCE_YOUR_CALM and loses its connection, others notice nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from h2.exceptions import DenialOfServiceError

RESETS_PER_S: Final = 200.0
"""Streams that a client may give up before they got anything (rapid reset), beside a burst of as many as it may have at
once: a client whose deadlines pass all together is none that attacks."""
CONTROL_BURST: Final = 1000
CONTROL_PER_S: Final = 100.0
"""Frames that ask for an answer or for nothing: PRIORITY, DATA that is empty or all padding, unknown ones, and errors
of one stream that we answer by a reset."""
SETTINGS_BURST: Final = 100
SETTINGS_PER_S: Final = 10.0
"""Settings may move the windows of all streams at once."""
PING_STRIKES: Final = 2
"""Pings that come too fast and are still answered, as grpc's servers count them."""
PING_INTERVAL_S: Final = 5.0
"""A client may ping this often while it waits for a first token: half of the 10 s that grpc's clients may be set to, so
that none is cut off for being a moment early. What it gets meanwhile lets it ping at once: clients measure their
bandwidth so."""


class Bucket:
    """So many at once, and so many per second."""

    def __init__(self, burst: float, per_s: float, clock: Callable[[], float]) -> None:
        self._burst = burst
        self._per_s = per_s
        self._clock = clock
        self._left = burst
        self._as_of = clock()

    def take(self) -> bool:
        """Whether one more may pass."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._as_of) * self._per_s)
        self._as_of = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Guard:
    """What one connection may do. All methods raise `DenialOfServiceError`."""

    def __init__(self, max_streams: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._resets = Bucket(max_streams, RESETS_PER_S, clock)
        self._control = Bucket(CONTROL_BURST, CONTROL_PER_S, clock)
        self._settings = Bucket(SETTINGS_BURST, SETTINGS_PER_S, clock)
        self._strikes = 0
        self._pinged_at = -PING_INTERVAL_S

    def reset(self) -> None:
        """A stream was given up before it got anything."""
        if not self._resets.take():
            raise DenialOfServiceError("too many streams that are reset at once")

    def control(self) -> None:
        """A frame that only keeps us busy."""
        if not self._control.take():
            raise DenialOfServiceError("too many control frames")

    def settings(self) -> None:
        """Settings to be kept to."""
        if not self._settings.take():
            raise DenialOfServiceError("too many settings")

    def ping(self) -> None:
        """A ping to be answered."""
        now = self._clock()
        if now - self._pinged_at < PING_INTERVAL_S:
            self._strikes += 1
            if self._strikes > PING_STRIKES:
                raise DenialOfServiceError("too_many_pings")  # The word by which grpc's clients slow down.
        self._pinged_at = now

    def sent(self) -> None:
        """The client was sent output."""
        self._strikes = 0
        self._pinged_at = -PING_INTERVAL_S
