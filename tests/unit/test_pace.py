"""Who asks in a crowd gets a turn in order, and never more than so many in one turn of the loop."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.ingress.pace import Pace


class Turns:
    """Asks as clients do, and notes in which turn of the loop each was listened to."""

    def __init__(self, per_turn: int) -> None:
        self.pace = Pace(per_turn)
        self.now = 0
        self.heard: list[tuple[int, int]] = []
        """Turn and asker."""

    def ask(self, number: int) -> None:
        if self.pace.admits(asyncio.get_running_loop(), lambda: self.heard.append((self.now, number))):
            self.heard.append((self.now, number))

    async def pass_by(self, turns: int) -> None:
        for _ in range(turns):
            self.now += 1
            await asyncio.sleep(0)

    def most_in_a_turn(self) -> int:
        turns = [turn for turn, _ in self.heard]
        return max(turns.count(turn) for turn in turns)


async def test_a_few_are_listened_to_at_once() -> None:
    turns = Turns(4)
    for number in range(4):
        turns.ask(number)
    assert turns.heard == [(0, 0), (0, 1), (0, 2), (0, 3)]


async def test_the_next_turn_begins_anew() -> None:
    turns = Turns(4)
    for number in range(20):
        turns.ask(number)
        if number % 4 == 3:
            await turns.pass_by(1)
    assert turns.heard == [(number // 4, number) for number in range(20)]


async def test_of_a_crowd_a_few_are_listened_to_in_each_turn_in_the_order_in_which_they_came() -> None:
    turns = Turns(4)
    for number in range(50):
        turns.ask(number)
    assert len(turns.heard) == 4
    await turns.pass_by(30)
    assert [number for _, number in turns.heard] == list(range(50))
    assert turns.most_in_a_turn() == 4


async def test_who_comes_while_others_wait_is_behind_them() -> None:
    turns = Turns(2)
    for number in range(6):
        turns.ask(number)
    await turns.pass_by(1)
    turns.ask(6)
    await turns.pass_by(10)
    assert [number for _, number in turns.heard] == list(range(7))


@pytest.mark.parametrize("per_turn", [1, 2, 5])
async def test_neither_a_crowd_that_leaves_nor_one_that_asks_holds_the_other_up(per_turn: int) -> None:
    turns, left = Turns(per_turn), list[int]()
    loop = asyncio.get_running_loop()
    for number in range(100):
        turns.pace.run(loop, lambda number=number: left.append(number))  # type: ignore[misc]
    for number in range(4):
        turns.ask(number)
    await turns.pass_by(9)
    assert [number for _, number in turns.heard] == list(range(4))
    assert len(left) >= 4
    await turns.pass_by(100)
    assert left == list(range(100))
    for number in range(4, 104):
        turns.ask(number)
    for number in range(4):
        turns.pace.run(loop, lambda number=number: left.append(number))  # type: ignore[misc]
    await turns.pass_by(9)
    assert left == [*range(100), *range(4)]
    await turns.pass_by(100)
    assert [number for _, number in turns.heard] == list(range(104))


async def test_those_who_always_have_more_to_ask_take_turns() -> None:
    pace, loop, asked = Pace(2), asyncio.get_running_loop(), [0, 0, 0]

    def ask(number: int) -> None:
        """Asks ten times, as often as it may at once."""
        asked[number] += 1
        while asked[number] < 10 and pace.admits(loop, lambda: ask(number)):
            asked[number] += 1

    for number in range(3):
        if pace.admits(loop, lambda number=number: ask(number)):  # type: ignore[misc]
            ask(number)
    while sum(asked) < 30:
        await asyncio.sleep(0)
        assert max(asked) - min(asked) <= 3  # The first had a turn to itself.
    assert asked == [10, 10, 10]


async def test_a_reader_that_fails_costs_no_other_its_turn() -> None:
    pace, heard, seen = Pace(1), list[int](), list[str]()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: seen.append(str(context["exception"])))

    def fails() -> None:
        raise RuntimeError("a defect")

    assert pace.admits(loop, fails)
    assert not pace.admits(loop, fails)
    assert not pace.admits(loop, lambda: heard.append(1))
    for _ in range(5):
        await asyncio.sleep(0)
    assert (heard, seen) == ([1], ["a defect"])


@given(st.integers(1, 5), st.lists(st.integers(0, 12), max_size=20))
def test_nobody_is_lost_overtaken_or_listened_to_in_a_full_turn(per_turn: int, crowds: list[int]) -> None:
    async def run() -> None:
        turns, asked = Turns(per_turn), 0
        for crowd in crowds:
            for _ in range(crowd):
                turns.ask(asked)
                asked += 1
            await turns.pass_by(1)
        await turns.pass_by(asked + 2)
        assert [number for _, number in turns.heard] == list(range(asked))
        assert not asked or turns.most_in_a_turn() <= per_turn

    asyncio.run(run())
