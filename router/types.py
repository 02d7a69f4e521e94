"""The words that all stages share: requests, replicas as a policy sees them, loads, decisions, receipts.

Imports nothing of ours. Everything here is a value: nothing in this module holds state or does I/O.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any, Final, Protocol

import msgspec

_set: Final = msgspec.structs.force_setattr
_UNBOUNDED: Final = 1 << 30

Headers = Sequence[tuple[str, str]]
"""Header names (lower case) and values, in order; a name may come more than once."""


class Rpc(enum.IntEnum):
    """How a stream's payloads are rendered."""

    HTTP = 0
    GRPC = 1


class Load(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A replica's load after its last engine step, all routers together."""

    running: int = 0
    """Requests in the engine's batch."""
    waiting: int = 0
    """Requests accepted but not in the batch."""
    queued_prefill_tokens: int = 0
    """Prompt tokens still to be computed, those found in the KV cache left out."""
    kv_usage: float = 0.0
    """Share of the KV blocks in use, 0 to 1."""
    step_ms: float = 0.0
    """Duration of the last engine step in milliseconds."""
    queued_prefill_pairs: float = 0.0
    """Attention's part of the queued prefill: pairs of a token to be computed and a token before it in its own prompt;
    n uncached tokens behind c cached ones make n * c + n * n / 2. 0 where the engine cannot say."""
    step_prefill_tokens: int = 0
    """Prompt tokens that the last step computed."""
    step_prefill_pairs: float = 0.0
    """Attention pairs of those tokens; 0 where the engine cannot say."""
    step_decodes: int = 0
    """Requests that the last step advanced by an output token without computing any of their prompt."""
    step_context_tokens: int = 0
    """Tokens in the KV cache that those requests' attention read."""
    asleep: bool = False
    """The engine sleeps, or is about to, or wakes: what is sent there waits until it is awake."""


class ModelCard(msgspec.Struct, frozen=True, array_like=True):
    """One name that a replica answers to."""

    name: str
    parent: str = ""
    """The base model of a LoRA adapter; empty for a base model."""
    max_model_len: int = 0
    """Longest prompt plus answer, in tokens."""


class RouteInfo(msgspec.Struct, frozen=True, array_like=True):
    """An HTTP path template that a replica's application answers, such as ``/v1/responses/{response_id}``."""

    path: str
    methods: tuple[str, ...]


class EngineInfo(msgspec.Struct, frozen=True, array_like=True):
    """What a replica says of its engine when a lane opens."""

    kind: str
    """``vllm`` or ``sim``."""
    models: tuple[ModelCard, ...]
    routes: tuple[RouteInfo, ...] = ()
    max_num_seqs: int = 0
    """Most requests in one batch."""
    kv_blocks: int = 0
    kv_block_tokens: int = 0
    """Size of a KV block in tokens."""
    prefix_caching: bool = True
    version: str = ""


class Request(msgspec.Struct, frozen=True):
    """What routing may know of a request. The body travels on untouched."""

    request_id: str
    model: str
    rpc: Rpc
    path: str
    """HTTP path with its query, or the gRPC method's full name."""
    body: bytes
    method: str = "POST"
    headers: tuple[tuple[str, str], ...] = ()
    session_id: str = ""
    lora: str = ""
    cache_salt: str = ""
    priority: int = 0
    timeout_s: float | None = None
    """Time left until the caller's own deadline; None where it set none."""
    tenant: str = ""
    """Whose API key it came with; empty where none is asked for. Stays in the router."""
    streamed: bool = False
    """The body of an HTTP request asks for a stream of events."""


class CacheMode(enum.StrEnum):
    """What the router knows of a replica's KV cache."""

    EXACT = "exact"
    """The replica reports what it stores and evicts."""
    APPROXIMATE = "approximate"
    """No usable reports: the router remembers what it sent there, as much as fits into the replica's KV cache."""
    OFF = "off"
    """The engine reuses no prefixes."""


class Outlook(msgspec.Struct, frozen=True, gc=False):
    """What the load model expects of a replica; learned from its steps, in seconds."""

    wait_s: float = 0.0
    """Prompt work that was queued there at `as_of`; it has been worked on since."""
    step_s: float = 0.0
    """A step with the present batch and no prompt in it: the time per output token when nobody disturbs."""
    token_s: float = 0.0
    """Per uncached prompt token."""
    pair_s: float = 0.0
    """Per attention pair of prompt tokens (see `Load.queued_prefill_pairs`)."""
    batch_s: float = 0.0
    """What a step with prompt tokens takes beside them: the least that any prompt waits for its first token."""
    as_of: float = 0.0
    """When the step under way began, or else when the load was reported, on the router's clock."""
    sent_s: float = 0.0
    """Prompt work of requests that are on their way there, or that the load does not count yet."""

    def begins_s(self, now: float) -> float:
        """From `now` until the engine would begin to compute the prompt of a request that is sent now."""
        wait = self.wait_s - (now - self.as_of)
        return (wait if wait > 0.0 else 0.0) + self.sent_s

    def prefill_s(self, tokens: float, cached: float) -> float:
        """Time to compute a prompt of `tokens` tokens whose first `cached` ones are in the KV cache."""
        new = tokens - cached
        return new * self.token_s + new * (cached + new * 0.5) * self.pair_s


Terms = tuple[float, float, float, float, float, float, int, int, int, float, int]
"""What a decision asks of each replica: free_at, sent_s, batch_s, step_s, token_s, pair_s, running, queue_depth,
beyond, kv_usage, leases. *Beyond* is by how much the queue is longer than the largest batch, below 0 while there is
room in it; a batch of unknown size has room always."""
TERMS: Final = 11


class ReplicaView(msgspec.Struct, frozen=True, gc=False):
    """One ready replica as a policy sees it."""

    replica: str
    load: Load
    unacked: int
    """Requests that this router sent and that ``load`` does not count yet."""
    leases: int
    """This router's own requests in flight there."""
    max_num_seqs: int = 0
    outlook: Outlook = Outlook()
    unacked_tokens: int = 0
    """Uncached prompt tokens of the `unacked` requests, as estimated when they were routed."""
    unacked_pairs: float = 0.0
    """Their attention pairs."""
    kv_tokens: int = 0
    """Size of its KV cache in tokens; 0 where it does not say."""
    cache: CacheMode = CacheMode.OFF
    # Worked out of the others, once, since every decision reads them of every replica; what is given here is ignored.
    running: int = 0
    """Requests in its batch, those on their way included."""
    queue_depth: int = 0
    """Requests running or waiting there, those on their way included."""
    free_at: float = 0.0
    """When the prompt work that was queued there will be done, on the clock of `Outlook.as_of`."""
    terms: Terms = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0, 0, 0.0, 0)

    def __post_init__(self) -> None:
        load, outlook = self.load, self.outlook
        running = load.running + self.unacked
        depth = running + load.waiting
        free_at = outlook.as_of + outlook.wait_s
        _set(self, "running", running)
        _set(self, "queue_depth", depth)
        _set(self, "free_at", free_at)
        terms = (
            free_at,
            outlook.sent_s,
            outlook.batch_s,
            outlook.step_s,
            outlook.token_s,
            outlook.pair_s,
            running,
            depth,
            depth - (self.max_num_seqs or _UNBOUNDED),
            load.kv_usage,
            self.leases,
        )
        _set(self, "terms", terms)

    @property
    def asleep(self) -> bool:
        """Whether its engine sleeps."""
        return self.load.asleep

    def expects_s(self, now: float, tokens: int, cached: int) -> float:
        """From a submit at `now` until the first output for a prompt of which so much is cached there: what is left of
        the queue, the step that computes the prompt, and the rest of the prompt. 0 where the prompt's length or the
        replica's speed is not known, or where it has to wake first."""
        outlook = self.outlook
        if not tokens or not outlook.token_s or self.load.asleep:
            return 0.0
        return outlook.begins_s(now) + outlook.batch_s + outlook.prefill_s(tokens, cached)


