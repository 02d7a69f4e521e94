"""Random and mutated bytes at random splits: the server never hangs, never raises, and serves the next client."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.errors import KvlaneError
from router.ingress.http_parser import HttpRequest, RequestParser
from tests.unit.http_ingress.serving import CHAT, Served, get, post, served, stream

VALID = [
    get("/healthz"),
    get("/v1/models", "Origin: http://o"),
    post(),
    post("/tokenize", CHAT, "Expect: 100-continue", "Connection: close"),
    post("/v1/completions", CHAT, "Connection: Upgrade", "Upgrade: h2c"),
    b"POST /tokenize HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3c\r\n" + CHAT + b"\r\n0\r\n\r\n",
    get("/v1/responses/x", method="HEAD"),
    get("/healthz").replace(b"1.1", b"1.0"),
]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A few valid requests in a row with some bytes replaced, cut out or put in."""
    data = bytearray(b"".join(draw(st.lists(st.sampled_from(VALID), min_size=1, max_size=4))))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        upto = min(len(data), at + draw(st.integers(0, 6)))
        data[at:upto] = draw(
            st.one_of(st.binary(max_size=6), st.sampled_from([b"\r\n", b"\r\n\r\n", b":", b" ", b"0"]))
        )
    return bytes(data)


inputs = st.one_of(mutated(), mutated(), st.binary(max_size=200))
splits = st.lists(st.integers(0, 600), max_size=5)


def _pieces(data: bytes, at: list[int]) -> list[bytes]:
    bounds = sorted({0, len(data), *(cut for cut in at if cut < len(data))})
    return [data[start:end] for start, end in itertools.pairwise(bounds)]


def _parsed(pieces: list[bytes]) -> list[tuple[object, ...]]:
    parser = RequestParser(1 << 16, 1 << 20)
    for piece in pieces:
        parser.feed(piece)
    return [
        (item.method, item.target, tuple(item.headers), item.body, item.keep_alive)
        if isinstance(item, HttpRequest)
        else (type(item),)
        for item in parser.complete
    ]


@settings(derandomize=True, max_examples=400)
@given(inputs, splits)
def test_how_reads_split_the_bytes_never_changes_what_is_parsed(data: bytes, at: list[int]) -> None:
    whole = _parsed([data])
    assert _parsed(_pieces(data, at)) == whole
    assert all(issubclass(item[0], KvlaneError) for item in whole if isinstance(item[0], type))


async def _torment(serving: Served, pieces: list[bytes]) -> None:
    client = await serving.connect()
    for piece in pieces:
        if client.writer.transport.is_closing():
            break  # The server has answered and closed already.
        client.write(piece)
        await asyncio.sleep(0)
    try:
        client.writer.write_eof()
    except (RuntimeError, OSError):
        pass  # Where the server has closed meanwhile.
    try:
        await client.rest()
    except ConnectionResetError:
        pass  # A request under way is dropped when its client half-closes.
    await client.close()
    assert (await serving.say(get("/healthz"))).body == b"ok"


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_no_bytes_hang_the_server_or_raise_in_its_loop(
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    examples = 2 * settings().max_examples  # 200, but with a profile that wants fewer.
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        context = served(stream)
        serving = runner.run(context.__aenter__())

        @settings(derandomize=True, max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(inputs, splits)
        def torment(data: bytes, at: list[int]) -> None:
            runner.run(_torment(serving, _pieces(data, at)))
            assert not serving.defects

        torment()
        runner.run(context.__aexit__(None, None, None))
