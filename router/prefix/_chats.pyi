"""What is compiled of `router.prefix.hashing`."""

from collections.abc import Callable

from router.prefix.draft import Draft
from router.types import Chain, Request

class Chats:
    def __init__(
        self,
        hashed: Callable[[Draft, Request], Chain | None],
        chained: Callable[[Request], Chain | None],
        seeds: dict[tuple[str, str, str, str], int],
        block_bytes: int,
        max_bytes: int,
    ) -> None: ...
    def chain(self, request: Request) -> Chain | None: ...
    def text_chain(self, request: Request) -> Chain | None: ...