class Brief(Protocol):
    """Of a replica, what a receipt tells: a view, or what views are made of."""

    @property
    def queue_depth(self) -> int: ...

    @property
    def asleep(self) -> bool: ...

    def expects_s(self, now: float, tokens: int, cached: int) -> float:
        """As `ReplicaView.expects_s`."""


class Chain(msgspec.Struct, frozen=True, gc=False):
    """A prompt as chained hashes of its prefix blocks; each hash stands for its block and all before it."""

    block_bytes: int
    """Size of a prefix block in canonical prompt bytes."""
    seed: int
    """Hash of the namespace: model, LoRA adapter, cache salt, tools. 64 bits, as all hashes here."""
    blocks: tuple[int, ...]
    """Of the full blocks; the prompt's last `prompt_bytes % block_bytes` bytes are in none."""
    prompt_bytes: int


class Held(msgspec.Struct, frozen=True, gc=False):
    """What one replica holds of a prompt."""

    blocks: int
    """Prefix blocks from the prompt's beginning, without a gap."""
    tokens: int
    """KV-cached tokens that these blocks stand for."""
    soon: int = 0
    """How many of `blocks` are not computed yet, but will be by a request that was sent there before."""


class Holders(Mapping[str, Held]):
    """Who holds how much of a prompt: a mapping from replicas to what they hold, kept by groups.

    Replicas mostly hold one of a few things: nothing, a system prompt, or a conversation. Who goes through the groups
    takes a few steps where one who asks for each replica takes as many as there are.
    """

    __slots__ = ("_all", "groups", "most", "names")

    def __init__(
        self,
        groups: Sequence[tuple[Held | None, tuple[str, ...]]],
        most: Held | None = None,
        names: tuple[str, ...] = (),
    ) -> None:
        """`most` is what all hold that are in no group, and `names` who may be meant; no replica is in two groups. A
        group of those who hold nothing sets them apart from the most."""
        self.groups = groups
        self.most = most
        self.names = names
        self._all: dict[str, Held] | None = None

    def _found(self) -> dict[str, Held]:
        found = self._all
        if found is None:
            found = dict.fromkeys(self.names, self.most) if self.most is not None else {}
            for held, names in self.groups:
                for name in names:
                    if held is not None:
                        found[name] = held
                    else:
                        found.pop(name, None)
            self._all = found
        return found

    def __getitem__(self, replica: str) -> Held:
        return self._found()[replica]

    def __contains__(self, replica: object) -> bool:
        return replica in self._found()

    # What `Mapping` makes of `__getitem__` raises an error for each replica that holds nothing.
    def get(self, replica: str, default: Any = None) -> Any:
        return self._found().get(replica, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self._found())

    def __len__(self) -> int:
        return len(self._found())

    def __repr__(self) -> str:
        return f"Holders({self._found()!r})"

    def at(self, replica: str) -> Held | None:
        """What one replica holds, without going through all."""
        for held, names in self.groups:
            if replica in names:
                return held
        return self.most if self.most is not None and replica in self.names else None

    @classmethod
    def of(cls, held: Mapping[str, Held]) -> Holders:
        """From any mapping."""
        return held if isinstance(held, cls) else cls([(one, (name,)) for name, one in held.items()])


