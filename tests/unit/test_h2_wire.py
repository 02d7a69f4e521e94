"""The `h2` edge as HTTP/2 sees it: heads, messages, flow control, ends of streams; asked frame by frame."""

from __future__ import annotations

import asyncio
import gc
import gzip
import zlib

import grpc
import pytest
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    GoAwayFrame,
    HeadersFrame,
    PriorityFrame,
    SettingsFrame,
)
from kvlane.v1 import inference_pb2 as pb

from router.errors import ModelNotFound
from router.ingress import h2_call
from router.ingress.h2_call import H2Call
from router.ingress.h2_edge import H2Edge
from router.ingress.h2_output import Output
from router.types import Request, Sink
from tests.unit.grpc_serving import (
    PROMPT,
    Served,
    fails,
    hangs,
    message,
    receipt,
    says,
    serving,
    until,
    within,
)
from tests.unit.h2_peer import BODY, HEADERS, Peer, framed, messages, peer

pytestmark = pytest.mark.timeout(60)


def texts(data: bytes) -> list[str]:
    """The text of each message; empty for the route."""
    return [pb.GenerateResponse.FromString(each).text for each in messages(data)]


def with_headers(**changes: str | None) -> list[tuple[str, str]]:
    """The usual headers with these instead; None leaves one out."""
    named = {name.replace("_", "-").replace("--", ":"): value for name, value in changes.items()}
    kept = [(name, value) for name, value in HEADERS if name not in named]
    added = [(name, value) for name, value in named.items() if value is not None]
    return sorted(kept + added, key=lambda field: not field[0].startswith(":"))


def edge_of(served: Served) -> H2Edge:
    edge = served.ingress._edge
    assert isinstance(edge, H2Edge)
    return edge


# -- heads


async def test_a_call_gets_head_messages_and_trailers() -> None:
    async with serving(says("a", "b")) as served, peer(served) as client:
        client.call(1, headers=[*HEADERS, ("x-request-id", "mine")])
        answer = await client.answer(1)
        assert answer.headers == {
            ":status": "200",
            "content-type": "application/grpc",
            "grpc-accept-encoding": "identity,deflate,gzip",
            "x-request-id": "mine",
        }
        assert texts(answer.data) == ["", "a", "b"]
        assert answer.trailers == {"grpc-status": "0"}
        assert answer.reset is None


async def test_an_error_before_any_output_is_one_block_of_headers() -> None:
    async with serving(fails(ModelNotFound("no ä % model\n "))) as served, peer(served) as client:
        client.call(1)
        answer = await client.answer(1)
        assert answer.trailers == {}
        assert (answer.headers[":status"], answer.headers["grpc-status"]) == ("200", "5")
        assert answer.headers["grpc-message"] == "no %C3%A4 %25 model%0A%20"
        assert answer.headers["kvlane-error"] == "model_not_found"


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"content_type": "application/grpc+proto"}, "200", 0),
        ({"content_type": "application/grpc;charset=utf-8"}, "200", 0),
        ({"content_type": "application/json"}, "415", 2),
        ({"content_type": "application/grpcx"}, "415", 2),
        ({"content_type": None}, "415", 2),
        ({"__method": "GET"}, "405", 12),
        ({"te": None}, "200", 13),
        ({"te": "gzip"}, None, None),  # HTTP/2 itself forbids it.
        ({"grpc_timeout": "99999999H"}, "200", 0),
        ({"grpc_timeout": "1"}, "200", 13),
        ({"grpc_timeout": "123456789S"}, "200", 13),
        ({"grpc_timeout": "-1S"}, "200", 13),
        ({"grpc_timeout": "0n"}, "200", 4),
        ({"grpc_encoding": "br"}, "200", 12),
        ({"some_bin": "AAEC"}, "200", 0),
        ({"some_bin": "no base64!"}, "200", 0),
        ({"x_request_id": "ä"}, "200", 0),
        ({"__path": "/kvlane.v1.Inference/Nope"}, "200", 12),
        ({"__path": "/other.Service/Generate"}, "200", 12),
        ({"__path": "*"}, "200", 12),
    ],
)
async def test_each_head_leads_to_a_call_or_one_refusal(
    changes: dict[str, str | None], status: str | None, code: int | None
) -> None:
    async with serving(says("a")) as served, peer(served) as client:
        client.call(1, headers=with_headers(**changes))
        if status is None:
            assert await client.end() == 1
            return
        answer = await client.answer(1)
        assert (answer.headers[":status"], answer.status) == (status, code)
        client.call(3)
        assert (await client.answer(3)).status == 0


