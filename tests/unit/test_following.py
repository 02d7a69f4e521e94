"""When requests that cannot be followed are too many, and what is logged of them."""

from __future__ import annotations

import pytest

from engine.following import LOG_EVERY_S, Following


def test_a_few_failures_among_many_requests_are_no_cause() -> None:
    following = Following()
    for number in range(300):
        if number % 25:
            following.followed()
        else:
            following.failed("r", "odd")
        assert following.cause == ""


def test_a_replica_that_follows_nothing_says_so_after_five_requests_and_heals() -> None:
    following = Following()
    for _ in range(4):
        following.failed("r", "odd")
    assert following.cause == ""
    following.failed("r", "odd")
    assert "odd" in following.cause
    cause = following.cause
    for number in range(50):
        following.failed("r", f"odd {number}")
    assert following.cause == cause
    for _ in range(97):
        following.followed()
        assert following.cause == cause
    following.followed()
    assert following.cause == ""
    assert following.failures == 55


def test_failures_are_logged_once_a_minute_with_their_number(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    following = Following(lambda: now)
    for _ in range(10):
        following.failed("first", "odd")
    assert len(caplog.records) == 1
    now = LOG_EVERY_S
    following.failed("second", "odd")
    assert "second is not followed: odd (9 more" in caplog.records[1].getMessage()
