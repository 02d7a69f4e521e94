"""Both ends of a lane: a fleet's own, with requests on it, and one that speaks frame by frame."""

import asyncio

from router.lane import frames
from router.lane.client import Lane
from router.lane.frames import End
from tests.fakes import DEADLINE_S, SECRET, Fleet, RecordingSink, eventually, make_request


def lane_of(fleet: Fleet, replica: str = "a") -> Lane:
    (lane,) = [lane for lane in fleet.router.lanes() if lane.replica == replica]
    return lane


async def run(fleet: Fleet, sink: RecordingSink, request_id: str = "r1") -> End:
    with fleet.router.lease("a") as lane:
        return await lane.run(make_request(request_id), sink)


async def submitted(fleet: Fleet, sink: RecordingSink, request_id: str = "r1") -> asyncio.Task[End]:
    """A request that the engine has."""
    engine = fleet.engines["a"]
    before = len(engine.calls)
    task = asyncio.create_task(run(fleet, sink, request_id))
    await eventually(lambda: len(engine.calls) > before)
    return task


async def connect(fleet: Fleet) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", fleet.records["a"].port)


async def read_frame(reader: asyncio.StreamReader) -> frames.DownFrame:
    length = int.from_bytes(await asyncio.wait_for(reader.readexactly(4), DEADLINE_S), "little")
    return frames.decode_down(await asyncio.wait_for(reader.readexactly(length), DEADLINE_S))


async def greet(fleet: Fleet) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await connect(fleet)
    challenge = await read_frame(reader)
    assert isinstance(challenge, frames.Challenge)
    writer.write(frames.encode(frames.Hello(frames.VERSION, frames.prove(SECRET, challenge.nonce, "raw"), "raw")))
    assert isinstance(await read_frame(reader), frames.Welcome)
    return reader, writer
