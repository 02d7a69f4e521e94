"""The load of a vLLM engine as its front end sees it, on vLLM-like request states under the test's control."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from engine.vllm_work import Running, VllmWork

BLOCK = 16


class Core:
    """vLLM's states, and what it holds cached."""

    def __init__(self) -> None:
        self.states: dict[str, Any] = {}
        self.held: set[int] = set()
        self.prompted: list[str] = []
        self.now = 0.0
        self.work = VllmWork(
            self.states, BLOCK, self._held, lambda running: self.prompted.append(running.id), lambda: self.now
        )

    def _held(self, keys: Sequence[int]) -> int:
        count = 0
        for key in keys:
            if key not in self.held:
                break
            count += 1
        return count

    def add(self, id: str, tokens: int, keys: Sequence[int] = ()) -> Running:
        self.states[id] = SimpleNamespace(
            prompt_len=tokens,
            is_prefilling=True,
            num_cached_tokens=0,
            detokenizer=SimpleNamespace(output_token_ids=[]),
        )
        return self.work.add(id, keys)

    def token(self, id: str, cached: int = 0) -> None:
        """A request got a token; its first one comes with the count of cached tokens."""
        state = self.states[id]
        if state.is_prefilling:
            state.is_prefilling = False
            state.num_cached_tokens = cached
        state.detokenizer.output_token_ids.append(7)

    def leave(self, id: str) -> None:
        del self.states[id]

    def step(self, prefill: int = 0, decodes: int = 0, produced: int = 0) -> None:
        self.work.step(SimpleNamespace(num_ctx_tokens=prefill, num_generation_requests=decodes), produced)


def pairs(begun: int, new: int) -> float:
    return new * begun + new * new / 2


def test_prompts_count_until_their_first_token_without_what_is_cached() -> None:
    core = Core()
    core.held = {1, 2, 3}
    core.add("a", 100, [1, 2, 3, 4, 5, 6])
    core.add("b", 40)
    assert core.work.queued() == (52 + 40, pairs(48, 52) + pairs(0, 40))
    core.token("a", 48)
    core.step(prefill=52, produced=1)
    assert core.work.queued() == (40, pairs(0, 40))
    assert core.prompted == ["a"]


def test_looking_amid_a_step_loses_nothing_of_a_request_that_ends_in_it() -> None:
    core = Core()
    core.add("a", 100)
    core.add("b", 40)
    core.token("a", 48)
    core.leave("a")  # Of one token. The step's other outputs are still to come, and may be sent at once.
    assert core.work.queued() == (40, pairs(0, 40))
    core.step(prefill=52, produced=1)
    assert core.prompted == ["a"]
    assert core.work.step_prefill_pairs == pairs(48, 52)
    assert core.work.queued() == (40, pairs(0, 40))
    assert not core.work.knows("a")


def test_a_prompt_that_is_cached_whole_still_has_a_token_to_compute() -> None:
    core = Core()
    core.held = {1, 2}
    core.add("a", 32, [1, 2])
    assert core.work.queued()[0] == 1


def test_blocks_that_others_store_meanwhile_make_a_waiting_prompt_shorter() -> None:
    core = Core()
    core.add("a", 100, [1, 2, 3])
    assert core.work.queued()[0] == 100
    core.held = {1, 2}
    core.work.cache_changed()
    assert core.work.queued()[0] == 68


def test_a_prompts_chunks_are_taken_off_as_they_are_computed() -> None:
    core = Core()
    core.add("a", 100, list(range(6)))
    core.held = {0, 1, 2, 3}
    core.step(prefill=64)
    assert core.work.queued() == (36, pairs(64, 36))
    assert core.work.step_prefill_pairs == pairs(0, 64)
    core.held |= {4, 5}
    core.token("a")
    core.step(prefill=36, produced=1)
    assert core.work.step_prefill_pairs == pairs(64, 36)
    assert core.work.queued() == (0, 0)


