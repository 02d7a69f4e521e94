"""The simulated engine's scheduler and KV cache, as plain functions."""

from __future__ import annotations

import random
from bisect import bisect_right
from math import sqrt

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.simulated_cache import BlockPool, Evicted, Stored
from engine.simulated_core import Job, SimulatedCore, SimulatedOptions, StepResult, StepWork
from engine.simulated_text import WORDS, Prompt, answer, chat_text, hashed_prompt, text_prompt, token_prompt
from router.errors import InvalidRequest

SMALL = SimulatedOptions(
    max_num_seqs=4, max_num_batched_tokens=24, kv_blocks=24, block_tokens=4, max_model_len=64, answer_tokens=5
)

options = st.builds(
    SimulatedOptions,
    max_num_seqs=st.integers(2, 6),
    max_num_batched_tokens=st.integers(6, 40),
    kv_blocks=st.integers(16, 30),
    block_tokens=st.just(4),
    max_model_len=st.just(64),
    prefix_caching=st.booleans(),
    scheduling=st.sampled_from(["fcfs", "priority"]),
    jitter=st.sampled_from([0.0, 0.2]),
    answer_tokens=st.just(7),
    seed=st.integers(0, 3),
)
Move = tuple[object, ...]


def some_moves(seed: int) -> list[Move]:
    """A crowded run: hypothesis' own lists seldom get long enough for blocks to run out."""
    random_ = random.Random(seed)
    moves: list[Move] = []
    for _ in range(random_.randrange(1, 120)):
        kind = random_.choices(["add", "abort", "plan", "commit"], [4, 1, 6, 6])[0]
        if kind == "add":
            length = random_.choice([None, random_.randrange(1, 21)])
            moves.append((kind, random_.randrange(1, 45), random_.randrange(3), length, random_.randrange(-1, 2)))
        else:
            moves.append((kind, random_.randrange(40)))
    return moves


moves = st.integers(0, 1 << 32).map(some_moves)


def prompt(tokens: int, family: int) -> Prompt:
    """Prompts of one family are prefixes of each other."""
    return token_prompt([family * 1000 + position for position in range(tokens)], 4)


class Drive:
    """Applies moves to a core and checks after each what must always hold."""

    def __init__(self, options: SimulatedOptions) -> None:
        self.core = SimulatedCore(options)
        self.options = options
        self.jobs: list[Job] = []
        self.planned = False
        self.trace: list[object] = []
        self.known: set[int] = set()

    def apply(self, move: Move) -> None:
        if move[0] == "add":
            _, tokens, family, max_tokens, priority = move
            job = self.core.add(len(self.jobs), prompt(tokens, family), max_tokens, priority)  # type: ignore[arg-type]
            self.jobs.append(job)
        elif move[0] == "abort":
            self.core.abort(move[1])  # type: ignore[arg-type]
        elif move[0] == "plan" and not self.planned:
            duration = self.core.plan()
            self.planned = duration is not None
            self.trace.append(duration)
            assert sum(job.scheduled for job in self.jobs) <= self.options.max_num_batched_tokens
        elif move[0] == "commit" and self.planned:
            self.planned = False
            self.note(self.core.commit())
        self.check()

    def note(self, result: StepResult) -> None:
        self.trace.append([(job.id, job.produced, job.finish, job.cached_tokens) for job in result.produced])
        assert result.finished == [job for job in result.produced if job.finish]
        for event in result.cache_events:
            for block in event.hashes:
                assert (block in self.known) == isinstance(event, Evicted)
                (self.known.add if isinstance(event, Stored) else self.known.remove)(block)

    def check(self) -> None:
        load = self.core.load()
        live = [job for job in self.jobs if not job.finish]
        assert load.running == sum(job.running for job in live) <= self.options.max_num_seqs
        assert load.running + load.waiting == len(live)
        assert load.queued_prefill_tokens == sum(job.owed for job in live)
        assert all(job.owed >= 0 for job in live)
        assert load.queued_prefill_pairs == sum(job.owed * (job.tokens - job.owed / 2) for job in live)
        named = {block for job in live for block in job.held}
        assert self.core.pool.used == len(named) + sum(job.anonymous for job in live)
        assert all(job.capacity == self.options.block_tokens * (len(job.held) + job.anonymous) for job in live)

    def finish(self) -> None:
        for _ in range(20_000):
            self.apply(("plan",))
            if not self.planned:
                return
            self.apply(("commit",))
        raise AssertionError("the core makes no progress")


