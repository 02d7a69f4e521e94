"""The `h2` edge under random and mutated input: it never raises, logs no defect, and keeps nothing."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from hpack import Encoder
from hyperframe.frame import DataFrame, HeadersFrame, RstStreamFrame, SettingsFrame, WindowUpdateFrame
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.errors import ReplicaLost
from router.ingress.grpc_health import Health, standard_services
from router.ingress.grpc_requests import SERVICE
from router.ingress.grpc_service import InferenceService
from router.ingress.h2_connection import Connection
from router.ingress.h2_edge import H2Edge
from router.ingress.h2_frames import PREFACE
from router.options import GrpcOptions
from router.types import Request, Sink
from tests.unit.grpc_serving import FakeDispatch, FakeFleet, message, receipt
from tests.unit.h2_peer import BODY, HEADERS
from tests.unit.test_h2_parts import FakeTransport

pytestmark = pytest.mark.timeout(300)

STREAMS = st.one_of(st.sampled_from([0, 1, 3, 5, 7, 9]), st.integers(0, 2**31 - 1))
frames = st.builds(
    lambda kind, flags, stream, body: (
        len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body
    ),
    st.integers(0, 12),
    st.integers(0, 255),
    STREAMS,
    st.binary(max_size=60),
)
PATHS = (f"/{SERVICE}/Generate", f"/{SERVICE}/Embed", f"/{SERVICE}/Models", "/grpc.health.v1.Health/Watch", "/x/y")


def called(stream: int, path: str, body: bytes, end: bool, extra: list[tuple[str, str]]) -> bytes:
    """A call as clients make it; its stream's number may be of any kind."""
    fields = [(name, path if name == ":path" else value) for name, value in HEADERS] + extra
    stream = stream * 2 + 1
    head = HeadersFrame(stream, Encoder().encode(fields), flags=["END_HEADERS"])
    return head.serialize() + DataFrame(stream, body, flags=["END_STREAM"] if end else []).serialize()


calls = st.builds(
    called,
    st.integers(0, 20),
    st.sampled_from(PATHS),
    st.one_of(st.just(BODY), st.binary(max_size=20), st.just(BODY[:-1])),
    st.booleans(),
    st.lists(
        st.sampled_from([("grpc-timeout", "1m"), ("grpc-encoding", "gzip"), ("x-request-id", "a b"), ("a-bin", "&")]),
        max_size=2,
    ),
)
controls = st.one_of(
    st.builds(lambda stream, by: WindowUpdateFrame(stream, by).serialize(), STREAMS, st.integers(1, 2**31 - 1)),
    st.builds(lambda stream: RstStreamFrame(stream or 1, 8).serialize(), STREAMS),
    st.builds(
        lambda size, table: SettingsFrame(0, settings={4: size, 1: table}).serialize(),
        st.integers(0, 2**31 - 1),
        st.integers(0, 5000),
    ),
)
pieces = st.lists(st.one_of(calls, calls, controls, frames, st.binary(max_size=30)), max_size=12)


class Defects(logging.Handler):
    """What must not be logged."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(self.format(record))


async def script(request: Request, sink: Sink) -> None:
    sink.routed(receipt(request))
    for number in range(3):
        sink.data(message("word" * (number * 2000)), 1)
        await asyncio.sleep(0)
    if len(request.request_id) % 3 == 0:
        raise ReplicaLost("gone")
    if len(request.request_id) % 3 == 1:
        await asyncio.Event().wait()


async def fed(data: bytes, cuts: list[int], full_at: int) -> None:
    """One connection that gets `data` in pieces, and whose transport is full for a while."""
    loop = asyncio.get_running_loop()
    raised: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda loop, context: raised.append(context))
    options = GrpcOptions(
        max_message_bytes=1000, stream_buffer_bytes=5000, read_timeout_s=0.001, request_timeout_s=0.001
    )
    ids = iter(range(1000))
    service = InferenceService(
        options, FakeDispatch(script), FakeFleet(), lambda: "x" * (next(ids) % 5 + 1), lambda rpc, error: None
    )
    edge = H2Edge(
        options, SERVICE, service.handlers(), standard_services(Health(), with_reflection=True), reuse_port=False
    )
    connection, transport = Connection(edge, loop), FakeTransport()
    transport.write_eof = lambda: setattr(transport, "aborted", True)  # type: ignore[method-assign]
    connection.connection_made(transport)
    at = 0
    for turn, cut in enumerate([*cuts, len(data)]):
        if at >= len(data) or transport.aborted:
            break
        if turn == full_at:
            connection.pause_writing()
        elif turn == full_at + 3:
            connection.resume_writing()
        connection.data_received(data[at : at + cut])
        at += cut
        await asyncio.sleep(0)
    for _ in range(5):
        await asyncio.sleep(0)
        connection.sweep(loop.time() + 1)
    assert connection._closing or connection._judge.streams.keys() == connection.calls.keys()
    connection.connection_lost(None)
    if edge._tasks:
        _, pending = await asyncio.wait(tuple(edge._tasks), timeout=5)
        assert not pending
    assert not raised
    assert not connection.calls
    assert not connection.wire.waiting
    assert not service.calls
    assert connection._held == 0
    assert not edge._connections


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    pieces,
    st.lists(st.integers(1, 200), max_size=20),
    st.integers(0, 8),
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=3),
)
def test_no_input_leaves_a_traceback_a_hang_or_a_leak(
    parts: list[bytes], cuts: list[int], full_at: int, mutations: list[tuple[int, int]]
) -> None:
    data = bytearray(b"".join([PREFACE, SettingsFrame(0).serialize(), *parts]))
    for place, value in mutations:
        data[place % len(data)] = value
    defects = Defects()
    logging.getLogger("router.ingress").addHandler(defects)
    try:
        asyncio.run(asyncio.wait_for(fed(bytes(data), cuts, full_at), 20))
    finally:
        logging.getLogger("router.ingress").removeHandler(defects)
    assert not defects.found
