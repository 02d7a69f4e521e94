"""The life of a replica, seen from a router: its states, what happens to it, and what follows, as a table."""

from __future__ import annotations

import enum
from collections.abc import Mapping


class State(enum.Enum):
    """Where a replica stands in its life, seen from here."""

    JOINING = enum.auto()
    """Listed; no lane yet, or not any more."""
    READY = enum.auto()
    LEAVING = enum.auto()
    """Not listed any more, the lane still open: streams in flight go on."""
    DRAINING = enum.auto()
    """It said that it takes no new streams."""
    ENDING = enum.auto()
    """Draining and not listed any more."""
    GONE = enum.auto()


class Event(enum.Enum):
    OPENED = enum.auto()
    SAID_DRAINING = enum.auto()
    LOST = enum.auto()
    LISTED = enum.auto()
    UNLISTED = enum.auto()


LIFE: Mapping[tuple[State, Event], State] = {
    (State.JOINING, Event.OPENED): State.READY,
    (State.JOINING, Event.LOST): State.JOINING,
    (State.JOINING, Event.UNLISTED): State.GONE,
    (State.READY, Event.SAID_DRAINING): State.DRAINING,
    (State.READY, Event.LOST): State.JOINING,
    (State.READY, Event.UNLISTED): State.LEAVING,
    (State.LEAVING, Event.LISTED): State.READY,
    (State.LEAVING, Event.SAID_DRAINING): State.ENDING,
    (State.LEAVING, Event.LOST): State.GONE,
    (State.DRAINING, Event.LOST): State.JOINING,
    (State.DRAINING, Event.UNLISTED): State.ENDING,
    (State.ENDING, Event.LISTED): State.DRAINING,
    (State.ENDING, Event.LOST): State.GONE,
}
"""The life of a replica; a pair that is missing changes nothing."""