NO_HOLDERS: Final = Holders(())


class PrefixView(msgspec.Struct, frozen=True):
    """A prompt, and who holds how much of it."""

    chain: Chain | None = None
    """None for requests without a prompt that could be hashed."""
    tokens: int = 0
    """Estimated length of the prompt in tokens."""
    held: Mapping[str, Held] = NO_HOLDERS
    """Replicas that hold at least one of its blocks; `Holders` where the index says it."""

    def at(self, replica: str) -> Held | None:
        """What one replica holds."""
        held = self.held
        return held.at(replica) if type(held) is Holders else held.get(replica)


NO_PREFIX: Final = PrefixView()


class Charge(msgspec.Struct, frozen=True, gc=False):
    """What a request is expected to cost its replica."""

    tokens: int = 0
    """Uncached prompt tokens."""
    pairs: float = 0.0
    """Their attention pairs."""
    chain: Chain | None = None
    matched: int = 0
    """Prefix blocks that the router believes to be held there."""


NO_CHARGE: Final = Charge()


class Columns:
    """The terms of a pool's replicas, transposed: a list for each of `Terms`, in the replicas' order. To pass over them
    takes a third of the time of passing over views."""

    __slots__ = ("values", "views")

    def __init__(self, views: tuple[ReplicaView, ...]) -> None:
        self.views = views
        """Those whose terms are in `values` now."""
        self.values: tuple[list[Any], ...] = tuple(
            [list(column) for column in zip(*[v.terms for v in views], strict=True)]
        )

    def put(self, at: int, terms: Terms) -> None:
        """The terms of one replica are others now."""
        for column, term in zip(self.values, terms, strict=True):
            column[at] = term


