"""Other routers' rules, re-implemented as policies so that the simulator can run them beside kvlane's own.

None of this is those projects' code, and a real deployment of theirs differs in what a policy cannot show: how stale
their metrics are, what their proxies cost, what they do when a replica refuses. Each class names its source, the
parameters it uses (the source's defaults) and where it deviates. Three rules hold for all, in their favour:

- ties fall at random, where some of the sources take the first replica of a list;
- none of them uses kvlane's cost model, so the simulator's `--model-error` and `--replica-error` do not touch them;
- routers that learn the engine's cache from its events see what kvlane's index sees, prompts that are being computed
  included, as fresh as kvlane sees it; and as they tokenize prompts, they know the exact lengths that kvlane estimates.

Routers that only remember what they sent where (`CacheAware`, `RayPrefix`, `Aibrix`) keep that memory here
(`Remembered`), in prefix blocks instead of characters: a block's hash stands for the block and all before it, so a
flat table of hashes is their radix tree at the granularity of a block. The bounds `Greedy` and `Ideal` are in `bounds`.
"""

from __future__ import annotations

import math
import random
import statistics
import struct
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from itertools import repeat
from random import Random
from typing import Annotated, ClassVar, Final, TypeAlias

import msgspec
import xxhash

from loadtests.simulate.bounds import Greedy, Ideal, cheapest
from loadtests.simulate.context import Context
from loadtests.simulate.perf import KV_BLOCK_TOKENS
from router.policies.base import NoOptions, Policy
from router.types import Decision, Held, Reason, ReplicaView, Request, Snapshot

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all options here."""


Tokens: TypeAlias = Callable[[Request, Snapshot], int]
"""Length of a request's prompt."""


def estimated(request: Request, snapshot: Snapshot) -> int:
    """The length that kvlane's router estimates."""
    return snapshot.prefix.tokens


InFlight: TypeAlias = Callable[[str, Sequence[int]], int]
"""How many of a prompt's blocks, from its first on, the router's own requests in flight on a replica have."""


def nothing(replica: str, blocks: Sequence[int]) -> int:
    return 0


class Remembered:
    """For each replica the prefix blocks of prompts that were sent there, those used longest ago forgotten first."""

    def __init__(self) -> None:
        self._blocks: dict[str, OrderedDict[int, None]] = {}

    def keep(self, names: Collection[str]) -> None:
        """Forgets replicas that are gone."""
        if self._blocks.keys() != set(names):
            self._blocks = {name: self._blocks.get(name, OrderedDict()) for name in names}

    def depths(self, blocks: Iterable[int], names: Iterable[str]) -> dict[str, int]:
        """How many of `blocks` each replica was sent before, from the beginning; those with none are left out."""
        depths: dict[str, int] = {}
        alive = list(names)
        for depth, block in enumerate(blocks, 1):
            alive = [name for name in alive if block in self._blocks[name]]
            if not alive:
                break
            depths.update(dict.fromkeys(alive, depth))
        return depths

    def size(self, name: str) -> int:
        """Blocks remembered of one replica."""
        return len(self._blocks[name])

    def sent(self, name: str, blocks: Sequence[int], capacity: float = math.inf) -> None:
        """A prompt went to a replica, of which at most `capacity` blocks are remembered."""
        held = self._blocks[name]
        # The prompt's beginning last, so that it is newer than what hangs on it: only ends are ever forgotten.
        for block in reversed(blocks):
            held[block] = None
            held.move_to_end(block)
        while len(held) > capacity:
            held.popitem(last=False)