def test_chunks_are_taken_off_in_order_where_no_events_tell_of_them() -> None:
    core = Core()
    core.add("a", 100)
    core.add("b", 100)
    core.step(prefill=64)
    assert core.work.queued() == (136, pairs(64, 36) + pairs(0, 100))
    core.token("a")
    core.step(prefill=64, produced=1)
    assert core.work.step_prefill_pairs == pairs(64, 36) + pairs(0, 28)
    assert core.work.queued() == (72, pairs(28, 72))


def test_what_decodes_read_is_their_prompts_and_answers() -> None:
    core = Core()
    for id, tokens in (("a", 100), ("b", 200)):
        core.add(id, tokens)
        core.token(id)
    core.step(prefill=300, produced=2)
    assert (core.work.step_prefill_tokens, core.work.step_decodes, core.work.step_context_tokens) == (300, 0, 0)
    for _ in range(3):
        core.token("a")
        core.token("b")
        core.step(decodes=2, produced=2)
    assert (core.work.step_decodes, core.work.step_context_tokens) == (2, 101 + 201 + 4)
    core.token("a")
    core.step(decodes=1, produced=1)
    assert core.work.step_context_tokens == round((104 + 204) / 2)  # b was preempted


def test_news_without_a_step_leave_the_last_steps_figures() -> None:
    core = Core()
    core.add("a", 100)
    core.token("a")
    core.step(prefill=100, produced=1)
    core.leave("a")
    core.work.step(None, 0)
    work = core.work
    assert (work.step_prefill_tokens, work.step_prefill_pairs, work.step_decodes) == (100, pairs(0, 100), 0)
    assert not work.knows("a")


def test_whoever_has_left_is_told_of_once_however_it_left() -> None:
    core, left = Core(), list[str]()
    for id in ("finished", "aborted", "never began"):
        core.add(id, 50).left = lambda id=id: left.append(id)
    core.token("finished")
    core.leave("finished")  # its only token
    core.token("aborted")
    core.step(prefill=100, produced=2)
    assert left == ["finished"]
    core.leave("aborted")
    core.leave("never began")
    assert core.work.queued() == (0, 0)
    core.step()
    assert left == ["finished", "aborted", "never began"]
    assert core.prompted == ["finished", "aborted"]


def test_a_request_that_has_left_has_its_whole_answer() -> None:
    core, answers = Core(), list[list[int]]()
    running = core.add("a", 20)
    running.left = lambda: answers.append(running.produced)
    for count in range(3):
        core.token("a")
        if count == 2:
            core.leave("a")
        core.step(prefill=20 if not count else 0, decodes=1 if count else 0, produced=1)
    assert answers == [[7, 7, 7]]


def test_the_engine_is_busy_from_its_first_request_on() -> None:
    core = Core()
    core.now = 5.0
    core.add("a", 20)
    core.now = 6.0
    core.add("b", 20)
    assert core.work.busy_since == 5.0
    core.leave("a")
    core.leave("b")
    core.step()
    core.now = 9.0
    core.add("c", 20)
    assert core.work.busy_since == 9.0


@pytest.mark.parametrize("seed", range(5))
def test_figures_do_not_drift(seed: int) -> None:
    core, chosen = Core(), random.Random(seed)
    for step in range(1500):
        if chosen.random() < 0.3:
            core.add(f"r{step}", chosen.randrange(1, 200))
        prefill = decodes = produced = 0
        for id, state in list(core.states.items()):
            if chosen.random() < 0.7:
                prefill += state.prompt_len if state.is_prefilling else 0
                decodes += not state.is_prefilling
                core.token(id)
                produced += 1
                # Speculative tokens behind a stop string: counted, then dropped.
                produced += chosen.random() < 0.02
            if chosen.random() < 0.1:
                core.leave(id)
        core.step(prefill, decodes, produced)
        if step % 256 == 255:
            core.work.step(None, 0)
            reads = sum(
                state.prompt_len + len(state.detokenizer.output_token_ids)
                for state in core.states.values()
                if not state.is_prefilling
            )
            assert abs(core.work._decoding_context - reads) <= 256
    for id in list(core.states):
        core.leave(id)
    core.step()
    core.step()
    assert core.work.queued() == (0, 0)
    assert core.work._decoding_context == 0
