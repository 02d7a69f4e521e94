"""Policies that no router could be: they see the replicas themselves, without delay or error.

`Greedy` is what perfect knowledge is worth to a router that looks at one request at a time; `Ideal` is `Greedy` on
replicas that share one cache.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from engine.simulated_core import Job, SimulatedCore, StepWork
from engine.simulated_text import Prompt
from loadtests.simulate.context import Context, Truth
from loadtests.simulate.perf import Profile, step_ms
from router.types import Decision, Reason, ReplicaView, Request, Snapshot


class Greedy:
    """The replica with the shortest true time to first token; ties at random.

    It knows each replica's queue, cache and cost model as they are now and how long running answers will be, and looks
    no further than this one request.
    """

    def __init__(self, context: Context) -> None:
        self._context = context

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        context = self._context
        prompt: Prompt = context.request(request).prompt
        now = context.now()
        pooled = self._pooled(prompt)

        def ttft(view: ReplicaView) -> float:
            return true_ttft_s(context.replicas[view.replica], context.profile, prompt, now, pooled)

        return cheapest(snapshot.replicas, ttft, context.random, Reason.LEAST_COST)

    def _pooled(self, prompt: Prompt) -> int:
        """KV blocks of the prompt that every replica finds, whether it holds them or not."""
        return 0


class Ideal(Greedy):
    """`Greedy` where a prompt that is cached anywhere counts as cached everywhere, at no cost: only balance is left.

    The replicas must share their caches accordingly (`Context.pooled`).
    """

    def _pooled(self, prompt: Prompt) -> int:
        most = 0
        for truth in self._context.replicas.values():
            truth.settle()
            limit = (prompt.tokens - 1) // truth.core.options.block_tokens
            most = max(most, truth.core.pool.match(prompt.hashes, limit))
        return most


def true_ttft_s(truth: Truth, profile: Profile, prompt: Prompt, now: float, pooled: int = 0) -> float:
    """Seconds until the first token, if this prompt came to the replica at `now` and nothing after it.

    The step under way, then the prompts ahead and this one in steps of the whole token budget, with today's decodes in
    each; where KV blocks or places in the batch are short, not before enough running answers are complete. Exact but
    for answers that begin or end meanwhile and for prompts ahead that share what is not computed yet. `pooled`: KV
    blocks that it finds there in any case.
    """
    truth.settle()
    core = truth.core
    queue = _Queue(core)
    hits = max(_hits(core, queue.unfinished, prompt), pooled)
    new = prompt.tokens - hits * core.options.block_tokens
    under_way = max(truth.step_ends_s() - now, 0.0)
    held_up = _held_up_ms(core, profile, queue, prompt, new) * truth.slowness / 1000
    ahead = _steps_ms(profile, queue, queue.tokens, queue.pairs)
    pairs = new * (2 * prompt.tokens - new) * 0.5
    both = _steps_ms(profile, queue, queue.tokens + new, queue.pairs + pairs)
    return under_way + max(held_up - ahead * truth.slowness / 1000, 0.0) + both * truth.slowness / 1000


def cheapest(
    replicas: Sequence[ReplicaView], cost: Callable[[ReplicaView], float], random: random.Random, reason: Reason
) -> Decision:
    """The replica with the least cost, ties at random."""
    costs = [cost(view) for view in replicas]
    lowest = min(costs)
    ties = [view.replica for view, each in zip(replicas, costs, strict=True) if each == lowest]
    return Decision(ties[0] if len(ties) == 1 else random.choice(ties), reason, (), lowest)


class _Queue:
    """What a replica will have to do once the step under way is over."""

    def __init__(self, core: SimulatedCore) -> None:
        self.unfinished: list[Job] = []
        self.blocks = 0
        """KV blocks that the prompts ahead still need."""
        self.waiting = 0
        self.decoding: list[Job] = []
        self.tokens = 0
        self.pairs = 0.0
        self.context = 0
        self.budget = core.options.max_num_batched_tokens
        size = core.options.block_tokens
        for job in core._jobs.values():  # The core shows sums only; a bound may look inside.
            left = job.owed - job.scheduled if job.owed else 0
            if job.owed:
                self.unfinished.append(job)
                self.blocks += -(-(job.tokens - job.capacity if job.running else job.owed) // size)
            self.waiting += not job.running
            if left > 0:
                self.tokens += left
                self.pairs += left * (2 * job.tokens - left) * 0.5
            else:
                self.decoding.append(job)
                self.context += job.tokens
        self.budget = max(self.budget - len(self.decoding), 1)


def _hits(core: SimulatedCore, unfinished: Sequence[Job], prompt: Prompt) -> int:
    """KV blocks of the prompt that will be there when it runs: cached ones, and those that prompts ahead compute."""
    if not core.options.prefix_caching:
        return 0
    limit = (prompt.tokens - 1) // core.options.block_tokens
    hashes = prompt.hashes[:limit]
    cached = hits = core.pool.match(hashes, limit)
    if cached == len(hashes):
        return cached
    for job in unfinished:
        # A block's hash stands for all before it too, so one comparison tells whether the prompts agree up to here.
        theirs = job.prompt.hashes[: job.prompt.tokens // core.options.block_tokens]
        end = hits
        while end < min(len(theirs), len(hashes)) and theirs[end] == hashes[end]:
            end += 1
        hits = end
    return hits


def _steps_ms(profile: Profile, queue: _Queue, tokens: float, pairs: float) -> float:
    """How long it takes to compute these prompt tokens beside the decodes."""
    if tokens <= 0:
        return 0.0
    full, rest = divmod(tokens, queue.budget)
    decodes = len(queue.decoding)
    total = 0.0
    if full:
        work = StepWork(int(queue.budget), pairs * queue.budget / tokens, decodes, queue.context)
        total = full * step_ms(profile, work)
    if rest:
        total += step_ms(profile, StepWork(int(rest), pairs * rest / tokens, decodes, queue.context))
    return total


def _held_up_ms(core: SimulatedCore, profile: Profile, queue: _Queue, prompt: Prompt, new: int) -> float:
    """How long until running answers have made room for the prompts ahead and this one; 0 where there is room."""
    size = core.options.block_tokens
    blocks = queue.blocks + -(-new // size) - (core.pool.blocks - core.pool.used)
    places = core.load().running + queue.waiting + 1 - core.options.max_num_seqs
    if (blocks <= 0 and places <= 0) or not queue.decoding:
        return 0.0
    left = 0
    for job in sorted(queue.decoding, key=_answer_left):
        left = _answer_left(job)
        blocks -= len(job.held) + job.anonymous
        places -= 1
        if blocks <= 0 and places <= 0:
            break
    return left * step_ms(profile, StepWork(0, 0.0, len(queue.decoding), queue.context))


def _answer_left(job: Job) -> int:
    return job.answer_tokens - job.produced
