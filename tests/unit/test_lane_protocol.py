"""Lanes frame by frame: other versions, other protocols, routers that break ours, and what they are told."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from router.lane import frames
from router.lane.frames import End
from tests.fakes import DEADLINE_S, SECRET, Fleet, RecordingSink, eventually
from tests.unit.lanes import connect, greet, read_frame, submitted


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    fleet = Fleet()
    yield fleet
    await fleet.close()


async def test_a_lane_without_the_secret_is_refused_and_never_ready(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    engine = await fleet.add("a", secret=b"wrong")
    await eventually(lambda: "does not know this replica's secret" in caplog.text and "refused the lane" in caplog.text)
    assert fleet.ready() == 0
    assert engine.calls == []


async def test_a_router_of_another_version_is_refused_by_name(fleet: Fleet) -> None:
    await fleet.add("a")
    reader, writer = await connect(fleet)
    challenge = await read_frame(reader)
    assert isinstance(challenge, frames.Challenge)
    writer.write(frames.encode(frames.Hello(99, frames.prove(SECRET, challenge.nonce, "raw"), "raw")))
    refused = await read_frame(reader)
    assert isinstance(refused, frames.Refused)
    assert refused.code == "version"
    assert "99" in refused.message
    assert await asyncio.wait_for(reader.read(), DEADLINE_S) == b""
    writer.close()


async def test_a_replica_of_another_version_is_not_used(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    async def other_version(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frames.encode(frames.Challenge(99, b"nonce")))
        await reader.read()
        writer.close()

    server = await asyncio.start_server(other_version, "127.0.0.1", 0)
    async with server:
        record = msgspec.structs.replace((await _record(fleet)), replica="old", port=server.sockets[0].getsockname()[1])
        fleet.list({"old": record})
        await eventually(lambda: "lane version 99" in caplog.text)
        assert fleet.ready() == 0
        await fleet.router.close()


async def _record(fleet: Fleet) -> frames.msgspec.Struct:  # type: ignore[name-defined]
    await fleet.add("a")
    return fleet.records["a"]


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00\x00\x00\x00",
        b"\xff\xff\xff\xff",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        frames.encode(frames.Ping(1)),
        frames.encode(frames.Submit(1, "r", 0, "POST", "/", (), b"")),
    ],
    ids=["empty frame", "4 GB frame", "http", "ping before hello", "submit before hello"],
)
async def test_whoever_does_not_speak_the_protocol_is_refused_and_harms_nobody(fleet: Fleet, sent: bytes) -> None:
    engine = await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    task = await submitted(fleet, RecordingSink())
    reader, writer = await connect(fleet)
    writer.write(sent)
    await asyncio.wait_for(reader.read(), DEADLINE_S)
    writer.close()
    engine.outs[0].end()
    await task
    assert len(engine.calls) == 1


@pytest.mark.parametrize("ids", [(5, 5), (5, 4), (0,), (1 << 63,)])
async def test_a_stream_id_that_does_not_rise_or_is_none_breaks_the_lane(fleet: Fleet, ids: tuple[int, ...]) -> None:
    await fleet.add("a")
    reader, writer = await greet(fleet)
    for id in ids:
        writer.write(frames.encode(frames.Submit(id, "r", 0, "POST", "/", (), b"")))
    got = [await read_frame(reader)]
    while not isinstance(got[-1], frames.Refused):
        got.append(await read_frame(reader))
    assert got[-1].code == "protocol"
    assert await asyncio.wait_for(reader.read(), DEADLINE_S) == b""
    writer.close()


async def test_a_router_that_does_not_read_loses_the_overflowing_stream_only() -> None:
    fleet = Fleet()
    engine = await fleet.add("a")
    await fleet.router.close()
    reader, writer = await greet(fleet)
    writer.write(frames.encode(frames.Submit(1, "big", 0, "POST", "/", (), b"")))
    writer.write(frames.encode(frames.Submit(2, "small", 0, "POST", "/", (), b"")))
    await eventually(lambda: len(engine.calls) == 2)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    big, small = engine.outs
    for _ in range(200):
        if "big" in engine.aborted:
            break
        big.data(bytes(1 << 20), 1)
        await asyncio.sleep(0)
    assert engine.aborted == ["big"]
    small.data(b"fine", 1)
    small.end()
    writer.transport.resume_reading()  # type: ignore[attr-defined]
    ends: dict[int, End] = {}
    payload = b""
    while len(ends) < 2:
        frame = await read_frame(reader)
        if isinstance(frame, frames.Step | frames.LargeStep):
            ends |= {output.stream: output.end for output in frame.outputs if output.end}
            payload += b"".join(output.payload for output in frame.outputs if output.stream == 2)
    assert ends[1].error == "client_too_slow"
    assert ends[2].error == ""
    assert payload == b"fine"
    writer.close()
    await fleet.close()


async def test_a_ping_is_answered(fleet: Fleet) -> None:
    await fleet.add("a")
    reader, writer = await greet(fleet)
    writer.write(frames.encode(frames.Ping(42)))
    assert await read_frame(reader) == frames.Pong(42)
    writer.close()


async def test_a_hello_nested_thousands_deep_is_refused(fleet: Fleet) -> None:
    await fleet.add("a")
    reader, writer = await connect(fleet)
    body = b"\x92\x02" + b"\x91" * 4000
    writer.write(len(body).to_bytes(4, "little") + body)
    await read_frame(reader)
    assert isinstance(await read_frame(reader), frames.Refused)
    writer.close()