async def test_an_unknown_encoding_is_told_which_are_known() -> None:
    async with serving(says("a")) as served, peer(served) as client:
        client.call(1, headers=[*HEADERS, ("grpc-encoding", "br")])
        answer = await client.answer(1)
        assert answer.headers["grpc-accept-encoding"] == "identity,deflate,gzip"


async def test_headers_above_the_limit_refuse_the_call_and_far_above_it_the_connection() -> None:
    async with serving(says("a")) as served, peer(served) as client:
        assert client.settings[6] == 16384
        client.call(1, headers=[*HEADERS, ("x-large", "v" * 14_000)])
        assert (await client.answer(1)).status == 0
        client.call(3, headers=[*HEADERS, *((f"x-{number}", "v" * 6000) for number in range(3))])
        assert (await client.answer(3)).status == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        block = client.encoder.encode([*HEADERS, ("x-huge", "~" * 70_000)], huffman=False)
        pieces = [block[at : at + 16384] for at in range(0, len(block), 16384)]
        client.send(HeadersFrame(5, pieces[0]), *(ContinuationFrame(5, piece) for piece in pieces[1:]))
        assert await client.end() == 11


async def test_a_list_of_headers_that_grows_by_its_compression_costs_the_connection() -> None:
    async with serving(says("a")) as served, peer(served) as client:
        block = client.encoder.encode([*HEADERS, ("x-large", "v" * 3000)])
        again = client.encoder.encode([("x-large", "v" * 3000)]) * 50
        client.send(HeadersFrame(1, block + again, flags=["END_HEADERS"]))
        assert await client.end() == 11


async def test_a_client_without_a_header_table_is_told_that_ours_is_empty() -> None:
    async with serving(says("a")) as served, peer(served, settings={1: 0}) as client:
        client.decoder.max_allowed_table_size = 0  # hpack refuses a block that does not say so.
        client.call(1)
        assert (await client.answer(1)).status == 0
        client.call(3, headers=with_headers(content_type="x"))
        assert (await client.answer(3)).headers[":status"] == "415"


