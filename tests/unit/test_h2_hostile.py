"""Clients of the `h2` edge that break the protocol, flood, stall or vanish: each costs its own connection at most."""

from __future__ import annotations

import asyncio
import gzip
import logging
import ssl
from collections.abc import Callable

import grpc
import grpc.aio
import pytest
from grpc_reflection.v1alpha import reflection_pb2
from hpack import Encoder
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    PushPromiseFrame,
    RstStreamFrame,
    SettingsFrame,
)
from kvlane.v1 import inference_pb2 as pb

from router.errors import ClientTooSlow
from router.ingress import h2_call, h2_connection
from router.ingress.grpc import FLUSH_S
from router.ingress.h2_call import H2Call
from router.ingress.h2_connection import Connection
from router.ingress.h2_edge import H2Edge
from router.ingress.h2_frames import PREFACE
from router.types import Request, Sink
from tests.unit.grpc_serving import SERVICE, Served, hangs, message, says, serving, until, within
from tests.unit.h2_peer import BODY, HEADERS, Peer, framed, messages, peer
from tests.unit.test_grpc_lifecycle import pems as pems

pytestmark = pytest.mark.timeout(60)

REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
PROTOCOL_ERROR, FLOW_CONTROL_ERROR, STREAM_CLOSED, FRAME_SIZE_ERROR, CANCEL, CALM = 1, 3, 5, 6, 8, 11


def connections(served: Served) -> set[Connection]:
    edge = served.ingress._edge
    assert isinstance(edge, H2Edge)
    return edge._connections


def calls(served: Served) -> list[H2Call]:
    return [call for connection in connections(served) for call in connection.calls.values()]


def sweep(served: Served, later_s: float) -> None:
    """What the edge's timer would do that much later."""
    now = asyncio.get_running_loop().time() + later_s
    for connection in tuple(connections(served)):
        connection.sweep(now)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nXX",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
        b"\0" * 100,
    ],
)
async def test_what_is_no_http_2_is_closed(data: bytes) -> None:
    async with serving(says("a")) as served, peer(served, settle=False) as client:
        client.send(data)
        assert await client.end() == PROTOCOL_ERROR
        await until(lambda: not connections(served))


BLOCK = Encoder().encode(list(HEADERS))
BROKEN: dict[str, tuple[list[Frame | bytes], int]] = {
    "no settings first": ([PREFACE, PingFrame(0, opaque_data=bytes(8))], PROTOCOL_ERROR),
    "an acknowledgement first": ([PREFACE, SettingsFrame(0, flags=["ACK"])], PROTOCOL_ERROR),
}
BROKEN_LATER: dict[str, tuple[list[Frame | bytes], int]] = {
    "a frame too long, by its head alone": ([b"\x00\x40\x01\x00\x00\x00\x00\x00\x01"], FRAME_SIZE_ERROR),
    "the longest frame": ([b"\xff\xff\xff\x00\x00\x00\x00\x00\x01"], FRAME_SIZE_ERROR),
    "data on stream 0": ([b"\x00\x00\x01\x00\x00\x00\x00\x00\x00x"], PROTOCOL_ERROR),
    "data on an idle stream": ([DataFrame(1, b"x")], PROTOCOL_ERROR),
    "an even stream": ([HeadersFrame(2, BLOCK, flags=["END_HEADERS"])], PROTOCOL_ERROR),
    "headers on stream 0": ([b"\x00\x00\x01\x01\x04\x00\x00\x00\x00\x88"], PROTOCOL_ERROR),
    "headers that are no HPACK": ([HeadersFrame(1, b"\xff" * 20, flags=["END_HEADERS"])], PROTOCOL_ERROR),
    "a stream that goes back": (
        [HeadersFrame(number, Encoder().encode(list(HEADERS)), flags=["END_HEADERS"]) for number in (5, 3)],
        PROTOCOL_ERROR,
    ),
    "a frame amid headers": ([HeadersFrame(1, BLOCK), PingFrame(0, opaque_data=bytes(8))], PROTOCOL_ERROR),
    "a window update amid headers": (
        [HeadersFrame(1, BLOCK), b"\0\0\x04\x08\0\0\0\0\0\0\0\0\x01"],
        PROTOCOL_ERROR,
    ),
    "a lone continuation": ([ContinuationFrame(1, BLOCK, flags=["END_HEADERS"])], PROTOCOL_ERROR),
    "a ping of 7 bytes": ([b"\0\0\x07\x06\0\0\0\0\0" + bytes(7)], FRAME_SIZE_ERROR),
    "a ping on a stream": ([b"\0\0\x08\x06\0\0\0\0\x01" + bytes(8)], PROTOCOL_ERROR),
    "a window update of 3 bytes": ([b"\0\0\x03\x08\0\0\0\0\0" + bytes(3)], FRAME_SIZE_ERROR),
    "a window update of an idle stream": ([b"\0\0\x04\x08\0\0\0\0\x09\0\0\0\x01"], PROTOCOL_ERROR),
    "a reset of an idle stream": ([RstStreamFrame(9)], PROTOCOL_ERROR),
    "a reset of 3 bytes": ([b"\0\0\x03\x03\0\0\0\0\x01" + bytes(3)], FRAME_SIZE_ERROR),
    "settings of 5 bytes": ([b"\0\0\x05\x04\0\0\0\0\0" + bytes(5)], FRAME_SIZE_ERROR),
    "settings on a stream": ([b"\0\0\x00\x04\0\0\0\0\x01"], PROTOCOL_ERROR),
    "a window beyond its bounds": ([b"\0\0\x06\x04\0\0\0\0\0\0\x04\xff\xff\xff\xff"], FLOW_CONTROL_ERROR),
    "a frame size below its bounds": ([b"\0\0\x06\x04\0\0\0\0\0\0\x05\0\0\x10\0"], PROTOCOL_ERROR),
    "a push": ([PushPromiseFrame(1, 2, BLOCK, flags=["END_HEADERS"])], PROTOCOL_ERROR),
    "padding longer than the frame": (
        [HeadersFrame(1, BLOCK, flags=["END_HEADERS"]), b"\0\0\x02\x00\x08\0\0\0\x01\x09x"],
        PROTOCOL_ERROR,
    ),
    "a priority that depends on itself": ([PriorityFrame(3, depends_on=3)], PROTOCOL_ERROR),
}