@settings(derandomize=True, max_examples=150, deadline=None)
@given(options, moves)
def test_every_request_finishes_and_no_block_leaks(options: SimulatedOptions, moves: list[Move]) -> None:
    drive = Drive(options)
    for move in moves:
        drive.apply(move)
    drive.finish()
    assert all(job.finish == "abort" or job.produced == job.answer_tokens for job in drive.jobs)
    assert drive.core.pool.used == 0
    load = drive.core.load()
    assert (load.running, load.waiting, load.queued_prefill_tokens, load.kv_usage) == (0, 0, 0, 0)
    assert drive.known == set(drive.core.pool.evictable())


@settings(derandomize=True, max_examples=50, deadline=None)
@given(options, moves)
def test_the_same_calls_give_the_same_schedule(options: SimulatedOptions, moves: list[Move]) -> None:
    drives = [Drive(options), Drive(options)]
    for drive in drives:
        for move in moves:
            drive.apply(move)
        drive.finish()
    assert drives[0].trace == drives[1].trace


def run(core: SimulatedCore) -> list[StepResult]:
    results = []
    while (result := core.step()) is not None:
        results.append(result)
        assert len(results) < 10_000
    return results


def test_a_repeated_prompt_reuses_all_full_blocks_but_computes_its_last_token() -> None:
    core = SimulatedCore(SMALL)
    first = core.add("a", prompt(16, 0), 1)
    assert run(core)[0].prefill_tokens == 16
    again = core.add("b", prompt(16, 0), 1)
    assert core.load().queued_prefill_tokens == 4
    assert run(core)[0].prefill_tokens == 4
    assert (first.cached_tokens, again.cached_tokens) == (0, 12)


def test_only_the_common_prefix_is_reused() -> None:
    core = SimulatedCore(SMALL)
    core.add("a", token_prompt([*range(8), 100, 101, 102, 103, 104], 4), 1)
    run(core)
    other = core.add("b", token_prompt([*range(8), 200, 201, 202, 203, 204], 4), 1)
    run(core)
    assert other.cached_tokens == 8


def test_requests_of_one_step_share_their_prefix() -> None:
    core = SimulatedCore(SMALL)
    core.add("a", prompt(9, 0), 2)
    second = core.add("b", prompt(9, 0), 2)
    core.step()
    assert second.cached_tokens == 8
    assert core.pool.used == 2 + 1 + 1


def test_without_prefix_caching_nothing_is_reused_or_reported() -> None:
    core = SimulatedCore(msgspec.structs.replace(SMALL, prefix_caching=False))
    core.add("a", prompt(16, 0), 8)
    results = run(core)
    again = core.add("b", prompt(16, 0), 8)
    results += run(core)
    assert again.cached_tokens == 0
    assert not any(result.cache_events for result in results)


def test_the_next_turn_of_a_conversation_reuses_the_blocks_of_the_answer() -> None:
    core = SimulatedCore(msgspec.structs.replace(SMALL, max_model_len=96))
    messages = [("user", "hello there, how are you?")]
    question = text_prompt(chat_text(messages), 4)
    core.add("a", question, 12)
    run(core)
    messages.append(("assistant", answer(question.key, 0, 12).decode()))
    messages.append(("user", "and now?"))
    second = core.add("b", text_prompt(chat_text(messages), 4), 1)
    run(core)
    # The last token of an answer is never computed itself.
    assert second.cached_tokens == (question.tokens + 11) // 4 * 4


def test_prompts_may_be_given_as_block_hashes() -> None:
    core = SimulatedCore(SMALL)
    core.add("a", hashed_prompt([11, 12, 13], 14), 6)
    stored = [event for result in run(core) for event in result.cache_events]
    assert stored[0] == Stored(None, (11, 12, 13), "a", 0)
    assert isinstance(stored[1], Stored)
    assert (stored[1].parent, stored[1].first_block) == (13, 3)
    again = core.add("b", hashed_prompt([11, 12, 99], 14), 1)
    run(core)
    assert again.cached_tokens == 8


def test_blocks_without_a_given_hash_are_not_shared() -> None:
    core = SimulatedCore(SMALL)
    core.add("a", hashed_prompt([11], 13), 1)
    run(core)
    again = core.add("b", hashed_prompt([11], 13), 1)
    run(core)
    assert again.cached_tokens == 4


