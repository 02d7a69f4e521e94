"""The bench of routers side by side: what is read out of answers."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvlane.v1 import inference_pb2 as pb

from loadtests.peers.answers import Answer, read_grpc, read_http, tally

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\ncontent-type: text/event-stream\r\n\r\n"


def event(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "text": text}]}).encode() + b"\n\n"


def framed(*parts: bytes) -> bytes:
    return HEAD + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def prefixed(message: bytes) -> bytes:
    return b"\x00" + len(message).to_bytes(4, "big") + message


DONE = b"data: [DONE]\n\n"
STREAM = (event("a01 "), event("b02 "), event("c03 ") + DONE)


def cut(raw: bytes, places: list[int]) -> list[bytes]:
    """As several reads return it."""
    edges = sorted({0, len(raw), *places})
    return [raw[begin:end] for begin, end in pairwise(edges)]


def answer(pieces: list[bytes], tokens: int) -> Answer:
    return Answer(tokens, asked_at=10.0, times=[11.0 + number for number in range(len(pieces))], pieces=pieces)


@given(places=st.lists(st.integers(1, len(framed(*STREAM)) - 1), max_size=30))
def test_counts_do_not_depend_on_how_an_answer_was_cut(places: list[int]) -> None:
    chunks = read_http(answer(cut(framed(*STREAM), places), 3))
    assert [tokens for _, tokens in chunks] == [1, 1, 1]
    times = [at for at, _ in chunks]
    assert times == sorted(times)


def test_an_event_has_come_with_the_read_that_completes_it() -> None:
    raw = framed(*STREAM)
    middle = raw.index(b"b02")
    assert [at for at, _ in read_http(answer(cut(raw, [len(HEAD), middle]), 3))] == [12.0, 13.0, 13.0]


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_events_may_lie_across_the_parts_of_a_body(sizes: list[int]) -> None:
    body, parts = b"".join(STREAM), []
    for size in sizes:
        parts.append(body[:size])
        body = body[size:]
    raw = framed(*(part for part in (*parts, body) if part))
    assert [tokens for _, tokens in read_http(answer([raw], 3))] == [1, 1, 1]


def test_joined_tokens_are_fewer_chunks_and_as_many_tokens() -> None:
    joined = framed(event("a01 b02 "), event("c03 ") + DONE)
    total = tally([answer([joined], 3), answer([framed(*STREAM)], 3)], read_http, 1.0)
    assert (total.requests, total.chunks, total.tokens, total.errors) == (2, 5, 6, 0)


def test_gaps_are_between_tokens_and_the_first_counts_from_the_request() -> None:
    raw = framed(event("a01 "), event("b02 c03 ") + DONE)
    pieces = cut(raw, [raw.rindex(b"data: {")])
    total = tally([Answer(3, asked_at=1.0, times=[1.5, 1.75], pieces=pieces)], read_http, 1.0)
    assert total.ttft_s == [0.5]
    assert sorted(total.gaps_s) == [0.0, 0.25]


def test_chat_events_and_comments_are_understood() -> None:
    role = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
    word = b'data: {"choices":[{"delta":{"content":"a01 "}}]}\n\n'
    usage = b'data: {"choices":[],"usage":{"completion_tokens":1}}\n\n'
    raw = framed(b": keep-alive\n\n", role, word, usage, DONE)
    assert [tokens for _, tokens in read_http(answer([raw], 1))] == [1]


@pytest.mark.parametrize(
    ("raw", "cause"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n", "503"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", "not streamed"),
        (b"", "no answer"),
        (framed(event("a01 ")), "without its end"),
        (framed(event("a01 "), DONE)[:-5], "without its end"),
        (framed(b'data: {"error":{"message":"lost"}}\n\n', DONE), "an error event"),
        (framed(b"data: {nonsense\n\n", DONE), "no JSON"),
        (framed(event("a01 "), DONE), "1 of 3 tokens"),
        (framed(DONE), "0 of 3 tokens"),
    ],
)
def test_what_is_not_whole_is_an_error_with_its_cause(raw: bytes, cause: str) -> None:
    total = tally([answer([raw] if raw else [], 3)], read_http, 1.0)
    assert (total.requests, total.chunks, total.errors) == (0, 0, 1)
    assert cause in next(iter(total.causes))


def test_only_what_came_in_time_counts_at_saturation() -> None:
    pieces = [framed(*STREAM)[: len(HEAD) + 60], framed(*STREAM)[len(HEAD) + 60 :]]
    late = Answer(3, asked_at=0.0, times=[1.0, 5.0], pieces=pieces)
    total = tally([late], read_http, 3.0, until=3.0)
    assert (total.requests, total.chunks, total.errors) == (0, 1, 0)


def test_grpc_messages_with_text_are_chunks() -> None:
    messages = [
        pb.GenerateResponse(route=pb.Route(replica="r")),
        pb.GenerateResponse(text="a01 "),
        pb.GenerateResponse(text="b02 c03 ", finish_reason="length"),
    ]
    packed = [prefixed(message.SerializeToString()) for message in messages]
    total = tally([answer(packed, 3)], read_grpc, 1.0)
    assert (total.requests, total.chunks, total.tokens, total.errors) == (1, 2, 3, 0)


@given(places=st.lists(st.integers(1, 40), max_size=10))
def test_messages_may_be_cut_anywhere_and_come_with_their_last_byte(places: list[int]) -> None:
    raw = b"".join(prefixed(pb.GenerateResponse(text=text).SerializeToString()) for text in ("a01 ", "b02 ", "c03 "))
    pieces = cut(raw, [place for place in places if place < len(raw)])
    chunks = read_grpc(answer(pieces, 3))
    assert [tokens for _, tokens in chunks] == [1, 1, 1]
    assert chunks[-1][0] == 10.0 + len(pieces)


@pytest.mark.parametrize(
    "raw", [prefixed(b"\xff\xff"), b"\x01" + prefixed(b"")[1:], prefixed(b"whole")[:-1], b"\x00\x00"]
)
def test_what_is_no_message_is_an_error(raw: bytes) -> None:
    assert tally([answer([raw], 3)], read_grpc, 1.0).errors == 1
