"""A discrete-event model of a continuous-batching engine: no clock, no I/O, no asyncio.

It schedules as vLLM does: each step has a token budget that running requests draw from first, then waiting ones in
order; long prompts are computed in chunks; where KV blocks run out, the youngest request loses its blocks and starts
over; a token comes out of every request that is computed up to its end. Whoever drives it owns the time: `plan` says
how long the next step takes, `commit` ends it, and requests may come and go in between. Where many steps in a row only
decode, `stretch` and `leap` do them at once, with the same results.
"""

from __future__ import annotations

import random
from bisect import insort
from collections.abc import Callable
from heapq import heappop, heappush
from math import sqrt
from operator import attrgetter
from typing import Annotated, Final, Literal, TypeAlias

import msgspec

from engine.simulated_cache import BlockPool, CacheEvent
from engine.simulated_text import Prompt, answer, chain
from router.errors import InvalidRequest
from router.types import Load

Count = Annotated[int, msgspec.Meta(ge=1)]
Milliseconds = Annotated[float, msgspec.Meta(ge=0)]


class SimulatedOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The simulated engine's options. The defaults resemble an 8B model in bfloat16 on one H100."""

    max_num_seqs: Count = 256  # vLLM's default for its library use; most requests in one batch.
    max_num_batched_tokens: Count = 8192  # vLLM's default on an H100: the token budget of one step.
    kv_blocks: Count = 25_000  # About 50 GB left beside the weights, at 128 KiB per token.
    block_tokens: Annotated[int, msgspec.Meta(ge=1, le=2048)] = 16  # vLLM's default on GPUs.
    max_model_len: Annotated[int, msgspec.Meta(ge=2)] = 32_768  # Prompt plus answer, in tokens.
    prefix_caching: bool = True  # As vLLM.
    scheduling: Literal["fcfs", "priority"] = "fcfs"  # As vLLM; `priority`: lower is sooner.
    step_base_ms: Milliseconds = 6.0  # 16 GB of weights at 3.35 TB/s, and the launch of a step.
    prefill_ms_per_token: Milliseconds = 0.032  # 16 GFLOP at an effective 500 TFLOP/s.
    decode_ms_per_seq: Milliseconds = 0.02  # Sampling and small kernels.
    context_ms_per_1k_tokens: Milliseconds = 0.04  # Reading 128 KiB of KV cache per token at 3.35 TB/s.
    # A second model beside the linear one, whose terms are added: a step's matrix products take the longer of reading
    # the weights and computing its tokens, rounded off where the two meet: sqrt(floor² + (token * tokens)²).
    roofline_floor_ms: Milliseconds = 0.0
    roofline_ms_per_token: Milliseconds = 0.0
    prefill_ms_per_pair: Milliseconds = 0.0  # Attention of prompts: per pair of a computed token and one before it.
    decode_ms_per_context_token: Milliseconds = 0.0  # Attention of answers: per token read from the KV cache.
    jitter: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0  # Steps last up to this share more or less, at random.
    time_scale: Annotated[float, msgspec.Meta(ge=0)] = 1.0  # Stretches all durations; 0 is as fast as possible.
    answer_tokens: Count = 128  # Length of the answer where a request sets none; it then ends with "stop".
    seed: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)] = (
        0  # Of jitter and words: one seed, one schedule, one answer.
    )
    wake_ms: Milliseconds = 640.0  # From sleep: 16 GB of weights out of the host's memory at 25 GB/s (PCIe 4).
    fail_after_steps: Annotated[int, msgspec.Meta(ge=0)] = 0  # For fault tests: dies after so many steps; 0 never.

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"`max_num_batched_tokens` is {self.max_num_batched_tokens}, below `max_num_seqs` = {self.max_num_seqs}"
            )
        if self.max_model_len > self.kv_blocks * self.block_tokens:
            raise ValueError(
                f"`max_model_len` is {self.max_model_len}, but {self.kv_blocks} KV blocks of "
                f"{self.block_tokens} tokens hold only {self.kv_blocks * self.block_tokens}"
            )