def test_the_blocks_used_longest_ago_are_evicted_first_and_ends_before_beginnings() -> None:
    pool = BlockPool(4)
    for name, hashes in (("a", [1, 2]), ("b", [3, 4])):
        assert pool.take(2)
        assert pool.name(hashes, 0, 2, name) == hashes
    pool.release([1, 2], 0)
    pool.release([3, 4], 0)
    assert pool.evictable() == (2, 1, 4, 3)
    pool.refer([1])
    pool.release([1], 0)
    pool.take_events()
    assert pool.take(3)
    assert pool.take_events() == [Evicted((2, 4, 3))]
    assert pool.match([1, 2], 2) == 1


def test_blank_blocks_are_taken_before_known_ones_are_evicted() -> None:
    pool = BlockPool(3)
    assert pool.take(1)
    pool.name([1], 0, 1, "a")
    pool.release([1], 0)
    assert pool.take(2)
    assert pool.holds(1)
    assert not pool.take(2)
    assert pool.used == 2


def test_a_shared_block_is_freed_with_its_last_user() -> None:
    core = SimulatedCore(SMALL)
    core.add("a", prompt(9, 0), 20)
    core.add("b", prompt(9, 0), 20)
    core.step()
    core.abort("a")
    assert core.pool.evictable() == ()
    assert core.pool.used == 3
    core.abort("b")
    assert len(core.pool.evictable()) == 2
    assert core.pool.used == 0


def test_long_prompts_are_computed_in_chunks_beside_decoding_requests() -> None:
    core = SimulatedCore(SMALL)
    core.add("short", prompt(4, 0), 10)
    core.step()
    core.add("long", prompt(40, 1), 1)
    first, second = core.step(), core.step()
    assert first is not None
    assert second is not None
    assert (first.prefill_tokens, first.decode_seqs) == (23, 1)
    assert [job.id for job in first.produced] == ["short"]
    assert (second.prefill_tokens, second.decode_seqs) == (17, 1)
    assert [job.id for job in second.produced] == ["short", "long"]


def test_a_decoding_request_without_blocks_left_preempts_the_youngest() -> None:
    core = SimulatedCore(msgspec.structs.replace(SMALL, kv_blocks=8, max_model_len=32))
    old = core.add("old", prompt(12, 0), 16)
    young = core.add("young", prompt(12, 1), 16)
    results: list[StepResult] = []
    while not any(result.preempted for result in results):
        result = core.step()
        assert result is not None
        results.append(result)
    assert old.running
    assert not young.running
    before = young.produced
    assert before > 0
    run(core)
    assert (young.produced, young.finish) == (16, "length")


def test_waiting_requests_start_in_order_of_arrival() -> None:
    core = SimulatedCore(msgspec.structs.replace(SMALL, max_num_seqs=1))
    for name in "abc":
        core.add(name, prompt(4, 0), 2, priority=-ord(name))
    assert [job.id for result in run(core) for job in result.finished] == ["a", "b", "c"]


def test_priority_scheduling_starts_the_lowest_number_first() -> None:
    core = SimulatedCore(msgspec.structs.replace(SMALL, max_num_seqs=1, scheduling="priority"))
    for name in "abc":
        core.add(name, prompt(4, 0), 2, priority=-ord(name))
    assert [job.id for result in run(core) for job in result.finished] == ["c", "b", "a"]


def test_an_abort_during_a_step_keeps_the_request_out_of_its_result() -> None:
    core = SimulatedCore(SMALL)
    core.add("a", prompt(4, 0), 2)
    core.add("b", prompt(4, 1), 2)
    core.plan()
    core.abort("a")
    assert core.load().running == 1
    assert [job.id for job in core.commit().produced] == ["b"]
    core.abort("a")
    core.abort("never there")


def test_an_answer_without_a_length_stops_by_itself_and_ends_at_the_context_length() -> None:
    core = SimulatedCore(SMALL)
    whole = core.add("a", prompt(4, 0))
    clipped = core.add("b", prompt(62, 1))
    run(core)
    assert (whole.produced, whole.finish) == (5, "stop")
    assert (clipped.produced, clipped.finish) == (2, "length")


@pytest.mark.parametrize(("tokens", "max_tokens"), [(64, None), (60, 5), (0, None)])
def test_what_does_not_fit_the_context_is_refused(tokens: int, max_tokens: int | None) -> None:
    core = SimulatedCore(SMALL)
    with pytest.raises(InvalidRequest):
        core.add("a", prompt(tokens, 0), max_tokens)
    assert core.step() is None