class CacheAware:
    """Re-implementation of `cache_aware` of vllm-router and the SGLang router (`src/policies/cache_aware.rs`).

    Load is the router's own requests in flight. Where the largest exceeds the smallest by more than `balance_abs`, and
    by more than `balance_rel` times: least load. Else the replica that was sent the longest part of the prompt before,
    if that is more than `cache_threshold` of it; else least load (older versions: the smallest tree). Parameters: the
    defaults 0.3, 64, 1.5 and 2^26 characters per tree. Deviations: of several replicas at the deepest node the source
    takes whichever its map yields first, here one is drawn; its trees are trimmed every two minutes, here at once.
    """

    class Options(Options, frozen=True):
        cache_threshold: Share = 0.3
        balance_abs: int = 64
        balance_rel: float = 1.5
        max_tree_bytes: Count = 1 << 26

    affinity: ClassVar[bool] = True

    def __init__(self, options: Options, random: random.Random) -> None:
        self._options = options
        self._random = random
        self._memory = Remembered()

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        replicas = snapshot.replicas
        blocks, block_bytes = _blocks(snapshot)
        self._memory.keep([view.replica for view in replicas])
        decision = self._decide(replicas, blocks)
        self._memory.sent(decision.replica, blocks, self._options.max_tree_bytes // block_bytes)
        return decision

    def _decide(self, replicas: Sequence[ReplicaView], blocks: Sequence[int]) -> Decision:
        options = self._options
        loads = [view.leases for view in replicas]
        most, least = max(loads), min(loads)
        if most - least > options.balance_abs and most > least * options.balance_rel:
            return cheapest(replicas, _leases, self._random, Reason.OVERLOADED)
        depths = self._memory.depths(blocks, [view.replica for view in replicas])
        deepest = max(depths.values(), default=0)
        if deepest > options.cache_threshold * len(blocks):
            holders = [name for name, depth in depths.items() if depth == deepest]
            return Decision(self._random.choice(holders), Reason.LONGEST_PREFIX, (), -deepest)
        return cheapest(replicas, _leases, self._random, Reason.SHORTEST_QUEUE)


class RayPrefix:
    """Re-implementation of Ray Serve's `PrefixCacheAffinityRouter` (Ray 2.60, `ray.llm`, `prefix_aware_router.py`).

    Where the longest and the shortest queue differ by more than `imbalanced_threshold`: the shorter of two drawn ones.
    Else those replicas that were sent the longest part of the prompt before; where that is less than
    `match_rate_threshold` of it, those with the smallest prefix trees; the shortest queue among them. Parameters: Ray's
    defaults, which are no limit to the imbalance, 0.1, and no eviction from the trees. Deviations: Ray counts
    characters where this counts blocks, and its routers share one tree in an actor where here each has its own.
    """

    class Options(Options, frozen=True):
        imbalanced_threshold: float = math.inf
        match_rate_threshold: Share = 0.1

    affinity: ClassVar[bool] = True

    def __init__(self, options: Options, random: random.Random) -> None:
        self._options = options
        self._random = random
        self._memory = Remembered()

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        replicas = snapshot.replicas
        blocks, _ = _blocks(snapshot)
        self._memory.keep([view.replica for view in replicas])
        decision = self._decide(replicas, blocks)
        self._memory.sent(decision.replica, blocks)
        return decision

    def _decide(self, replicas: Sequence[ReplicaView], blocks: Sequence[int]) -> Decision:
        queues = [view.queue_depth for view in replicas]
        if max(queues) - min(queues) > self._options.imbalanced_threshold:
            pair = self._random.sample(replicas, min(2, len(replicas)))
            return cheapest(pair, _queue_depth, self._random, Reason.SHORTER_OF_TWO)
        memory = self._memory
        depths = memory.depths(blocks, [view.replica for view in replicas])
        deepest = max(depths.values(), default=0)
        if deepest and deepest >= self._options.match_rate_threshold * len(blocks):
            matching = [view for view in replicas if depths.get(view.replica) == deepest]
            return cheapest(matching, _queue_depth, self._random, Reason.LONGEST_PREFIX)
        smallest = min(memory.size(view.replica) for view in replicas)
        emptiest = [view for view in replicas if memory.size(view.replica) == smallest]
        return cheapest(emptiest, _queue_depth, self._random, Reason.POLICY)


class Chwbl:
    """Consistent hashing with bounded load on the prompt's beginning (Mirrokni, Thorup, Zadimoghaddam, SODA 2018).

    As in KubeAI's `PrefixHash` strategy and the SGLang gateway's `prefix_hash`: a ring of `virtual_nodes` points per
    replica; the first replica clockwise of the prompt's hash whose load with this request is at most `load_factor`
    times the mean, rounded up. Load is the router's own requests in flight. Parameters: 100 points, 1.25. Deviation:
    KubeAI hashes the first 100 characters of the first *user* message, which a trace of block hashes cannot show; the
    first `prefix_bytes` (about 1,024 tokens) are the least that tell the Mooncake conversations apart, all of which
    share their first 512 tokens.
    """

    class Options(Options, frozen=True):
        virtual_nodes: Count = 100
        load_factor: Annotated[float, msgspec.Meta(gt=1)] = 1.25
        prefix_bytes: Count = 4096

    affinity: ClassVar[bool] = True

    def __init__(self, options: Options, random: random.Random) -> None:
        self._options = options
        self._random = random
        self._names: frozenset[str] = frozenset()
        self._points: list[int] = []
        self._owners: list[str] = []

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        replicas = snapshot.replicas
        blocks, block_bytes = _blocks(snapshot)
        if not blocks:
            return cheapest(replicas, _leases, self._random, Reason.SHORTEST_QUEUE)
        self._place(frozenset(view.replica for view in replicas))
        loads = {view.replica: view.leases for view in replicas}
        bound = math.ceil(self._options.load_factor * (sum(loads.values()) + 1) / len(loads))
        key = blocks[min(max(self._options.prefix_bytes // block_bytes, 1), len(blocks)) - 1]
        start = bisect_left(self._points, xxhash.xxh3_64_intdigest(key.to_bytes(8, "little")))
        first = self._owners[start % len(self._owners)]
        for step in range(len(self._owners)):  # Ends at the least loaded replica at the latest: it is below the mean.
            name = self._owners[(start + step) % len(self._owners)]
            if loads[name] + 1 <= bound:
                return Decision(name, Reason.PREFIX_HASH if name == first else Reason.OVERLOADED, (), loads[name])
        raise AssertionError("no replica is below the mean load")

    def _place(self, names: frozenset[str]) -> None:
        if names == self._names:
            return
        self._names = names
        count = self._options.virtual_nodes
        ring: list[tuple[int, str]] = []
        for name in names:  # Each replica's points are drawn from a source that only its name decides.
            drawn = struct.unpack(f"<{count}Q", Random(name).randbytes(8 * count))
            ring += zip(drawn, repeat(name), strict=False)
        ring.sort()
        self._points = [point for point, _ in ring]
        self._owners = [name for _, name in ring]


class Aibrix:
    """Re-implementation of AIBrix's `prefix-cache` router (`pkg/plugins/gateway/algorithms/prefix_cache.go`).

    Load is the gateway's own requests in flight. Where the largest is above `imbalance_factor` times (mean + 1) and
    exceeds the smallest by `imbalance_gap`, only the least loaded replicas take part. Of those that were sent a part of
    the prompt before, longest part first and least load among equals, the first whose load is at most the mean plus
    `deviations` standard deviations; where there is none, the least load of all. Parameters: the defaults 2, 8 and 1,
    and 200,000 blocks of memory, taken as blocks of 128 characters and shared evenly by the replicas. Deviations: the
    source's default block is 4 characters, which would make it forget most of a long-prompt trace; its 20-minute limit
    on age is left out; and it forgets beginnings before ends, this ends first.
    """

    class Options(Options, frozen=True):
        imbalance_factor: Positive = 2.0
        imbalance_gap: int = 8
        deviations: float = 1.0
        memory_bytes: Count = 200_000 * 128

    affinity: ClassVar[bool] = True

    def __init__(self, options: Options, random: random.Random) -> None:
        self._options = options
        self._random = random
        self._memory = Remembered()

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        replicas = snapshot.replicas
        blocks, block_bytes = _blocks(snapshot)
        self._memory.keep([view.replica for view in replicas])
        decision = self._decide(replicas, blocks)
        self._memory.sent(decision.replica, blocks, self._options.memory_bytes // block_bytes // len(replicas))
        return decision

    def _decide(self, replicas: Sequence[ReplicaView], blocks: Sequence[int]) -> Decision:
        loads = {view.replica: view.leases for view in replicas}
        mean = statistics.fmean(loads.values())
        limit = mean + self._options.deviations * statistics.pstdev(loads.values(), mean)
        depths = self._memory.depths(blocks, self._partakers(loads, mean))
        within = [name for name in depths if loads[name] <= limit]
        if not within:
            return cheapest(replicas, _leases, self._random, Reason.OVERLOADED if depths else Reason.SHORTEST_QUEUE)
        ranks = {name: (-depths[name], loads[name]) for name in within}
        best = min(ranks.values())
        name = self._random.choice([name for name, rank in ranks.items() if rank == best])
        return Decision(name, Reason.LONGEST_PREFIX, (), best[0])

    def _partakers(self, loads: dict[str, int], mean: float) -> list[str]:
        options = self._options
        most, least = max(loads.values()), min(loads.values())
        if most > options.imbalance_factor * (mean + 1) and most - least >= options.imbalance_gap:
            return [name for name, load in loads.items() if load == least]
        return list(loads)


class LlmD:
    """Re-implementation of llm-d's scheduler profile with the weights 3 : 2 : 2 (llm-d-router, `scheduling/scorer`).

    The highest sum of: `prefix` x the share of the prompt's blocks that the replica holds; `queue` x (1 for the least
    waiting requests, 0 for the most, linear between; 1 for all where equal); `kv` x (1 - KV usage). Picker: maximum.
    Deviation: the sources poll engine metrics every 50 ms; here `waiting` and `kv_usage` are those of the last step.
    """

    class Options(Options, frozen=True):
        prefix: float = 3.0
        queue: float = 2.0
        kv: float = 2.0

    affinity: ClassVar[bool] = True

    def __init__(self, options: Options, random: random.Random) -> None:
        self._options = options
        self._random = random

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        options = self._options
        replicas = snapshot.replicas
        held = snapshot.prefix.held
        total = max(len(_blocks(snapshot)[0]), 1)
        waiting = [view.load.waiting for view in replicas]
        longest = max(waiting)
        spread = longest - min(waiting)

        def loss(view: ReplicaView) -> float:
            queue = (longest - view.load.waiting) / spread if spread else 1.0
            prefix = held.get(view.replica, _NONE).blocks / total
            return -(options.prefix * prefix + options.queue * queue + options.kv * (1 - view.load.kv_usage))

        return cheapest(replicas, loss, self._random, Reason.BEST_SCORE)


class Dynamo:
    """Re-implementation of NVIDIA Dynamo's KV router (`lib/kv-router/src/scheduling/selector.rs`, and its docs).

    Least cost = `overlap_weight` x blocks to be computed there, this prompt's uncached ones included + blocks in use
    there, and those of this prompt that none of the router's requests in flight there has; temperature 0. Parameters:
    weight 1, blocks of 16 tokens (the size cancels out). Deviation: Dynamo counts a sequence's blocks as in use from
    routing on; here those in use are the engine's, and the uncached tokens that still wait for it are added.
    """

    class Options(Options, frozen=True):
        overlap_weight: float = 1.0
        block_tokens: Count = 16

    affinity: ClassVar[bool] = True

    def __init__(
        self, options: Options, random: random.Random, tokens: Tokens = estimated, in_flight: InFlight = nothing
    ) -> None:
        self._options = options
        self._random = random
        self._tokens = tokens
        self._in_flight = in_flight

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        options = self._options
        held = snapshot.prefix.held
        tokens = self._tokens(request, snapshot)
        blocks = _blocks(snapshot)[0]

        def cost(view: ReplicaView) -> float:
            queued = view.load.queued_prefill_tokens + view.unacked_tokens
            new = tokens - self._in_flight(view.replica, blocks) * KV_BLOCK_TOKENS
            in_use = view.load.kv_usage * view.kv_tokens + queued + new
            prefill = queued + _uncached(tokens, held.get(view.replica))
            return (options.overlap_weight * prefill + in_use) / options.block_tokens

        return cheapest(snapshot.replicas, cost, self._random, Reason.LEAST_COST)


class LMetric:
    """Re-implementation of LMETRIC ("Simple is Better: Multiplication May Be All You Need", OSDI 2026).

    Least product of the new prefill tokens that would be queued there, this prompt's uncached ones included, and the
    batch size, which is all its requests and this one (as llm-d's `lmetric-scorer` counts: an idle replica has 1). No
    parameters.
    """

    Options: ClassVar[type[msgspec.Struct]] = NoOptions
    affinity: ClassVar[bool] = True

    def __init__(self, options: NoOptions, random: random.Random, tokens: Tokens = estimated) -> None:
        self._random = random
        self._tokens = tokens

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        held = snapshot.prefix.held
        tokens = self._tokens(request, snapshot)

        def product(view: ReplicaView) -> float:
            queued = view.load.queued_prefill_tokens + view.unacked_tokens
            return (queued + _uncached(tokens, held.get(view.replica))) * (view.queue_depth + 1)

        return cheapest(snapshot.replicas, product, self._random, Reason.LEAST_COST)


def _made(policy: Callable[..., Policy], options: type[msgspec.Struct]) -> Callable[[Context], Policy]:
    """Makes the policy for one simulated router. Raises `msgspec.ValidationError` for options that it does not have."""
    return lambda context: policy(msgspec.convert(dict(context.options), options), context.random)


def _tokenizing(policy: Callable[..., Policy], options: type[msgspec.Struct]) -> Callable[[Context], Policy]:
    """The same for policies that know prompts' exact lengths."""

    def make(context: Context) -> Policy:
        def tokens(request: Request, snapshot: Snapshot) -> int:
            exact: int = context.request(request).prompt.tokens
            return exact

        return policy(msgspec.convert(dict(context.options), options), context.random, tokens)

    return make


def _dynamo(context: Context) -> Policy:
    return _tokenizing(partial(Dynamo, in_flight=context.in_flight), Dynamo.Options)(context)


BASELINES: Final[dict[str, Callable[[Context], Policy]]] = {
    "cache-aware": _made(CacheAware, CacheAware.Options),
    "ray-prefix": _made(RayPrefix, RayPrefix.Options),
    "chwbl": _made(Chwbl, Chwbl.Options),
    "aibrix": _made(Aibrix, Aibrix.Options),
    "llm-d": _made(LlmD, LlmD.Options),
    "dynamo": _dynamo,
    "lmetric": _tokenizing(LMetric, NoOptions),
    "greedy": Greedy,
    "ideal": Ideal,
}
"""One policy per simulated router, by the name that ``--policies`` takes."""

_NONE: Final = Held(0, 0)


def _uncached(tokens: int, held: Held | None) -> int:
    """Prompt tokens to be computed; at least one always is."""
    return max(tokens - held.tokens, 1) if held else tokens


def _blocks(snapshot: Snapshot) -> tuple[Sequence[int], int]:
    """The prompt's prefix blocks and their size in bytes."""
    chain = snapshot.prefix.chain
    return ((), 1) if chain is None else (chain.blocks, chain.block_bytes)


def _leases(view: ReplicaView) -> int:
    return view.leases


def _queue_depth(view: ReplicaView) -> int:
    return view.queue_depth
