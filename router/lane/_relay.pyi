from asyncio import Future
from collections.abc import Callable

from router.lane.frames import End
from router.lane.meter import FrameMeter
from router.load.account import Account
from router.types import Sink

class Chunks:
    _open: bool
    _socket: int
    _write: Callable[[bytes], object]
    def data(self, payload: bytes, tokens: int) -> None: ...

class Stream:
    sink: Sink
    data: Callable[[bytes, int], None]
    last: Callable[[bytes, int], None]
    done: Future[End]
    began: float
    expected_s: float
    joins: bool
    def __init__(self, sink: Sink, done: Future[End], began: float, expected_s: float, joins: bool) -> None: ...
    def deafen(self, deaf: Sink) -> None: ...

class Relay:
    steps: int
    tokens: int
    _heard: bool
    _streams: dict[int, Stream]
    _meter: FrameMeter
    def _relays(self, account: Account, now: Callable[[], float]) -> None: ...
    def data_received(self, data: bytes) -> None: ...
