"""How often a worker that dies is started again."""

from __future__ import annotations

from router.generation import RESTART_MAX_S, restart_delay_s


def test_the_first_time_it_is_started_again_at_once() -> None:
    assert restart_delay_s(1) == 0


def test_one_that_dies_again_and_again_is_started_more_and_more_seldom() -> None:
    assert [restart_delay_s(count) for count in range(2, 9)] == [1, 2, 4, 8, 16, RESTART_MAX_S, RESTART_MAX_S]
    assert restart_delay_s(1000) == RESTART_MAX_S