def test_a_request_may_not_be_added_twice() -> None:
    core = SimulatedCore(SMALL)
    core.add("a", prompt(4, 0))
    with pytest.raises(ValueError, match="already here"):
        core.add("a", prompt(4, 0))


def test_a_step_lasts_as_long_as_the_linear_model_says() -> None:
    timed = msgspec.structs.replace(
        SMALL,
        step_base_ms=10,
        prefill_ms_per_token=0.5,
        decode_ms_per_seq=2,
        context_ms_per_1k_tokens=1000,
        time_scale=2,
    )
    core = SimulatedCore(timed)
    core.add("a", prompt(4, 0), 5)
    assert core.plan() == pytest.approx(2 * (10 + 0.5 * 4 + 4))
    core.commit()
    assert core.plan() == pytest.approx(2 * (10 + 2 + 5))
    core.commit()
    assert core.load().step_ms == pytest.approx(34)


def test_a_time_scale_of_zero_takes_no_time() -> None:
    core = SimulatedCore(msgspec.structs.replace(SMALL, time_scale=0))
    core.add("a", prompt(4, 0), 5)
    assert {result.duration_ms for result in run(core)} == {0}


def test_the_roofline_is_added_to_the_linear_model() -> None:
    timed = msgspec.structs.replace(
        SMALL,
        step_base_ms=2.5,
        prefill_ms_per_token=0,
        decode_ms_per_seq=0,
        context_ms_per_1k_tokens=0,
        roofline_floor_ms=4,
        roofline_ms_per_token=0.5,
        prefill_ms_per_pair=0.01,
        decode_ms_per_context_token=0.1,
    )
    core = SimulatedCore(timed)
    core.add("a", prompt(6, 0), 5)
    assert core.plan() == pytest.approx(2.5 + sqrt(4**2 + 3**2) + 0.01 * 18)
    core.commit()
    core.add("b", prompt(20, 1), 5)
    # One token of the first beside the prompt of the second.
    assert core.plan() == pytest.approx(2.5 + sqrt(4**2 + (0.5 * 21) ** 2) + 0.01 * 200 + 0.1 * 7)
    core.commit()
    load = core.load()
    assert (load.step_prefill_tokens, load.step_prefill_pairs) == (20, 200)
    assert (load.step_decodes, load.step_context_tokens) == (1, 7)


def test_another_model_of_the_step_replaces_all_terms() -> None:
    works: list[StepWork] = []

    def model(work: StepWork) -> float:
        works.append(work)
        return 7.0

    core = SimulatedCore(msgspec.structs.replace(SMALL, time_scale=3), model)
    core.add("a", prompt(5, 0), 4)
    assert core.plan() == 21
    core.commit()
    assert core.stretch(1.0) == pytest.approx([1.021, 1.042])
    assert works[0] == StepWork(5, 12.5, 0, 0)
    assert works[-1] == StepWork(0, 0.0, 1, 7)


class Timeline:
    """A core on a virtual clock: requests come at given times, in stretches of steps or step by step."""

    def __init__(self, options: SimulatedOptions, *, leaps: bool) -> None:
        self.core = SimulatedCore(options)
        self.leaps = leaps
        self.trace: list[object] = []
        self.events: list[object] = []
        self.ends: list[float] = []
        self.due: float | None = None
        self.steps_at_once = 0

    def add(self, now: float, number: int, tokens: int, family: int, max_tokens: int) -> None:
        while self.due is not None and self.due <= now:
            self.end()
        if self.ends:
            over = bisect_right(self.ends, now, 0, len(self.ends) - 1)
            if over:
                self.note(self.core.leap(over), self.ends[over - 1])
            self.due, self.ends = self.ends[over], []
            self.core.plan()
        self.core.add(number, prompt(tokens, family), max_tokens)
        if self.due is None:
            self.begin(now)

    def begin(self, now: float) -> None:
        self.ends = self.core.stretch(now) if self.leaps else []
        if self.ends:
            self.due = self.ends[-1]
        else:
            duration = self.core.plan()
            self.due = None if duration is None else now + duration / 1000

    def end(self) -> None:
        now, ends = self.due, self.ends
        assert now is not None
        self.steps_at_once = max(self.steps_at_once, len(ends))
        self.note(self.core.leap(len(ends)) if ends else self.core.commit(), now)
        self.begin(now)

    def note(self, result: StepResult, now: float) -> None:
        for job in result.prefilled:
            self.trace.append(("prefilled", job.id, now, job.cached_tokens, job.produced))
        for job in result.finished:
            self.trace.append(("finished", job.id, now, self.core.load()))
        self.events += result.cache_events