class Snapshot(msgspec.Struct, frozen=True):
    """The ready replicas of one model's pool at one moment, and the prompt to be routed."""

    model: str
    replicas: tuple[ReplicaView, ...]
    prefix: PrefixView = NO_PREFIX
    now: float = 0.0
    """On the clock of `Outlook.as_of`."""
    places: Mapping[str, int] = {}
    """Where in `replicas` each one is, by name and in their order; worked out of them where it is not given or is of
    other replicas."""
    pool: Columns | Table | None = None
    """Kept up by the pool that made the snapshot, with `places`; of no use where it is of other replicas."""

    def __post_init__(self) -> None:
        if isinstance(self.pool, Columns) and self.pool.views is self.replicas:
            return
        names = [view.replica for view in self.replicas]
        if list(self.places) != names:
            _set(self, "places", {name: place for place, name in enumerate(names)})

    def looked_up(self, prefix: PrefixView) -> Snapshot:
        """The same moment, with what is known of the prompt."""
        found = copy(self)
        _set(found, "prefix", prefix)
        return found

    def columns(self) -> tuple[list[Any], ...]:
        """The terms of all replicas, in the order of `Terms`. Read them at once: a pool has one set of them for all its
        snapshots."""
        pool = self.pool
        if isinstance(pool, Columns) and pool.views is self.replicas:
            return pool.values
        return Columns(self.replicas).values

    def view(self, replica: str) -> ReplicaView:
        """One replica of it. Raises `KeyError` where it is not there."""
        return self.replicas[self.places[replica]]

    def brief(self, replica: str) -> Brief:
        """The same for who asks for little. Raises `KeyError` where it is not there."""
        return self.view(replica)


given: Final[Callable[[Snapshot], Any]] = vars(Snapshot)["replicas"].__get__
"""What a snapshot was made of: its `replicas`, or the rows of which these are yet to be made."""


class Rows(Protocol):
    """A pool's replicas at one moment, of which views are made when somebody asks for them (`router.load`)."""

    def __len__(self) -> int: ...

    @property
    def views(self) -> tuple[ReplicaView, ...]:
        """Made once."""

    @property
    def columns(self) -> tuple[list[Any], ...]:
        """Their terms, transposed; made once."""

    def view(self, place: int) -> ReplicaView:
        """Of one replica; the same object as in `views`."""

    def brief(self, place: int) -> Brief:
        """Of one replica; no view is made for it."""


class Table(Protocol):
    """A pool's replicas, kept up as long as the pool has the same ones (`router.load`)."""

    @property
    def rows(self) -> Rows:
        """As they were when the last snapshot was made."""

    @property
    def numbers(self) -> bytearray | None:
        """Their terms as C doubles, `TERMS` of each replica; None where some would not be exact."""


class PoolSnapshot(Snapshot, frozen=True):
    """A snapshot of rows: to make all views takes longer than most decisions, and most look at a few or none."""

    def __post_init__(self) -> None:
        if type(given(self)) is tuple:  # It was made of another one, with replicas of its own.
            _set(self, "pool", None)
            Snapshot.__post_init__(self)

    @property  # type: ignore[misc]  # msgspec lets a property stand for an attribute.
    def replicas(self) -> tuple[ReplicaView, ...]:
        rows = given(self)
        views: tuple[ReplicaView, ...] = rows if type(rows) is tuple else rows.views
        return views

    def columns(self) -> tuple[list[Any], ...]:
        rows = given(self)
        columns: tuple[list[Any], ...] = Columns(rows).values if type(rows) is tuple else rows.columns
        return columns

    def view(self, replica: str) -> ReplicaView:
        rows, place = given(self), self.places[replica]
        view: ReplicaView = rows[place] if type(rows) is tuple else rows.view(place)
        return view

    def brief(self, replica: str) -> Brief:
        rows, place = given(self), self.places[replica]
        brief: Brief = rows[place] if type(rows) is tuple else rows.brief(place)
        return brief

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Snapshot):
            return NotImplemented
        return _moment(self) == _moment(other)

    __hash__ = None  # type: ignore[assignment]  # As of any snapshot: places are a dict.

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled and copied deeply, it is a snapshot of its views."""
        return Snapshot, (self.model, self.replicas, self.prefix, self.now, dict(self.places))


def _moment(snapshot: Snapshot) -> tuple[object, ...]:
    return snapshot.model, snapshot.replicas, snapshot.prefix, snapshot.now, snapshot.places


class Reason(enum.StrEnum):
    """Why a replica was chosen; a closed set, so that it can be a metric label."""

    ONLY_REPLICA = "only_replica"
    NEXT_IN_TURN = "next_in_turn"
    SHORTEST_QUEUE = "shortest_queue"
    SHORTER_OF_TWO = "shorter_of_two"
    RANDOM = "random"
    LEAST_COST = "least_cost"
    LONGEST_PREFIX = "longest_prefix"
    PREFIX_HASH = "prefix_hash"
    SESSION = "session"
    LORA = "lora"
    BEST_SCORE = "best_score"
    OVERLOADED = "overloaded"
    """Where affinity pointed was too busy."""
    POLICY = "policy"
    """A plugin's reason that is none of these."""
    RETRY = "retry"
    POLICY_FAILED = "policy_failed"
    POLICY_STALLED = "policy_stalled"


