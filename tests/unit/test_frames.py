"""The frame codec: what goes in comes out, whatever the cuts; what is no frame is refused."""

import ctypes
import itertools
from unittest import mock

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.lane import frames
from router.types import EngineInfo, Load, ModelCard, RouteInfo

small = st.integers(0, 2**31)
text = st.text(max_size=20)
blob = st.binary(max_size=200)
pairs = st.lists(st.tuples(text, text), max_size=3).map(tuple)
loads = st.builds(Load, small, small, small, st.floats(0, 1), st.floats(0, 1e6), asleep=st.booleans())
infos = st.builds(
    EngineInfo,
    kind=text,
    models=st.lists(st.builds(ModelCard, text, text, small), max_size=2).map(tuple),
    routes=st.lists(st.builds(RouteInfo, text, st.lists(text, max_size=2).map(tuple)), max_size=2).map(tuple),
)
ends = st.none() | st.builds(frames.End, text, text, text, st.none() | text)
heads = st.none() | st.builds(frames.Head, st.integers(100, 599), pairs)
outputs = st.builds(frames.Output, small, blob, small, ends, heads)
up = st.one_of(
    st.builds(frames.Hello, small, blob, text),
    st.builds(frames.Submit, small, text, st.integers(0, 1), text, text, pairs, blob, st.none() | st.floats(0, 1e6)),
    st.builds(frames.Abort, small),
    st.builds(frames.Ping, small),
    st.builds(frames.Wake),
)
down = st.one_of(
    st.builds(frames.Challenge, small, blob),
    st.builds(frames.Refused, text, text),
    st.builds(frames.Welcome, small, text, infos, loads, st.booleans()),
    st.builds(frames.Step, small, small, loads, st.lists(outputs, max_size=4)),
    st.builds(frames.Draining, st.floats(0, 1e6)),
    st.builds(frames.Pong, small),
)


def _cut(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@settings(derandomize=True, max_examples=300)
@given(st.lists(down, max_size=6), st.lists(st.integers(0, 5000), max_size=12), st.sampled_from([5, 40, 1 << 20]))
def test_frames_survive_any_cuts_of_the_byte_stream(sent: list[frames.DownFrame], cuts: list[int], long: int) -> None:
    splitter = frames.FrameSplitter(frames.MAX_FRAME_BYTES)
    pieces = _cut(b"".join(frames.encode(frame) for frame in sent), cuts)
    with mock.patch.object(frames, "RESERVE_AT", long):
        got = [frames.decode_down(body) for piece in pieces for body in splitter.feed(piece)]
    assert got == sent
    assert splitter.empty


def test_a_long_frame_stays_where_its_beginning_is() -> None:
    """To move it for more room would copy all of it at once."""
    sent = frames.encode(frames.Step(1, 1, Load(), [frames.Output(1, bytes(12 << 20), 1)]))
    splitter = frames.FrameSplitter(frames.MAX_FRAME_BYTES)
    assert splitter.feed(sent[:3]) == []
    assert splitter.feed(sent[3:1000]) == []
    assert splitter._long is not None
    at = _address(splitter._long.getbuffer())
    for start in range(1000, len(sent) - 1000, 200_000):
        assert splitter.feed(sent[start : min(start + 200_000, len(sent) - 1000)]) == []
        assert not splitter.empty
    body, pong = splitter.feed(sent[-1000:] + frames.encode(frames.Pong(7)))
    assert _address(body) == at + 4
    assert body == sent[4:]
    assert frames.decode_down(pong) == frames.Pong(7)
    assert splitter.empty


def test_a_length_over_the_limit_is_refused_behind_a_long_frame_too() -> None:
    sent = frames.encode(frames.Step(1, 1, Load(), [frames.Output(1, bytes(1 << 20), 1)]))
    splitter = frames.FrameSplitter(len(sent))
    assert splitter.feed(sent[:-10]) == []
    with pytest.raises(frames.FrameError, match="longer than the limit"):
        splitter.feed(sent[-10:] + len(sent + b"x").to_bytes(4, "little"))


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


@settings(derandomize=True, max_examples=200)
@given(up)
def test_every_frame_from_a_router_comes_back_equal(sent: frames.UpFrame) -> None:
    (body,) = frames.FrameSplitter(frames.MAX_FRAME_BYTES).feed(frames.encode(sent))
    assert frames.decode_up(body) == sent


@settings(derandomize=True, max_examples=500)
@given(st.binary(max_size=300), st.integers(0, 300))
def test_random_bytes_are_split_and_refused_without_any_other_exception(data: bytes, cut: int) -> None:
    splitter = frames.FrameSplitter(1000)
    try:
        for piece in (data[:cut], data[cut:]):
            for body in splitter.feed(piece):
                frames.decode_up(body)
                frames.decode_down(body)
    except frames.FrameError:
        pass


@settings(derandomize=True, max_examples=300)
@given(down, st.integers(0, 10_000), st.integers(0, 255))
def test_a_changed_byte_is_a_frame_or_a_frame_error(sent: frames.DownFrame, place: int, value: int) -> None:
    data = bytearray(frames.encode(sent))
    data[place % len(data)] = value
    try:
        for body in frames.FrameSplitter(1 << 20).feed(bytes(data)):
            frames.decode_down(body)
    except frames.FrameError:
        pass


def test_a_frame_over_the_limit_is_refused_from_its_length_alone() -> None:
    splitter = frames.FrameSplitter(100)
    with pytest.raises(frames.FrameError, match="101 bytes"):
        splitter.feed((101).to_bytes(4, "little"))


def test_fields_that_a_later_version_appends_are_ignored_and_missing_ones_get_defaults() -> None:
    later = msgspec.msgpack.encode([10, 2.5, "new", {"more": 1}])
    assert frames.decode_down(later) == frames.Draining(2.5)
    earlier = msgspec.msgpack.encode([5, 1, "id", 0, "POST", "/", [], b""])
    assert frames.decode_up(earlier) == frames.Submit(1, "id", 0, "POST", "/", (), b"")


def test_only_the_right_secret_proves_itself() -> None:
    hello = frames.Hello(frames.VERSION, frames.prove(b"secret", b"nonce", "router-1"), "router-1")
    assert frames.proof_holds(b"secret", b"nonce", hello)
    assert not frames.proof_holds(b"other", b"nonce", hello)
    assert not frames.proof_holds(b"secret", b"other nonce", hello)
    assert not frames.proof_holds(b"secret", b"nonce", msgspec.structs.replace(hello, router="router-2"))


def test_loads_of_replicas_and_routers_from_before_there_was_sleep_are_understood() -> None:
    class OldLoad(msgspec.Struct, frozen=True, array_like=True):
        running: int = 0
        waiting: int = 0
        queued_prefill_tokens: int = 0
        kv_usage: float = 0.0
        step_ms: float = 0.0
        queued_prefill_pairs: float = 0.0
        step_prefill_tokens: int = 0
        step_prefill_pairs: float = 0.0
        step_decodes: int = 0
        step_context_tokens: int = 0

    old = msgspec.msgpack.encode(OldLoad(3, 4, step_context_tokens=5))
    assert msgspec.msgpack.decode(old, type=Load) == Load(3, 4, step_context_tokens=5)
    new = msgspec.msgpack.encode(Load(3, 4, step_context_tokens=5, asleep=True))
    assert msgspec.msgpack.decode(new, type=OldLoad) == OldLoad(3, 4, step_context_tokens=5)