@settings(derandomize=True, max_examples=150, deadline=None)
@given(options, st.integers(0, 1 << 32))
def test_stretches_of_steps_end_exactly_as_single_steps_do(options: SimulatedOptions, seed: int) -> None:
    draw = random.Random(seed)
    options = msgspec.structs.replace(options, jitter=0.0, roofline_floor_ms=3, decode_ms_per_context_token=0.01)
    lines = [Timeline(options, leaps=leaps) for leaps in (True, False)]
    now = 0.0
    for number in range(draw.randrange(1, 40)):
        now += draw.choice([0.0, draw.expovariate(20), draw.expovariate(2)])
        tokens, family, answer = draw.randrange(1, 45), draw.randrange(3), draw.randrange(1, 20)
        for line in lines:
            line.add(now, number, tokens, family, answer)
    for line in lines:
        while line.due is not None:
            line.end()
    leaping, stepping = lines
    assert leaping.trace == stepping.trace
    assert leaping.events == stepping.events
    assert leaping.core.steps == stepping.core.steps
    assert leaping.core.load() == stepping.core.load()
    assert leaping.core.pool.evictable() == stepping.core.pool.evictable()


def test_a_lone_answer_is_done_in_stretches_that_end_with_its_blocks() -> None:
    line = Timeline(msgspec.structs.replace(SMALL, block_tokens=32, kv_blocks=4, max_model_len=128), leaps=True)
    line.add(0.0, 0, 10, 0, 50)
    while line.due is not None:
        line.end()
    assert line.core.steps == 50
    assert line.steps_at_once > 15


def test_cores_that_share_their_caches_find_each_others_blocks_and_keep_each_once() -> None:
    shared: dict[int, BlockPool] = {}
    one, other = (SimulatedCore(SMALL, shared=shared) for _ in range(2))
    one.add("a", prompt(16, 0), 1)
    run(one)
    again = other.add("b", prompt(20, 0), 1)
    assert other.load().queued_prefill_tokens == 4
    other.plan()
    assert other.pool.used == 5
    other.commit()
    assert again.cached_tokens == 16
    assert len(one.pool.evictable()) == 4
    assert len(other.pool.evictable()) == 1
    assert {block for core in (one, other) for block in core.pool.evictable()} == set(shared)


def test_a_block_that_another_core_uses_is_evicted_later() -> None:
    shared: dict[int, BlockPool] = {}
    one, other = (SimulatedCore(SMALL, shared=shared) for _ in range(2))
    for name, family in (("a", 0), ("b", 1)):
        one.add(name, prompt(4, family), 1)
        run(one)
    oldest = one.pool.evictable()[0]
    other.add("c", prompt(8, 0), 1)
    run(other)
    assert one.pool.evictable()[-1] == oldest


def test_plan_and_commit_alternate() -> None:
    core = SimulatedCore(SMALL)
    with pytest.raises(RuntimeError):
        core.commit()
    core.add("a", prompt(4, 0), 5)
    core.plan()
    with pytest.raises(RuntimeError):
        core.plan()
    with pytest.raises(RuntimeError):
        core.stretch(0.0)


@pytest.mark.parametrize("wrong", [{"max_num_batched_tokens": 3}, {"max_model_len": 97}])
def test_options_that_cannot_work_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        msgspec.structs.replace(SMALL, **wrong)


@settings(derandomize=True, deadline=None)
@given(st.integers(0, len(WORDS) - 1), st.integers(0, 6000), st.integers(0, 6000))
def test_an_answer_is_its_words_one_after_the_other(key: int, start: int, length: int) -> None:
    words = b"".join(WORDS[(key + index) % len(WORDS)] for index in range(start, start + length))
    assert answer(key, start, start + length) == words


def test_a_salt_keeps_equal_prompts_apart() -> None:
    plain, salted = (text_prompt(b"x" * 64, 4, salt=salt) for salt in ("", "tenant"))
    assert not set(plain.hashes) & set(salted.hashes)
    assert plain.key == salted.key
