"""Long gRPC messages over HTTP/2: whole however they come in, and counted while they are not."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.ingress import h2_messages
from router.ingress.h2_messages import PREFIX_BYTES, MessageCutter


@pytest.fixture(autouse=True)
def small_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h2_messages, "_RESERVE_AT", 20)


def framed(message: bytes, *, compressed: bool) -> bytes:
    return bytes([compressed]) + len(message).to_bytes(4, "big") + message


messages = st.lists(st.tuples(st.booleans(), st.binary(max_size=90)), max_size=6)


@given(messages, st.lists(st.integers(1, 60), min_size=1, max_size=40))
@settings(derandomize=True, deadline=None, max_examples=500)
def test_messages_are_whole_however_they_are_cut(sent: list[tuple[bool, bytes]], sizes: list[int]) -> None:
    cutter, got, at = MessageCutter(100), [], 0
    data = b"".join(framed(message, compressed=compressed) for compressed, message in sent)
    for size in sizes * (len(data) + 1):
        if at >= len(data):
            break
        got += cutter.feed(data[at : at + size])
        at = min(len(data), at + size)
        assert cutter.held_bytes == at - sum(PREFIX_BYTES + len(message) for _, message in got)
    assert got == sent
    assert cutter.held_bytes == 0


def test_a_long_message_that_nobody_wants_is_let_go() -> None:
    cutter = MessageCutter(1000)
    assert cutter.feed(framed(bytes(900), compressed=False)[:500]) == []
    assert cutter.held_bytes == 500
    cutter.clear()
    assert cutter.held_bytes == 0
    assert cutter.feed(framed(b"next", compressed=False)) == [(False, b"next")]
