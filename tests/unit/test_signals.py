"""How a process is asked to end."""

from __future__ import annotations

import signal

import pytest

from router.signals import Stop

TERM, INT = signal.SIGTERM, signal.SIGINT


@pytest.mark.parametrize(
    ("signals", "promptly", "hurried", "status"),
    [
        ([TERM], False, False, 0),
        ([INT], True, False, 0),
        ([TERM, TERM], True, True, 143),
        ([TERM, INT], True, True, 130),
        ([INT, TERM], True, True, 143),
        ([INT, INT], True, True, 130),
        ([TERM, INT, TERM], True, True, 130),
    ],
)
async def test_each_signal_hastens_the_end(signals: list[int], promptly: bool, hurried: bool, status: int) -> None:
    stop = Stop()
    assert not stop.asked.is_set()
    for number in signals:
        stop.signalled(number)
    assert stop.asked.is_set()
    assert (stop.promptly.is_set(), stop.hurried.is_set(), stop.status) == (promptly, hurried, status)


async def test_a_parent_that_is_gone_needs_no_notice_and_streams_may_still_end() -> None:
    stop = Stop()
    stop.at_once()
    assert (stop.asked.is_set(), stop.promptly.is_set(), stop.hurried.is_set(), stop.status) == (True, True, False, 0)