class Job:
    """One request in the core. Others may read it; the core writes it."""

    __slots__ = (
        "admitted",
        "anonymous",
        "answer_tokens",
        "cached_tokens",
        "capacity",
        "computed",
        "finish",
        "finish_when_whole",
        "hashes",
        "held",
        "id",
        "key",
        "named",
        "names_at",
        "owed",
        "owed_pairs",
        "produced",
        "prompt",
        "running",
        "scheduled",
        "tokens",
    )

    def __init__(
        self, id: int | str, prompt: Prompt, answer_tokens: int, finish_when_whole: str, key: tuple[int, int]
    ) -> None:
        self.id = id
        self.prompt = prompt
        self.answer_tokens = answer_tokens
        self.finish_when_whole = finish_when_whole
        self.key = key  # (priority, order of arrival): lower goes first.
        self.finish = ""  # "length" or "stop" once whole, "abort" once aborted.
        self.tokens = prompt.tokens  # Of the prompt and the answer so far.
        self.computed = 0  # Tokens that are in the KV cache.
        self.produced = 0  # Tokens of the answer so far.
        self.cached_tokens = 0  # Prompt tokens found in the cache when it first ran.
        self.admitted = False  # Whether it ever ran.
        self.running = False
        self.scheduled = 0  # Tokens that the step under way computes.
        self.owed = 0  # Its part of the core's queued prefill tokens; 0 while it decodes.
        self.owed_pairs = 0  # Their attention pairs, doubled: whole numbers add up without drift.
        self.hashes = list(prompt.hashes)  # Of its full blocks; generated ones are added as they fill.
        self.held: list[int] = []  # Named blocks that it refers to, first to last.
        self.anonymous = 0  # Its other blocks.
        self.capacity = 0  # Tokens that fit into its blocks.
        self.named = 0  # Blocks offered for naming so far.
        self.names_at = 0  # Tokens at which the next block is full.


class StepResult(msgspec.Struct, frozen=True):
    """What one step did. The jobs are live: read them before the next step."""

    duration_ms: float
    """Already stretched by `time_scale`; after a leap, of its last step."""
    produced: list[Job]
    """Requests that got exactly one new token, after a leap one per step; a request's first one has `produced == 1`."""
    finished: list[Job]
    """Those among them that are complete, with `finish` set."""
    prefill_tokens: int
    decode_seqs: int
    preempted: int
    cache_events: list[CacheEvent]
    """Blocks stored and evicted, in order."""
    prefilled: list[Job] = []
    """Those of `produced` whose prompt this step completed."""


class StepWork(msgspec.Struct, frozen=True, gc=False):
    """What a step computes, for step-time models of one's own."""

    prefill_tokens: int
    prefill_pairs: float
    """Attention pairs of those tokens (see `Load.queued_prefill_pairs`)."""
    decodes: int
    """Requests that get an output token without computing any of their prompt."""
    decode_context: int
    """Tokens in the KV cache that their attention reads."""


StepModel: TypeAlias = Callable[[StepWork], float]
"""Milliseconds that a step takes, before jitter and `time_scale`. Replaces all terms of the options."""

LONGEST_STRETCH: Final = 64
"""Steps. More in one go would save nothing, and much is computed in vain where stretches are interrupted."""

_KEY: Final = attrgetter("key")


class _Plan:
    """A step under way."""

    __slots__ = (
        "budget",
        "decode_context",
        "decode_seqs",
        "duration_ms",
        "jobs",
        "preempted",
        "prefill_context",
        "prefill_pairs",
        "prefill_tokens",
    )

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.jobs: list[Job] = []
        self.prefill_tokens = 0
        self.prefill_pairs = 0.0
        self.prefill_context = 0
        self.decode_seqs = 0
        self.decode_context = 0
        self.preempted = 0
        self.duration_ms = 0.0


