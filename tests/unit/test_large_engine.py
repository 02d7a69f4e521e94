"""The engine of large answers that load tests use."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from loadtests.large_engine import PATH, LargeEngine, Wanted
from router.errors import KvlaneError, PathNotFound
from router.lane.frames import Submit
from router.types import Headers
from tests.fakes import DEADLINE_S


class Out:
    """Remembers what came."""

    def __init__(self) -> None:
        self.headers: Headers = ()
        self.payload = b""
        self.error: KvlaneError | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def head(self, status: int, headers: Headers) -> None:
        self.headers = headers

    def data(self, payload: bytes, tokens: int = 0, *, urgent: bool = False) -> None:
        self.payload += payload

    def end(self, finish: str = "") -> None:
        self.ended.set_result(None)

    def fail(self, error: KvlaneError) -> None:
        self.error = error


def ask(engine: LargeEngine, wanted: Wanted, path: str = PATH) -> Out:
    out = Out()
    engine.submit(Submit(1, "r1", 0, "POST", path, (), msgspec.json.encode(wanted)), out)
    return out


async def test_an_answer_in_one_piece_has_its_length() -> None:
    out = ask(LargeEngine("m"), Wanted("m", 1_000_000))
    await asyncio.wait_for(out.ended, DEADLINE_S)
    assert dict(out.headers)["content-length"] == "1000000"
    assert len(out.payload) == 1_000_000


async def test_a_stream_has_as_many_events_as_were_asked_for_and_the_load_says_that_it_runs() -> None:
    engine = LargeEngine("m")
    out = ask(engine, Wanted("m", 10, pieces=5, stream=True))
    assert engine.load().running == 1
    await asyncio.wait_for(out.ended, DEADLINE_S)
    assert out.payload.count(b"x" * 10) == 5
    assert out.payload.endswith(b"data: [DONE]\n\n")
    assert engine.load().running == 0


async def test_a_stream_that_is_stopped_sends_no_more() -> None:
    engine, out = LargeEngine("m"), Out()
    wanted = msgspec.json.encode(Wanted("m", 10, pieces=1_000_000, stream=True))
    stop = engine.submit(Submit(1, "r1", 0, "POST", PATH, (), wanted), out)
    stop()
    before = out.payload
    for _ in range(5):
        await asyncio.sleep(0)
    assert (out.payload, engine.load().running) == (before, 0)


@pytest.mark.parametrize("path", ["/", "/v1/chat/completions"])
async def test_there_is_only_one_path(path: str) -> None:
    assert isinstance(ask(LargeEngine("m"), Wanted("m", 1), path).error, PathNotFound)
