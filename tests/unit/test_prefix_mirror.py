"""The mirror of a replica that sends no reports."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from router.prefix.mirror import LruMirror


def test_the_mirror_keeps_what_was_sent_as_much_as_fits() -> None:
    mirror = LruMirror(4)
    assert mirror.sent([1, 2, 3]) == ([1, 2, 3], [])
    assert mirror.sent([7, 8]) == ([7, 8], [3])
    assert [block in mirror for block in (1, 2, 3, 7, 8)] == [True, True, False, True, True]


def test_a_prompt_loses_its_last_blocks_first() -> None:
    mirror = LruMirror(3)
    mirror.sent([1, 2, 3])
    assert mirror.sent([8])[1] == [3]
    assert mirror.sent([9])[1] == [2]


def test_blocks_that_are_sent_again_stay_longer() -> None:
    mirror = LruMirror(4)
    mirror.sent([1, 2])
    mirror.sent([7, 8])
    mirror.sent([1, 2])
    assert mirror.sent([1, 9])[1] == [8]


def test_a_prompt_longer_than_the_cache_keeps_its_beginning() -> None:
    mirror = LruMirror(2)
    assert mirror.sent([1, 2, 3, 4]) == ([1, 2], [])
    assert len(mirror) == 2


def test_what_was_known_before_is_the_first_to_go() -> None:
    mirror = LruMirror(3)
    mirror.sent([1])
    assert mirror.known([1, 5, 6, 7]) == [7]
    assert mirror.sent([2, 1])[1] == [6]


def test_a_smaller_cache_drops_what_no_longer_fits() -> None:
    mirror = LruMirror(4)
    mirror.sent([1, 2, 3, 4])
    mirror.capacity = 2
    assert mirror.trim(9) == [4, 3]
    mirror.capacity = 9
    assert (mirror.trim(9), mirror.surplus) == ([], 0)


def test_a_much_smaller_cache_drops_what_no_longer_fits_in_slices() -> None:
    mirror = LruMirror(10_000)
    mirror.sent(range(10_000))
    mirror.capacity = 100
    assert len(mirror.sent([1, 2])[1]) < 100
    assert len(mirror.trim(1000)) == 1000
    while mirror.surplus:
        mirror.trim(1000)
    assert len(mirror) == 100


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.integers(1, 12), st.lists(st.lists(st.integers(0, 30), max_size=15, unique=True), max_size=30))
def test_the_mirror_never_holds_more_than_fits_and_reports_every_change(
    capacity: int, prompts: list[list[int]]
) -> None:
    mirror, expected = LruMirror(capacity), set[int]()
    for prompt in prompts:
        stored, evicted = mirror.sent(prompt)
        assert not set(stored) & set(evicted)
        expected |= set(stored)
        expected -= set(evicted)
        assert expected == {block for block in range(31) if block in mirror}
        assert len(mirror) == len(expected) <= capacity
        assert list(stored) == prompt[:capacity]