class Decision(msgspec.Struct, frozen=True):
    """A policy's answer."""

    replica: str
    reason: Reason
    fallbacks: tuple[str, ...] = ()
    """Replicas to try next where this one fails before the first byte, best first; without any that is ready the policy
    is asked again."""
    score: float = 0.0
    """The policy's own measure of the choice; lower is better."""


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """One replica that a request could have gone to."""

    replica: str
    queue_depth: int = 0
    matched: int = 0
    """Prefix blocks of the prompt that it holds."""
    cached_tokens: int = 0
    """Estimate of what these are in tokens."""
    expected_s: float = 0.0
    """When its first output would be expected, from the submit; 0 where nobody knows."""
    score: float | None = None
    """The policy's own measure, lower is better; None where it names none."""
    asleep: bool = False
    """It has to wake first."""

    def words(self) -> str:
        """For ``x-kvlane-route``."""
        text = f"matched={self.matched} cached={self.cached_tokens} queue={self.queue_depth}"
        if self.expected_s:
            text += f" expected_ms={self.expected_s * 1e3:.1f}"
        if self.score is not None:
            text += f" score={self.score:.6g}"
        if self.asleep:
            text += " asleep=1"
        return f"{self.replica}({text})"


MAX_CANDIDATES_CHARS: Final = 2000
"""In ``x-kvlane-route``: proxies take no header of more than 4 KiB or so."""


class Receipt(msgspec.Struct, frozen=True):
    """Why a request went where it went, for the client."""

    request_id: str
    replica: str
    policy: str
    reason: Reason
    queue_depth: int
    matched: int = 0
    """Prefix blocks of the prompt that the replica was believed to hold."""
    blocks: int = 0
    """All prefix blocks of the prompt; 0 where it was not hashed."""
    cached_tokens: int = 0
    """Estimate of the tokens that `matched` stands for."""
    prompt_tokens: int = 0
    """Estimate of the prompt's length."""
    expected_s: float = 0.0
    """When the first output is expected, from the submit; 0 where nobody knows."""
    score: float = 0.0
    """The policy's own measure of the choice, lower is better; 0 where it names none, and on retries to a fallback."""
    candidates: tuple[Candidate, ...] = ()
    """All replicas that were there, best first; only where somebody asked for them."""
    asleep: bool = False
    """The replica has to wake first."""

    def header(self) -> str:
        """The value of ``x-kvlane-route``."""
        text = f"replica={self.replica};policy={self.policy};reason={self.reason};queue={self.queue_depth}"
        if self.prompt_tokens:
            text += (
                f";matched={self.matched}/{self.blocks};cached={self.cached_tokens}/{self.prompt_tokens}"
                f";score={self.score:.6g}"
            )
        if self.expected_s:
            text += f";expected_ms={self.expected_s * 1e3:.1f}"
        if self.asleep:
            text += ";asleep=1"
        return f"{text};candidates={self._candidates()}" if self.candidates else text

    def _candidates(self) -> str:
        words: list[str] = []
        room = MAX_CANDIDATES_CHARS
        for candidate in self.candidates:
            word = candidate.words()
            room -= len(word) + 1
            if room < 0:
                words.append(f"+{len(self.candidates) - len(words)}")
                break
            words.append(word)
        return ",".join(words)


class Sink(Protocol):
    """Where an ingress takes a stream's output. Called from the lane's read, so it must neither block nor await.

    Raising a `KvlaneError` aborts this stream alone. `started` turns true once the client may have seen a byte;
    from then on the request cannot go to another replica. A sink that has a method `last`, with the arguments of
    `data`, gets an answer's last payload there where its end came along with it: all is well and nothing follows. One
    that has a method `waiting`, with the request as its argument, is told at times that it still waits for a replica;
    what it says to its client then is no part of the answer, and does not make it `started`.
    """

    started: bool

    def routed(self, receipt: Receipt) -> None:
        """A replica was chosen; called once per try, before any output of that try."""

    def head(self, status: int, headers: Headers) -> None:
        """An HTTP response's status and headers, before its first byte. Never called on gRPC streams."""

    def data(self, payload: bytes, tokens: int) -> None:
        """Ready-to-send bytes: a piece of the HTTP body, or one serialized gRPC message."""