class SimulatedCore:
    """The engine's scheduler and its step-time model. Deterministic: same options and calls, same results."""

    def __init__(
        self,
        options: SimulatedOptions,
        step_model: StepModel | None = None,
        shared: dict[int, BlockPool] | None = None,
    ) -> None:
        """`shared` is one dict for all cores that find in their cache what any of them holds."""
        self.options = options
        self._step_model = step_model
        self.pool = BlockPool(options.kv_blocks, shared)
        self.steps = 0
        self._random = random.Random(options.seed)
        self._jobs: dict[int | str, Job] = {}
        self._running: list[Job] = []  # Sorted by key, so that the last one is the one to preempt.
        self._waiting: list[tuple[tuple[int, int], Job]] = []  # A heap; aborted jobs stay until they come up.
        self._waiting_count = 0
        self._arrivals = 0
        self._owed = 0
        self._owed_pairs = 0
        self._last = StepWork(0, 0.0, 0, 0)
        self._step_ms = 0.0
        self._plan: _Plan | None = None

    def add(self, id: int | str, prompt: Prompt, max_tokens: int | None = None, priority: int = 0) -> Job:
        """Queues a request for exactly `max_tokens` tokens; None asks for the options' `answer_tokens`.

        Raises `InvalidRequest` where prompt and answer do not fit into `max_model_len`.
        """
        if id in self._jobs:
            raise ValueError(f"request {id!r} is already here")
        answer_tokens, finish = self._answer(prompt, max_tokens)
        self._arrivals += 1
        key = (priority if self.options.scheduling == "priority" else 0, self._arrivals)
        job = self._jobs[id] = Job(id, prompt, answer_tokens, finish, key)
        self._wait(job)
        return job

    def abort(self, id: int | str) -> None:
        """Frees a request's blocks and its place in the batch; harmless where it is gone."""
        job = self._jobs.pop(id, None)
        if job is None:
            return
        job.finish = "abort"
        job.scheduled = 0
        self._owe(job, 0)
        if job.running:
            self._running.remove(job)
            self._release(job)
        else:
            self._waiting_count -= 1

    def load(self) -> Load:
        """The load now; what is said of a step is of the last one."""
        last = self._last
        return Load(
            running=len(self._running),
            waiting=self._waiting_count,
            queued_prefill_tokens=self._owed,
            kv_usage=self.pool.used / self.options.kv_blocks,
            step_ms=self._step_ms,
            queued_prefill_pairs=self._owed_pairs * 0.5,
            step_prefill_tokens=last.prefill_tokens,
            step_prefill_pairs=last.prefill_pairs,
            step_decodes=last.decodes,
            step_context_tokens=last.decode_context,
        )

    def step(self) -> StepResult | None:
        """A whole step at once; None where there is nothing to do."""
        return None if self.plan() is None else self.commit()

    def plan(self) -> float | None:
        """Begins a step. Returns its duration in milliseconds; None where there is nothing to do."""
        if self._plan is not None:
            raise RuntimeError("a step is under way")
        if not self._jobs:
            return None
        plan = self._plan = _Plan(self.options.max_num_batched_tokens)
        self._plan_running(plan)
        if not plan.preempted:
            # As vLLM: whoever made room for others must not come back in the same step.
            self._plan_waiting(plan)
        work = StepWork(plan.prefill_tokens, plan.prefill_pairs, plan.decode_seqs, plan.decode_context)
        plan.duration_ms = self._duration_ms(work, plan.prefill_context)
        return plan.duration_ms

    def commit(self) -> StepResult:
        """Ends the step that `plan` began. Requests aborted meanwhile are in no list."""
        plan, self._plan = self._plan, None
        if plan is None:
            raise RuntimeError("no step is under way")
        produced: list[Job] = []
        finished: list[Job] = []
        prefilled: list[Job] = []
        for job in plan.jobs:
            scheduled = job.scheduled
            if not scheduled:
                continue
            job.scheduled = 0
            job.computed += scheduled
            if job.owed:
                self._owe(job, job.tokens - job.computed)
                if not job.owed:
                    prefilled.append(job)
            if job.computed == job.tokens:
                job.tokens += 1
                job.produced += 1
                produced.append(job)
                if job.produced == job.answer_tokens:
                    finished.append(job)
        if finished:
            self._finish(finished)
        self.steps += 1
        self._step_ms = plan.duration_ms
        self._last = StepWork(plan.prefill_tokens, plan.prefill_pairs, plan.decode_seqs, plan.decode_context)
        return StepResult(
            duration_ms=plan.duration_ms,
            produced=produced,
            finished=finished,
            prefill_tokens=plan.prefill_tokens,
            decode_seqs=plan.decode_seqs,
            preempted=plan.preempted,
            cache_events=self.pool.take_events(),
            prefilled=prefilled,
        )

    def stretch(self, start_s: float, longest: int | None = None) -> list[float]:
        """When the coming steps end, from `start_s` on, as far as each of them is sure to do nothing but advance every
        running request by a token: nobody computes a prompt or can be admitted, and only the first takes or names KV
        blocks. The last of them may complete requests. At most `longest` of them; empty where that cannot be said of
        the next step, or where steps have jitter; then `plan` it.

        Holds until a request is added or aborted: first `leap` over the steps that are over by then, and `plan` the one
        that is under way.
        """
        options = self.options
        if self._plan is not None:
            raise RuntimeError("a step is under way")
        running = self._running
        if not running or options.jitter:
            return []
        steps, context, size = longest or LONGEST_STRETCH, 0, options.block_tokens
        for job in running:
            computed = job.computed
            context += computed
            if job.owed:
                return []
            # What `plan` would do for the next step, in its order, so that it may still be called instead.
            if computed >= job.capacity:
                if not self.pool.take(1):
                    return []
                job.anonymous += 1
                job.capacity += size
            if computed + 1 >= job.names_at:
                self._name(job, computed + 1)
            if (left := job.capacity - computed) < steps:
                steps = left
            if (left := job.names_at - 1 - computed) < steps:
                steps = left
            if (left := job.answer_tokens - job.produced) < steps:
                steps = left
        if self._startable():
            return []
        return self._decode_ends(start_s, steps, len(running), context)

    def leap(self, steps: int) -> StepResult:
        """Does so many steps of the last `stretch` at once."""
        running = self._running
        context = 0
        finished: list[Job] = []
        for job in running:
            job.computed += steps
            job.tokens += steps
            job.produced += steps
            context += job.computed
            if job.produced == job.answer_tokens:
                finished.append(job)
        work = self._last = StepWork(0, 0.0, len(running), context)
        self._step_ms = self._duration_ms(work, 0)
        self.steps += steps
        produced = list(running)
        if finished:
            self._finish(finished)
        return StepResult(self._step_ms, produced, finished, 0, work.decodes, 0, self.pool.take_events())

    def _answer(self, prompt: Prompt, max_tokens: int | None) -> tuple[int, str]:
        """Length of the answer, and why it will end."""
        limit = self.options.max_model_len
        if prompt.tokens < 1:
            raise InvalidRequest("the prompt is empty", param="prompt")
        if prompt.tokens + (max_tokens or 1) > limit:
            asked = f"{prompt.tokens} prompt tokens and {max_tokens or 'at least 1'} for the answer"
            raise InvalidRequest(
                f"This model's maximum context length is {limit} tokens. However, you requested {asked}.",
                param="prompt" if max_tokens is None else "max_tokens",
            )
        if max_tokens is not None:
            return max_tokens, "length"
        room = limit - prompt.tokens
        if room < self.options.answer_tokens:
            return room, "length"
        return self.options.answer_tokens, "stop"

    def _plan_running(self, plan: _Plan) -> None:
        # The hot loop: a decoding request passes it with one comparison per case.
        budget, context, decodes = plan.budget, 0, 0
        jobs = plan.jobs
        for job in self._running:  # Preemption pops from its end, at or behind the current one.
            count = job.tokens - job.computed
            if count > budget:
                count = budget
                if not count:
                    break
            end = job.computed + count
            if end > job.capacity and not self._grow(job, end, plan):
                break
            if end >= job.names_at:
                self._name(job, end)
            job.scheduled = count
            jobs.append(job)
            budget -= count
            if job.owed:
                plan.prefill_tokens += count
                plan.prefill_pairs += _pairs(count, end) * 0.5
                plan.prefill_context += end
            else:
                context += end
                decodes += 1
        plan.budget, plan.decode_context, plan.decode_seqs = budget, context, decodes

    def _plan_waiting(self, plan: _Plan) -> None:
        options = self.options
        while plan.budget and len(self._running) < options.max_num_seqs:
            job = self._next_waiting()
            if job is None:
                return
            hits = self._hits(job)
            if not self._fits(job, hits):
                return
            heappop(self._waiting)
            self._waiting_count -= 1
            self._admit(job, hits, plan)

    def _admit(self, job: Job, hits: int, plan: _Plan) -> None:
        start = hits * self.options.block_tokens
        job.held = self.pool.own(job.hashes[:hits])
        self.pool.refer(job.held)
        job.anonymous = hits - len(job.held)
        if job.anonymous:
            self.pool.copy(job.hashes[:hits])
        job.computed = job.capacity = start
        job.named = hits
        job.names_at = start + self.options.block_tokens
        if not job.admitted:
            job.admitted = True
            job.cached_tokens = start
        job.running = True
        insort(self._running, job, key=_KEY)
        self._owe(job, job.tokens - start)
        count = min(job.tokens - start, plan.budget)
        self._grow(job, start + count, plan)
        self._name(job, start + count)
        job.scheduled = count
        plan.jobs.append(job)
        plan.budget -= count
        plan.prefill_tokens += count
        plan.prefill_pairs += _pairs(count, start + count) * 0.5
        plan.prefill_context += start + count

    def _startable(self) -> bool:
        """Whether the next step would admit a waiting request."""
        if len(self._running) >= self.options.max_num_seqs:
            return False
        job = self._next_waiting()
        return job is not None and self._fits(job, self._hits(job))

    def _fits(self, job: Job, hits: int) -> bool:
        # Room for the whole prompt, though blocks are taken chunk by chunk: else long prompts preempt each other.
        own = self.pool.own(job.hashes[:hits])
        return self.pool.fits(-(-job.tokens // self.options.block_tokens) - len(own), own)

    def _next_waiting(self) -> Job | None:
        waiting = self._waiting
        while waiting and waiting[0][1].finish == "abort":
            heappop(waiting)
        return waiting[0][1] if waiting else None

    def _grow(self, job: Job, end: int, plan: _Plan) -> bool:
        """Gives `job` blocks up to token `end`, taking them from younger requests; False where it lost its own."""
        size = self.options.block_tokens
        need = -(-(end - job.capacity) // size)
        while not self.pool.take(need):
            victim = self._running.pop()
            plan.preempted += 1
            self._release(victim)
            self._wait(victim)
            if victim is job:
                return False
        job.anonymous += need
        job.capacity += need * size
        return True

    def _name(self, job: Job, end: int) -> None:
        """Makes the blocks that are full at token `end` known to other requests."""
        size = self.options.block_tokens
        full = end // size
        if full > job.named and self.options.prefix_caching:
            for position in range(len(job.hashes), full):
                job.hashes.append(self._generated_hash(job, position))
            named = self.pool.name(job.hashes, job.named, full, job.id)
            job.held += named
            job.anonymous -= len(named)
        job.named = full
        job.names_at = (full + 1) * size

    def _generated_hash(self, job: Job, position: int) -> int:
        size = self.options.block_tokens
        stop = (position + 1) * size - job.prompt.tokens
        if stop <= 0:  # A prompt's block of which no hash was given.
            return chain(job.hashes[position - 1] if position else 0, repr(job.id).encode())
        start = max(stop - size, 0)
        content = answer(job.prompt.key, start, stop)
        if stop < size:
            content = job.prompt.tail + content
        return chain(job.hashes[position - 1] if position else 0, content)

    def _hits(self, job: Job) -> int:
        """Blocks of `job` that are known. At least one token is left to compute, as its output is needed."""
        if not self.options.prefix_caching:
            return 0
        return self.pool.match(job.hashes, (job.tokens - 1) // self.options.block_tokens)

    def _wait(self, job: Job) -> None:
        job.running = False
        job.scheduled = 0
        self._owe(job, job.tokens - self._hits(job) * self.options.block_tokens)
        heappush(self._waiting, (job.key, job))
        self._waiting_count += 1

    def _release(self, job: Job) -> None:
        self.pool.release(job.held, job.anonymous)
        job.held = []
        job.anonymous = job.capacity = job.computed = 0
        job.running = False

    def _finish(self, finished: list[Job]) -> None:
        for job in finished:
            job.finish = job.finish_when_whole
            del self._jobs[job.id]
            self._release(job)
        self._running = [job for job in self._running if job.running]

    def _owe(self, job: Job, tokens: int) -> None:
        pairs = _pairs(tokens, job.tokens)
        self._owed += tokens - job.owed
        self._owed_pairs += pairs - job.owed_pairs
        job.owed = tokens
        job.owed_pairs = pairs

    def _duration_ms(self, work: StepWork, prefill_context: int) -> float:
        options = self.options
        if self._step_model is not None:
            duration = self._step_model(work)
        else:
            duration = (
                options.step_base_ms
                + options.prefill_ms_per_token * work.prefill_tokens
                + options.decode_ms_per_seq * work.decodes
                + options.context_ms_per_1k_tokens * (prefill_context + work.decode_context) / 1000
            )
            if options.roofline_floor_ms or options.roofline_ms_per_token:
                computing = options.roofline_ms_per_token * (work.prefill_tokens + work.decodes)
                duration += sqrt(options.roofline_floor_ms**2 + computing * computing)
            duration += options.prefill_ms_per_pair * work.prefill_pairs
            duration += options.decode_ms_per_context_token * work.decode_context
        if options.jitter:
            duration *= 1 + options.jitter * self._random.uniform(-1, 1)
        return duration * options.time_scale

    def _decode_ends(self, start_s: float, steps: int, decodes: int, context: int) -> list[float]:
        """When steps that only decode end; `_duration_ms` with all that is constant taken out of the loop."""
        ends: list[float] = []
        options = self.options
        model, scale = self._step_model, options.time_scale
        fixed = options.step_base_ms + options.decode_ms_per_seq * decodes
        computing = options.roofline_ms_per_token * decodes
        products = sqrt(options.roofline_floor_ms**2 + computing * computing)
        linear, read = options.context_ms_per_1k_tokens, options.decode_ms_per_context_token
        for _ in range(steps):
            context += decodes
            if model is not None:
                duration = model(StepWork(0, 0.0, decodes, context))
            else:
                duration = fixed + linear * context / 1000 + products + read * context
            start_s += duration * scale / 1000
            ends.append(start_s)
        return ends


def _pairs(tokens: int, end: int) -> int:
    """Twice the attention pairs of the last `tokens` tokens of `end`."""
    return tokens * (2 * end - tokens)