# -- messages


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@pytest.mark.parametrize("size", [10, 200_000])
async def test_compressed_requests_are_read(encoding: str, size: int) -> None:
    request = pb.GenerateRequest(model="tiny", text="".join(f"{number} " for number in range(size // 5)))
    body = request.SerializeToString()
    packed = gzip.compress(body) if encoding == "gzip" else zlib.compress(body)
    async with serving(says("a")) as served, peer(served) as client:
        client.call(1, framed(packed, compressed=True), headers=[*HEADERS, ("grpc-encoding", encoding)])
        assert (await client.answer(1)).status == 0
        client.call(3, framed(body), headers=[*HEADERS, ("grpc-encoding", encoding)])
        assert (await client.answer(3)).status == 0
    assert [each.body for each in served.dispatch.requests] == [body, body]


NO_MESSAGES: dict[str, tuple[bytes | None, str, str]] = {
    "gzip bomb": (framed(gzip.compress(bytes(1_000_000)), compressed=True), "gzip", "RESOURCE_EXHAUSTED"),
    "deflate, one byte too many": (
        framed(zlib.compress(bytes(100_001)), compressed=True),
        "deflate",
        "RESOURCE_EXHAUSTED",
    ),
    "no gzip": (framed(b"no gzip", compressed=True), "gzip", "INTERNAL"),
    "half a gzip": (framed(gzip.compress(b"x" * 5000)[:-9], compressed=True), "gzip", "INTERNAL"),
    "compressed, by nothing": (framed(b"x", compressed=True), "identity", "INTERNAL"),
    "unknown flag": (b"\x02\x00\x00\x00\x01x", "identity", "INTERNAL"),
    "one byte too many": (b"\x00\x00\x01\x86\xa1", "identity", "RESOURCE_EXHAUSTED"),
    "4 GiB": (b"\x00\xff\xff\xff\xff", "identity", "RESOURCE_EXHAUSTED"),
    "half a message": (b"\x00\x00\x00\x00\x09half", "identity", "INVALID_ARGUMENT"),
    "half a prefix": (b"\x00\x00", "identity", "INVALID_ARGUMENT"),
    "empty": (b"", "identity", "INVALID_ARGUMENT"),
    "headers alone": (None, "identity", "INVALID_ARGUMENT"),
}


@pytest.mark.parametrize("case", NO_MESSAGES)
async def test_a_request_that_is_no_message_is_refused_and_no_other_call_minds(case: str) -> None:
    body, encoding, code = NO_MESSAGES[case]
    async with serving(says("a"), max_message_bytes=100_000) as served, peer(served) as client:
        client.call(1, body, headers=[*HEADERS, ("grpc-encoding", encoding)])
        client.call(3)
        assert (await client.answer(1)).status == grpc.StatusCode[code].value[0]
        assert (await client.answer(3)).status == 0


async def test_a_message_over_the_limit_is_refused_before_it_comes() -> None:
    async with serving(says("a"), max_message_bytes=100) as served, peer(served) as client:
        client.call(1, b"\x00\x00\x00\x00\x65", end=False)
        answer = await client.answer(1)
        assert answer.status == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        client.data(1, bytes(50))  # What it had under way does no harm.
        client.call(3, framed(pb.GenerateRequest(model="tiny", text="hi").SerializeToString()))
        assert (await client.answer(3)).status == 0


async def test_a_request_in_many_pieces_is_put_together() -> None:
    async with serving(says("a")) as served, peer(served) as client:
        client.call(1, None, end=False)
        for at in range(len(BODY)):
            client.data(1, BODY[at : at + 1])
        assert (await client.answer(1)).status == 0
    assert served.dispatch.requests[0].body == PROMPT.SerializeToString()


async def test_only_the_first_message_of_a_request_counts() -> None:
    async with serving(says("a")) as served, peer(served) as client:
        client.call(1, BODY + framed(b"\xff" * 50))
        assert (await client.answer(1)).status == 0
        assert len(served.dispatch.requests) == 1


async def test_padded_data_is_read_and_its_window_given_back() -> None:
    async with serving(says("a")) as served, peer(served) as client:
        client.call(1, None, end=False)
        padded = DataFrame(1, BODY, pad_length=100, flags=["PADDED", "END_STREAM"])
        client.send(padded)
        assert (await client.answer(1)).status == 0


async def test_requests_that_never_become_whole_are_bounded_per_connection() -> None:
    async with serving(says("a"), max_message_bytes=10_000) as served, peer(served) as client:
        for stream in range(1, 21, 2):
            client.call(stream, b"\x00\x00\x00\x27\x10" + bytes(9_000), end=False)
        async with asyncio.timeout(10):
            while not client.ended:
                await client.read()
        assert {client.answers[stream].status for stream in client.ended} == {8}
        assert 1 <= len(client.ended) <= 3
        client.reset(3)
        client.call(31)
        assert (await client.answer(31)).status == 0


async def test_what_comes_for_a_refused_call_keeps_the_connection_going() -> None:
    async with serving(says("a"), max_message_bytes=100) as served, peer(served) as client:
        client.call(1, b"\x00\x00\x10\x00\x00", end=False)
        await client.answer(1)
        before = client.window_opened
        for _ in range(200):
            client.data(1, bytes(16384))
        client.call(3)
        assert (await client.answer(3)).status == 0
        assert client.window_opened > before


# -- flow control


async def test_a_window_of_a_few_bytes_lets_a_few_bytes_pass() -> None:
    async with serving(says("abcdef" * 100)) as served, peer(served, settings={4: 10}) as client:
        client.call(1)
        assert len(await client.some(1, 10)) == 10
        await client.echo()
        assert len(client.answers[1].data) == 10
        client.open_window(1, 7)
        assert len(await client.some(1, 17)) == 17
        client.open_window(1, 10_000)
        assert texts((await client.answer(1)).data) == ["", "abcdef" * 100]


async def test_messages_that_wait_leave_in_one_frame() -> None:
    words = [f"word {number}" for number in range(100)]
    async with serving(says(*words)) as served, peer(served, settings={4: 0}) as client:
        client.call(1)
        await until(lambda: unread_bytes(served) > sum(len(message(word)) + 5 for word in words))
        client.open_window(1, 60_000)
        answer = await client.answer(1)
        assert texts(answer.data) == ["", *words]
        assert answer.frames == 1


def unread_bytes(served: Served) -> int:
    """What waits for clients, all streams together."""
    return sum(
        call.output.unread_bytes for connection in edge_of(served)._connections for call in connection.calls.values()
    )


async def test_a_stalled_stream_delays_no_other() -> None:
    async with serving(says("x" * 5000)) as served, peer(served, settings={4: 100}) as client:
        client.call(1)
        await client.some(1, 100)
        client.send(SettingsFrame(0, settings={4: 10_000}))  # Opens all streams' windows…
        await client.answer(1)
        client.send(SettingsFrame(0, settings={4: 0}))
        client.call(3)
        client.call(5)
        client.open_window(5, 10_000)  # … and this one's alone.
        assert texts((await client.answer(5)).data) == ["", "x" * 5000]
        assert client.answers.get(3) is None or client.answers[3].data == b""
        client.open_window(3, 10_000)
        assert texts((await client.answer(3)).data) == ["", "x" * 5000]


async def test_a_window_may_become_negative() -> None:
    async with serving(says("x" * 5000)) as served, peer(served, settings={4: 3000}) as client:
        client.call(1)
        await client.some(1, 3000)
        client.send(SettingsFrame(0, settings={4: 1000}))
        client.open_window(1, 2000)  # Now it is at 0.
        await client.echo()
        assert len(client.answers[1].data) == 3000
        client.open_window(1, 5000)
        assert texts((await client.answer(1)).data) == ["", "x" * 5000]


async def test_an_exhausted_connection_window_holds_data_and_nothing_else() -> None:
    async with serving(says("x" * 40_000)) as served, peer(served, settings={4: 1 << 20}) as client:
        for stream in (1, 3):
            client.call(stream)
        async with asyncio.timeout(10):
            while sum(len(answer.data) for answer in client.answers.values()) < 65535:
                await client.read()
        served.dispatch.script = fails(ModelNotFound("gone"))
        client.call(5)
        assert (await client.answer(5)).status == 5  # Headers need no window.
        assert sum(len(answer.data) for answer in client.answers.values()) == 65535
        client.open_window(0, 1 << 20)
        for stream in (1, 3):
            assert texts((await client.answer(stream)).data) == ["", "x" * 40_000]


async def test_streams_that_wait_for_the_connection_take_turns() -> None:
    async with serving(says("x" * 100_000)) as served, peer(served, settings={4: 1 << 20}) as client:
        for stream in (1, 3, 5):
            client.call(stream)
        await client.some(1, 16384)
        await until(lambda: len(served.dispatch.requests) == 3)
        order = []
        client.open_window(0, 1 << 20)
        while len(client.ended) < 3:
            frame = await client.read()
            if isinstance(frame, DataFrame):
                order.append(frame.stream_id)
        assert order[:6].count(1) <= 3
        assert {3, 5} <= set(order[:6])


@pytest.mark.parametrize(("increment", "code"), [(0x7FFFFFFF, 3), (0, 1)])
async def test_a_bad_window_update_resets_its_stream_alone(increment: int, code: int) -> None:
    async with serving(hangs("a")) as served, peer(served) as client:
        client.call(1)
        client.call(3)
        await client.some(1, 10)
        client.send(b"\0\0\4\x08\0" + (1).to_bytes(4, "big") + increment.to_bytes(4, "big"))
        assert (await client.answer(1)).reset == code
        await within(served.dispatch.cancelled.wait())
        await client.echo()
        assert 3 not in client.ended


@pytest.mark.parametrize(("increment", "code"), [(0x7FFFFFFF, 3), (0, 1)])
async def test_a_bad_window_update_of_the_connection_ends_it(increment: int, code: int) -> None:
    async with serving(hangs("a")) as served, peer(served) as client:
        client.send(b"\0\0\4\x08\0\0\0\0\0" + increment.to_bytes(4, "big"))
        assert await client.end() == code


async def test_initial_windows_beyond_their_bounds_end_the_connection() -> None:
    async with serving(hangs("a")) as served, peer(served) as client:
        client.call(1)
        await client.some(1, 10)
        client.open_window(1, 0x7FFFFFFF - 65535)
        client.send(SettingsFrame(0, settings={4: 70_000}))
        assert await client.end() == 3
        await within(served.dispatch.cancelled.wait())


async def test_a_client_that_reads_nothing_costs_a_bounded_buffer_and_its_stream() -> None:
    async def script(request: Request, sink: Sink) -> None:
        sink.routed(receipt(request))
        while True:
            sink.data(message("x" * 60_000), 1)
            await asyncio.sleep(0)

    wide = {4: 0x7FFFFFFF}
    async with serving(script, stream_buffer_bytes=1 << 20) as served, peer(served, settings=wide) as client:
        client.stop_reading()
        client.open_window(0, 0x7FFFFFFF - 65535)
        client.call(1)
        await within(served.dispatch.failed.wait())
        (connection,) = edge_of(served)._connections
        assert connection._transport is not None
        assert connection._transport.get_write_buffer_size() < 1 << 20
        assert sum(call.output.unread_bytes for call in connection.calls.values()) < 1 << 20


# -- ends


async def test_a_reset_cancels_the_request_and_frees_the_stream() -> None:
    async with serving(hangs("a")) as served, peer(served) as client:
        client.call(1)
        await client.some(1, 10)
        client.reset(1)
        await within(served.dispatch.cancelled.wait())
        (connection,) = edge_of(served)._connections
        assert not connection.calls
        assert not connection._judge.streams
        client.open_window(1, 10)  # Late frames of it are no fault.
        client.reset(1)
        client.data(1, b"late")
        await client.echo()


async def test_a_call_that_ends_before_its_request_asks_the_client_to_stop_sending() -> None:
    async with serving(fails(ModelNotFound("no"))) as served, peer(served) as client:
        client.call(1, BODY, end=False)
        answer = await client.answer(1)
        assert answer.status == 5
        await client.read()
        assert answer.reset == 0


async def test_a_deadline_that_nobody_keeps_ends_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(hangs("a")) as served, peer(served) as client:
        client.call(1, headers=[*HEADERS, ("grpc-timeout", "50m")])
        answer = await client.answer(1)
        assert answer.status == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        assert texts(answer.data) == ["", "a"]
        await within(served.dispatch.cancelled.wait())


async def test_a_deadline_in_the_middle_of_a_message_resets_the_stream() -> None:
    async with serving(hangs("x" * 5000)) as served, peer(served, settings={4: 1000}) as client:
        client.call(1, headers=[*HEADERS, ("grpc-timeout", "50m")])
        assert (await client.answer(1)).reset == 8
        await within(served.dispatch.cancelled.wait())


async def test_a_client_that_goes_away_finishes_what_it_has_asked() -> None:
    go_on = asyncio.Event()

    async def script(request: Request, sink: Sink) -> None:
        sink.data(message("a"), 1)
        await go_on.wait()
        sink.data(message("b"), 1)

    async with serving(script) as served, peer(served) as client:
        client.call(1)
        await client.some(1, 5)
        client.send(GoAwayFrame(0))
        await client.echo()
        go_on.set()
        assert texts((await client.answer(1)).data) == ["a", "b"]
        assert await client.end() is None


async def test_stop_says_goodbye_refuses_new_calls_and_finishes_the_old() -> None:
    go_on = asyncio.Event()

    async def script(request: Request, sink: Sink) -> None:
        sink.data(message("a"), 1)
        await go_on.wait()
        sink.data(message("b"), 1)

    async with serving(script) as served, peer(served) as client:
        client.call(1)
        await client.some(1, 5)
        stopping = asyncio.create_task(served.ingress.stop(60))
        while client.goaway is None:
            await client.read()
        assert (client.goaway.error_code, client.goaway.last_stream_id) == (0, 1)
        client.call(3)
        assert (await client.answer(3)).reset == 7
        go_on.set()
        assert texts((await client.answer(1)).data) == ["a", "b"]
        assert await client.end() == 0
        await client.close()
        await within(stopping)


async def test_streams_beyond_the_limit_are_refused_one_by_one() -> None:
    async with serving(hangs("a"), max_concurrent_streams=2) as served, peer(served) as client:
        assert client.settings[3] == 2
        for stream in (1, 3, 5):
            client.call(stream)
        assert (await client.answer(5)).reset == 7
        client.reset(1)
        client.call(7)
        await client.some(7, 10)
        assert 3 not in client.ended


async def test_connections_beyond_the_limit_are_closed() -> None:
    async with serving(says("a"), max_connections=1) as served, peer(served) as client:
        async with peer(served, settle=False) as other:
            assert await other.end() is None
        client.call(1)
        assert (await client.answer(1)).status == 0


async def test_frames_that_nobody_knows_are_passed_over() -> None:
    async with serving(says("a")) as served, peer(served) as client:
        client.send(b"\0\0\x05\x42\0\0\0\0\0what?", PriorityFrame(1, depends_on=0, stream_weight=1))
        client.call(1)
        assert (await client.answer(1)).status == 0


async def test_a_stream_of_requests_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h2_call, "MAX_UNREAD_MESSAGES", 3)
    path = [(name, "/kvlane.v1.Inference/Nope" if name == ":path" else value) for name, value in HEADERS]
    async with serving(says("a")) as served, peer(served) as client:
        client.call(1, framed(b"") * 10, headers=path)
        assert (await client.answer(1)).status == 12
        await client.echo()


async def test_headers_that_come_again_are_read_again() -> None:
    """The same bytes mean something else once the table has changed, and trailers open no call."""
    async with serving(says("a")) as served, peer(served) as client:
        client.call(1, headers=[*HEADERS, ("x-session-id", "one")])
        for stream in (3, 5):
            client.call(stream, headers=[*HEADERS, ("x-session-id", "one")])
        client.call(7, headers=[*HEADERS, ("x-session-id", "two")])
        for stream in (9, 11):
            client.call(stream, headers=[*HEADERS, ("x-session-id", "one")])
            await client.answer(stream)
        assert [request.session_id for request in served.dispatch.requests] == ["one"] * 3 + ["two"] + ["one"] * 2
        trailers = [("x-session-id", "one")]
        for stream in (13, 15):
            client.call(stream, BODY, end=False)
            block = client.encoder.encode(trailers)
            client.send(HeadersFrame(stream, block, flags=["END_HEADERS", "END_STREAM"]))
            assert (await client.answer(stream)).status == 0
        client.send(HeadersFrame(17, client.encoder.encode(trailers), flags=["END_HEADERS"]))
        assert await client.end() == 1


async def test_a_request_may_end_by_an_empty_frame() -> None:
    async with serving(says("a")) as served, peer(served) as client:
        client.open_window(0, 1 << 24)
        for number in range(1500):
            client.call(2 * number + 1, BODY, end=False)
            client.send(DataFrame(2 * number + 1, b"", flags=["END_STREAM"]))
            if number % 50 == 0:
                await client.answer(2 * number + 1)
        assert (await client.answer(2999)).status == 0


async def test_data_after_the_end_of_a_request_resets_its_stream() -> None:
    async with serving(hangs("a")) as served, peer(served) as client:
        client.call(1)
        await client.some(1, 10)
        client.data(1, b"more")
        assert (await client.answer(1)).reset == 5
        await within(served.dispatch.cancelled.wait())
        await client.echo()


async def test_a_client_that_sends_what_nobody_reads_is_stopped_by_its_window() -> None:
    async with serving(hangs("a")) as served, peer(served) as client:
        client.call(1, BODY, end=False)
        await client.some(1, 10)
        for _ in range(30):  # More than the stream's window.
            client.data(1, bytes(16384))
        await client.echo()
        assert client.stream_windows.get(1, 0) == 0
        client.call(3, BODY, end=False)
        await client.some(3, 10)


async def test_ended_calls_leave_nothing_to_the_garbage_collector() -> None:
    async with serving(says("a")) as served, peer(served) as client:
        await client.echo()
        gc.collect()
        gc.disable()
        try:
            for number in range(20):
                client.call(4 * number + 1)
                await client.answer(4 * number + 1)
                served.dispatch.script = hangs("a")
                client.call(4 * number + 3)
                await client.some(4 * number + 3, 10)
                client.reset(4 * number + 3)
                served.dispatch.script = says("a")
            await until(lambda: not edge_of(served)._tasks)
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            assert not [each for each in gc.garbage if isinstance(each, H2Call | Output | asyncio.Task)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()


async def _many(client: Peer, count: int) -> None:
    for stream in range(1, 2 * count, 2):
        client.call(stream)
    for stream in range(1, 2 * count, 2):
        assert texts((await client.answer(stream)).data) == ["", "a", "b"]


async def test_nothing_is_left_of_calls_that_ended() -> None:
    async with serving(says("a", "b")) as served, peer(served) as client:
        await _many(client, 300)
        (connection,) = edge_of(served)._connections
        assert not connection.calls
        assert not connection._judge.streams
        assert len(connection._judge._closed_streams) <= 256
        assert connection._held == 0
        await until(lambda: not edge_of(served)._tasks)
