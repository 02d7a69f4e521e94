"""The `h2` edge as HTTP/2 sees it: heads and messages; asked frame by frame."""

from __future__ import annotations

import asyncio
import gzip
import zlib

import grpc
import pytest
from hyperframe.frame import ContinuationFrame, DataFrame, HeadersFrame, PriorityFrame
from kvlane.v1 import inference_pb2 as pb

from router.errors import ModelNotFound
from router.ingress import h2_call
from tests.unit.grpc_serving import PROMPT, fails, says, serving
from tests.unit.h2_peer import BODY, HEADERS, framed, peer, texts

pytestmark = pytest.mark.timeout(60)


def with_headers(**changes: str | None) -> list[tuple[str, str]]:
    """The usual headers with these instead; None leaves one out."""
    named = {name.replace("_", "-").replace("--", ":"): value for name, value in changes.items()}
    kept = [(name, value) for name, value in HEADERS if name not in named]
    added = [(name, value) for name, value in named.items() if value is not None]
    return sorted(kept + added, key=lambda field: not field[0].startswith(":"))


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
        ({"te": "gzip"}, "400", 13),  # HTTP/2 itself forbids it.
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
async def test_each_head_leads_to_a_call_or_one_refusal(changes: dict[str, str | None], status: str, code: int) -> None:
    async with serving(says("a")) as served, peer(served) as client:
        client.call(1, headers=with_headers(**changes))
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
        assert (await client.answer(17)).headers[":status"] == "400"


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


async def test_a_request_may_end_by_an_empty_frame() -> None:
    async with serving(says("a")) as served, peer(served) as client:
        client.open_window(0, 1 << 24)
        for number in range(1500):
            client.call(2 * number + 1, BODY, end=False)
            client.send(DataFrame(2 * number + 1, b"", flags=["END_STREAM"]))
            if number % 50 == 0:
                await client.answer(2 * number + 1)
        assert (await client.answer(2999)).status == 0
