"""The words that all stages share: requests, replicas as a policy sees them, loads, decisions, receipts.

Everything here is a value: nothing in this module holds state or does I/O. What is known of replicas and of prompts has
modules of its own, which import nothing of ours, and is here as well.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, Final, Protocol

import msgspec

from router.prefix_view import NO_CHARGE as NO_CHARGE
from router.prefix_view import NO_HOLDERS as NO_HOLDERS
from router.prefix_view import NO_PREFIX as NO_PREFIX
from router.prefix_view import Chain as Chain
from router.prefix_view import Charge as Charge
from router.prefix_view import Held as Held
from router.prefix_view import Holders as Holders
from router.prefix_view import PrefixView as PrefixView
from router.replica_view import TERMS as TERMS
from router.replica_view import Brief as Brief
from router.replica_view import CacheMode as CacheMode
from router.replica_view import Load as Load
from router.replica_view import Outlook as Outlook
from router.replica_view import ReplicaView as ReplicaView
from router.replica_view import Terms as Terms

_set: Final = msgspec.structs.force_setattr

Headers = Sequence[tuple[str, str]]
"""Header names (lower case) and values, in order; a name may come more than once."""


class Rpc(enum.IntEnum):
    """How a stream's payloads are rendered."""

    HTTP = 0
    GRPC = 1


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
        """Of one replica; it makes a view only where that is needed."""


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
