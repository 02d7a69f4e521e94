"""The words that all stages share: requests, replicas as a policy sees them, loads, decisions, receipts.

Imports nothing of ours. Everything here is a value: nothing in this module holds state or does I/O.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Protocol

import msgspec

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


class ReplicaView(msgspec.Struct, frozen=True, gc=False):
    """One ready replica as a policy sees it."""

    replica: str
    load: Load
    unacked: int
    """Requests that this router sent and that ``load`` does not count yet."""
    leases: int
    """This router's own requests in flight there."""
    max_num_seqs: int = 0

    @property
    def queue_depth(self) -> int:
        """Requests running or waiting there, those on their way included."""
        return self.load.running + self.load.waiting + self.unacked


class Snapshot(msgspec.Struct, frozen=True):
    """The ready replicas of one model's pool at one moment."""

    model: str
    replicas: tuple[ReplicaView, ...]


class Reason(enum.StrEnum):
    """Why a replica was chosen; a closed set, so that it can be a metric label."""

    ONLY_REPLICA = "only_replica"
    NEXT_IN_TURN = "next_in_turn"
    SHORTEST_QUEUE = "shortest_queue"
    SHORTER_OF_TWO = "shorter_of_two"
    RANDOM = "random"
    POLICY = "policy"
    """A plugin's reason that is none of these."""
    RETRY = "retry"
    POLICY_FAILED = "policy_failed"


class Decision(msgspec.Struct, frozen=True):
    """A policy's answer."""

    replica: str
    reason: Reason
    fallbacks: tuple[str, ...] = ()
    """Replicas to try next where this one fails before the first byte, best first; without any that is ready the policy
    is asked again."""
    score: float = 0.0
    """The policy's own measure of the choice; lower is better."""


class Receipt(msgspec.Struct, frozen=True):
    """Why a request went where it went, for the client."""

    request_id: str
    replica: str
    policy: str
    reason: Reason
    queue_depth: int

    def header(self) -> str:
        """The value of ``x-kvlane-route``."""
        return f"replica={self.replica};policy={self.policy};reason={self.reason};queue={self.queue_depth}"


class Sink(Protocol):
    """Where an ingress takes a stream's output. Called from the lane's read, so it must neither block nor await.

    Raising a `KvlaneError` aborts this stream alone. `started` turns true once the client may have seen a byte;
    from then on the request cannot go to another replica.
    """

    started: bool

    def routed(self, receipt: Receipt) -> None:
        """A replica was chosen; called once per try, before any output of that try."""

    def head(self, status: int, headers: Headers) -> None:
        """An HTTP response's status and headers, before its first byte. Never called on gRPC streams."""

    def data(self, payload: bytes, tokens: int) -> None:
        """Ready-to-send bytes: a piece of the HTTP body, or one serialized gRPC message."""