@pytest.mark.parametrize("case", [*BROKEN, *BROKEN_LATER])
async def test_a_broken_protocol_ends_its_connection_by_name_and_no_other(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    frames, code = (BROKEN | BROKEN_LATER)[case]
    async with (
        serving(hangs("a")) as served,
        peer(served) as other,
        peer(served, settle=case in BROKEN_LATER) as client,
    ):
        other.call(1)
        await other.some(1, 10)
        client.send(*frames)
        assert await client.end() == code
        await until(lambda: len(connections(served)) == 1)
        await other.echo()
        assert 1 not in other.ended
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


MALFORMED: dict[str, list[tuple[str, str]]] = {
    "upper-case names": [*HEADERS, ("X-Upper", "a")],
    "a space in a name": [*HEADERS, ("x upper", "a")],
    "a space behind a value": [*HEADERS, ("x-padded", "a ")],
    "a line in a value": [*HEADERS, ("x-lines", "a\nb")],
    "no path": [(":method", "POST"), (":scheme", "http"), *HEADERS[3:]],
    "no authority": [each for each in HEADERS if each[0] != ":authority"],
    "another host": [*HEADERS, ("host", "other")],
    "an unknown pseudo-header": [(":odd", "a"), *HEADERS],
    "a pseudo-header behind others": [*HEADERS[1:], HEADERS[0]],
    "a connection header": [*HEADERS, ("connection", "close")],
    "a transfer-encoding": [*HEADERS, ("transfer-encoding", "chunked")],
    "te with more than trailers": [*(each for each in HEADERS if each[0] != "te"), ("te", "trailers, deflate")],
    "an odd content-length": [*HEADERS, ("content-length", "three")],
}


@pytest.mark.parametrize("ended", [True, False], ids=["whole", "with data behind it"])
@pytest.mark.parametrize("case", MALFORMED)
async def test_a_malformed_request_ends_its_stream_alone(case: str, ended: bool) -> None:
    async with serving(hangs("a")) as served, peer(served) as client:
        client.call(1)
        await client.some(1, 10)
        client.call(3, None if ended else BODY, headers=MALFORMED[case])
        answer = await client.answer(3)
        assert (answer.headers[":status"], answer.status) == ("400", grpc.StatusCode.INTERNAL.value[0])
        assert answer.headers["grpc-message"].startswith("the request is malformed: ")
        client.data(3, b"late", end=True)
        client.call(5, headers=[*HEADERS, ("x-session-id", "five")])  # The table of headers is as it was.
        await client.some(5, 10)
        assert 1 not in client.ended
        assert [request.session_id for request in served.dispatch.requests] == ["", "five"]


@pytest.mark.parametrize("header", [("x-padded", "bar "), ("host", "other"), ("connection", "close")])
async def test_grpc_metadata_that_makes_a_call_malformed_costs_the_channels_other_calls_nothing(
    header: tuple[str, str],
) -> None:
    async with serving(hangs("a")) as served:
        other = served.generate()
        assert [(await other.read()).text for _ in range(2)] == ["", "a"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.generate(metadata=(header,)).read()
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "malformed" in (caught.value.details() or "")
        served.dispatch.script = says("b")
        assert [each.text async for each in served.generate()] == ["", "b"]
        assert not other.done()
        other.cancel()


@pytest.mark.parametrize(
    "end",
    [[DataFrame(1, b"four", flags=["END_STREAM"])], [DataFrame(1, b"four")], [DataFrame(1, b"", flags=["END_STREAM"])]],
)
async def test_a_body_of_another_length_than_told_resets_its_stream_alone(end: list[Frame]) -> None:
    async with serving(hangs("a")) as served, peer(served) as client:
        client.call(1, None, end=False, headers=[*HEADERS, ("content-length", "3")])
        client.call(3)
        client.send(*end)
        await client.some(3, 10)
        assert (await client.answer(1)).reset == PROTOCOL_ERROR
        assert 3 not in client.ended


async def test_bodies_of_another_length_than_told_count_in_the_connections_window() -> None:
    async with serving(says("a")) as served, peer(served) as client:
        for stream in range(1, 801, 2):
            client.call(stream, bytes(16384), headers=[*HEADERS, ("content-length", "3")])
            await client.echo() if stream % 20 == 1 else None
        await client.echo()
        assert client.window_opened >= 400 * 16384 // 2
        client.call(901)
        assert (await client.answer(901)).status == 0


EMBED = [(name, f"{SERVICE}Embed" if name == ":path" else value) for name, value in HEADERS]
EMBED_BODY = framed(pb.EmbedRequest(model="tiny", texts=["a"]).SerializeToString())


async def test_a_stop_waits_for_a_long_unary_answer_whose_client_reads() -> None:
    async def embeds(request: Request, sink: Sink) -> None:
        sink.data(long, 1)

    long = pb.EmbedResponse(embeddings=[pb.Embedding(values=[1.0] * 500_000)]).SerializeToString()
    async with serving(embeds) as served, peer(served) as client:
        client.call(1, EMBED_BODY, headers=EMBED)
        await client.some(1, 60_000)
        stopping = asyncio.create_task(served.ingress.stop(30))
        await asyncio.sleep(2.5 * FLUSH_S)  # What the stop grants to those who take nothing more.
        assert not stopping.done()
        for stream in (0, 1):
            client.open_window(stream, 4 << 20)
        assert messages((await client.answer(1)).data) == [long]
        assert client.answers[1].status == 0
        await within(stopping)


async def test_a_client_that_reads_no_more_of_a_unary_answer_is_given_up() -> None:
    async def embeds(request: Request, sink: Sink) -> None:
        sink.data(bytes(2 << 20), 1)

    async with serving(embeds, read_timeout_s=0.05) as served, peer(served) as client:
        client.call(1, EMBED_BODY, headers=EMBED)
        await client.some(1, 60_000)
        await until(lambda: any(call.abandoned for call in calls(served)))
        sweep(served, 0)
        sweep(served, h2_call.LINGER_S + 1)
        assert (await client.answer(1)).reset == CANCEL


async def test_what_compressed_requests_grow_to_is_bounded_on_a_connection() -> None:
    packed = gzip.compress(pb.GenerateRequest(model="tiny", text="a" * 900_000).SerializeToString())
    compressed = [*HEADERS, ("grpc-encoding", "gzip")]
    async with serving(hangs(), max_message_bytes=1_000_000) as served, peer(served) as client:
        for stream in range(1, 17, 2):
            client.call(stream, framed(packed, compressed=True), headers=compressed)
        await until(lambda: len(served.dispatch.requests) == 8)
        client.call(17, framed(packed, compressed=True), headers=compressed)
        assert (await client.answer(17)).status == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        for stream in range(1, 17, 2):
            client.reset(stream)
        await until(lambda: not calls(served))
        served.dispatch.script = says("a")
        client.call(19, framed(packed, compressed=True), headers=compressed)
        assert (await client.answer(19)).status == 0


async def test_compressed_requests_beyond_their_bound_cost_plain_calls_nothing() -> None:
    body = pb.GenerateRequest(model="tiny", text="a" * 900_000).SerializeToString()
    async with serving(hangs(), max_message_bytes=1_000_000) as served, peer(served) as client:
        for stream in range(1, 19, 2):
            client.call(
                stream, framed(gzip.compress(body), compressed=True), headers=[*HEADERS, ("grpc-encoding", "gzip")]
            )
        assert (await client.answer(17)).status == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        for stream in range(19, 39, 2):
            client.call(stream, framed(body))
        await until(lambda: len(served.dispatch.requests) == 18)
        assert client.ended == {17}


async def test_answered_messages_of_a_compressed_call_are_not_counted_any_more() -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="", host="a" * 50_000).SerializeToString()
    headers = [
        *((name, REFLECTION if name == ":path" else value) for name, value in HEADERS),
        ("grpc-encoding", "gzip"),
    ]
    async with serving(hangs(), max_message_bytes=1 << 16) as served, peer(served) as client:
        client.open_window(0, 1 << 24)
        client.call(1, None, headers=headers, end=False)
        client.open_window(1, 1 << 24)
        for number in range(1, 31):
            client.data(1, framed(gzip.compress(request), compressed=True))
            await client.some(1, number * 50_000)  # An answer repeats its request.
        client.data(1, b"", end=True)
        assert (await client.answer(1)).status == 0


@pytest.mark.parametrize("before", [3, 300])
async def test_headers_after_the_end_of_a_running_call_reset_it_alone(before: int) -> None:
    async with serving(says("a")) as served, peer(served) as client:
        for stream in range(1, 2 * before, 2):
            client.call(stream)
            await client.answer(stream)
        served.dispatch.script = hangs("a")
        good, bad = 2 * before + 1, 2 * before + 3
        for stream in (good, bad):
            client.call(stream)
            await client.some(stream, 10)
        trailers = client.encoder.encode([("x-trailer", "a")])
        client.send(HeadersFrame(bad, trailers, flags=["END_HEADERS", "END_STREAM"]))
        assert (await client.answer(bad)).reset == STREAM_CLOSED
        await client.echo()
        assert good not in client.ended


async def test_trailers_that_do_not_end_their_stream_reset_it_alone() -> None:
    async with serving(hangs("a")) as served, peer(served) as client:
        for stream in (1, 3):
            client.call(stream, end=False)
            await client.some(stream, 10)
        client.send(HeadersFrame(3, client.encoder.encode([("x-trailer", "a")]), flags=["END_HEADERS"]))
        assert (await client.answer(3)).reset == PROTOCOL_ERROR
        assert 1 not in client.ended


async def test_trailers_of_a_call_that_was_over_long_ago_are_passed_over() -> None:
    async with serving(says("a")) as served, peer(served) as client:
        for stream in range(1, 801, 2):
            client.call(stream)
            await client.answer(stream)
        trailers = client.encoder.encode([("x-trailer", "a")])
        client.send(HeadersFrame(1, trailers, flags=["END_HEADERS", "END_STREAM"]))
        client.call(901)
        assert (await client.answer(901)).status == 0


async def test_a_stream_that_goes_wrong_after_its_end_is_reset_or_passed_over() -> None:
    async with serving(says("a")) as served, peer(served) as client:
        client.call(1)
        await client.answer(1)
        client.data(1, b"late")
        client.open_window(1, 5)
        client.send(HeadersFrame(1, client.encoder.encode(list(HEADERS)), flags=["END_HEADERS"]))
        await client.echo()
        client.call(3)
        assert (await client.answer(3)).status == 0


def pings(client: Peer, number: int) -> None:
    client.send(PingFrame(0, opaque_data=bytes(8)))


def settings(client: Peer, number: int) -> None:
    client.send(SettingsFrame(0, settings={4: 65535 + number % 2}))


def priorities(client: Peer, number: int) -> None:
    client.send(PriorityFrame(2 * number + 1, depends_on=0))


def empty_data(client: Peer, number: int) -> None:
    if number == 0:
        client.call(1, None, end=False)
    client.send(DataFrame(1, b""))


def padded_data_of_nothing(client: Peer, number: int) -> None:
    if number == 0:
        client.call(1, None, end=False)
    client.send(DataFrame(1, b"", pad_length=1, flags=["PADDED"]))


def empty_data_of_the_dead(client: Peer, number: int) -> None:
    if number == 0:
        client.call(1, None, end=False)
        client.reset(1)
    client.send(DataFrame(1, b""))


def unknown_frames(client: Peer, number: int) -> None:
    client.send(b"\0\0\0\x42\0\0\0\0\0")


def rapid_resets(client: Peer, number: int) -> None:
    client.call(2 * number + 1, b"", end=False)
    client.reset(2 * number + 1)


def bad_windows(client: Peer, number: int) -> None:
    client.call(2 * number + 1, b"", end=False)
    client.send(b"\0\0\4\x08\0" + (2 * number + 1).to_bytes(4, "big") + bytes(4))


def refused_streams(client: Peer, number: int) -> None:
    client.call(2 * number + 1, b"", end=False)


def malformed(client: Peer, number: int) -> None:
    client.call(2 * number + 1, None, headers=MALFORMED["another host"])


def trailers_of_the_dead(client: Peer, number: int) -> None:
    if number == 0:
        client.call(1, None, end=False)
        client.reset(1)
    client.send(HeadersFrame(1, b"", flags=["END_HEADERS", "END_STREAM"]))


@pytest.mark.parametrize(
    "flood",
    [
        malformed,
        trailers_of_the_dead,
        pings,
        settings,
        priorities,
        empty_data,
        empty_data_of_the_dead,
        padded_data_of_nothing,
        unknown_frames,
        rapid_resets,
        bad_windows,
        refused_streams,
    ],
    ids=lambda flood: flood.__name__,
)
async def test_a_flood_ends_its_connection_with_enhance_your_calm(flood: Callable[[Peer, int], None]) -> None:
    async with serving(hangs(), max_concurrent_streams=50) as served, peer(served) as client, peer(served) as other:
        for number in range(1500):
            flood(client, number)
        assert await client.end() == CALM
        await until(lambda: len(connections(served)) == 1)
        other.call(1)
        await within(served.dispatch.running.wait())
        await other.echo()


async def test_a_client_may_ping_as_often_as_it_gets_output() -> None:
    async with serving(says("a")) as served, peer(served) as client:
        for number in range(20):
            client.call(2 * number + 1)
            await client.answer(2 * number + 1)
            await client.echo()


async def test_streams_that_got_output_may_be_reset_at_will() -> None:
    async with serving(hangs("a"), max_concurrent_streams=10) as served, peer(served) as client:
        for number in range(100):
            stream = 2 * number + 1
            client.call(stream)
            await client.some(stream, 10)
            client.reset(stream)
        client.call(1001)
        await client.some(1001, 10)
        assert len(served.dispatch.requests) == 101


@pytest.mark.parametrize("size", [0, 1, 2000, 16384])
async def test_headers_without_an_end_are_bounded(size: int) -> None:
    async with serving(says("a")) as served, peer(served) as client:
        client.send(HeadersFrame(1, BLOCK))
        for _ in range(100):
            client.send(ContinuationFrame(1, bytes(size)))
        assert await client.end() in (PROTOCOL_ERROR, CALM)


@pytest.mark.slow
async def test_a_client_that_floods_and_reads_nothing_is_cut_off() -> None:
    async with serving(says("x" * 200)) as served, peer(served) as client:
        client.stop_reading()
        for number in range(30_000):
            client.call(2 * number + 1)
            if number % 100 == 0:
                await asyncio.sleep(0)
            if not connections(served):
                break
        async with asyncio.timeout(20):
            await until(lambda: not connections(served) or not any(c.calls for c in connections(served)))
        for connection in connections(served):
            assert connection._transport is not None
            assert connection._transport.get_write_buffer_size() < 2 << 20


# -- time


async def test_a_client_that_says_nothing_is_closed() -> None:
    async with serving(says("a")) as served, peer(served, settle=False) as client:
        await until(lambda: bool(connections(served)))
        client.send(PREFACE[:10])
        sweep(served, h2_connection.HANDSHAKE_S - 1)
        assert connections(served)
        sweep(served, h2_connection.HANDSHAKE_S + 1)
        assert await client.end() is None


async def test_a_frame_that_does_not_become_whole_ends_its_connection() -> None:
    async with serving(hangs("a")) as served, peer(served) as client:
        client.call(1)
        await client.some(1, 10)
        client.send(b"\x00\x00\x08\x06\x00")
        await until(lambda: any(connection._intake._frames.pending for connection in connections(served)))
        sweep(served, 29)
        sweep(served, 31)
        assert await client.end() == CALM
        await within(served.dispatch.cancelled.wait())


async def test_headers_that_do_not_end_end_their_connection() -> None:
    async with serving(hangs("a")) as served, peer(served) as client:
        client.send(HeadersFrame(1, BLOCK))
        await until(lambda: any(connection._intake._frames.pending for connection in connections(served)))
        sweep(served, 31)
        assert await client.end() == CALM


async def test_a_silent_client_is_pinged_and_cut_off_when_it_does_not_answer() -> None:
    async with serving(hangs("a")) as served, peer(served) as client:
        client.call(1)
        await client.some(1, 10)
        sweep(served, 61)
        while not client.pings:
            await client.read()
        client.send(PingFrame(0, opaque_data=client.pings[0], flags=["ACK"]))
        await until(lambda: all(connection._pinged_at > 1e9 for connection in connections(served)))
        sweep(served, 61)
        sweep(served, 61 + 19)
        assert connections(served)
        sweep(served, 61 + 21)
        assert await client.end() is None
        await within(served.dispatch.cancelled.wait())


async def test_an_idle_connection_is_told_to_go() -> None:
    async with serving(says("a"), keepalive_time_s=1e6) as served, peer(served) as client:
        client.call(1)
        await client.answer(1)
        sweep(served, 1799)
        await client.echo()
        sweep(served, 1801)
        assert await client.end() == 0


async def test_an_ended_stream_that_nobody_reads_is_kept_for_a_while_only() -> None:
    async def script(request: Request, sink: Sink) -> None:
        sink.data(message("x" * 60_000), 1)
        await until(lambda: any(call.output.opened and call.output.window == 0 for call in calls(served)))
        raise ClientTooSlow("for this test")

    async with serving(script, keepalive_time_s=1e6) as served, peer(served, settings={4: 100}) as client:
        client.call(1)
        await within(served.dispatch.failed.wait())
        await until(lambda: any(call.abandoned for call in calls(served)))
        sweep(served, 0)
        sweep(served, h2_call.LINGER_S - 1)
        assert any(connection.calls for connection in connections(served))
        sweep(served, h2_call.LINGER_S + 1)
        assert (await client.answer(1)).reset == 8
        assert not any(connection.calls for connection in connections(served))


async def test_a_client_that_closes_its_side_is_gone() -> None:
    async with serving(hangs("a")) as served, peer(served) as client:
        client.call(1)
        await client.some(1, 10)
        client._writer.write_eof()
        await within(served.dispatch.cancelled.wait())


async def test_tls_without_http_2_is_closed(pems) -> None:  # type: ignore[no-untyped-def]
    files = {"tls_cert_file": str(pems / "server.pem"), "tls_key_file": str(pems / "server.key")}
    context = ssl.create_default_context(cafile=str(pems / "server.pem"))
    async with serving(says("a"), **files) as served:
        for protocols, code in ((["http/1.1"], None), ([], None), (["h2"], 0)):
            if protocols:
                context.set_alpn_protocols(protocols)
            try:
                async with peer(served, settle=False, tls=context) as client:
                    client.settle()
                    if code is None:
                        await client.end()
                        assert not client.settings
                    else:
                        client.call(1)
                        assert (await client.answer(1)).status == code
            except ssl.SSLError:
                assert protocols == ["http/1.1"]


async def test_a_message_cut_by_the_end_of_its_connection_leaves_nothing() -> None:
    async with serving(says("a")) as served:
        async with peer(served) as client:
            client.call(1, framed(bytes(50_000))[:20_000], end=False)
            await client.echo()
        await until(lambda: not connections(served) and not served.ingress._service.calls)
        async with peer(served) as client:
            client.call(1, BODY)
            assert (await client.answer(1)).status == 0
