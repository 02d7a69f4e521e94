"""What the connections of one `h2` edge share, as they see it.

Rule: connections know of each other only by what the edge lets each of them do.
"""

from __future__ import annotations

import asyncio
from typing import Protocol, TypeVar

from router.ingress.grpc_call import Handler
from router.ingress.h2_call import H2Call
from router.ingress.pace import Pace
from router.options import GrpcOptions

Guest = TypeVar("Guest", contravariant=True)
"""Its kind of connection."""


class Site(Protocol[Guest]):
    """The edge."""

    options: GrpcOptions
    pace: Pace

    def handler(self, path: str) -> Handler:
        """Of this method, there or not."""

    def admit(self, connection: Guest) -> bool:
        """Counts the connection in, and says goodbye where none is wanted any more; False where there are too many."""

    def dismiss(self, connection: Guest) -> None:
        """The connection broke the protocol and has only its last words to read: where there are too many, it goes."""

    def leave(self, connection: Guest) -> None:
        """The connection is lost."""

    def begin(self, call: H2Call, handler: Handler) -> asyncio.Task[None]:
        """Runs the handler."""
