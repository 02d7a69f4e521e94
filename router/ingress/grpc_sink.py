"""Sinks of the gRPC ingress: what takes a stream's output, and the one answer of a unary call.

Rule: a sink checks its bound before it takes a payload, so that a single large message always passes. How messages get
to the client is the edge's: see `grpc_aio.AioSink` and `h2_call.H2Sink`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from kvlane.v1 import inference_pb2 as pb

from router.errors import ClientTooSlow, InternalError, ReplicaFailed
from router.types import Headers, Receipt


def route_message(receipt: Receipt) -> bytes:
    """A serialized response that holds only `route`; it is field 1 of all three responses."""
    route = pb.Route(
        replica=receipt.replica,
        policy=receipt.policy,
        reason=receipt.reason,
        queue_depth=max(receipt.queue_depth, 0),
        request_id=receipt.request_id,
        matched_blocks=receipt.matched,
        prompt_blocks=receipt.blocks,
        cached_tokens=max(receipt.cached_tokens, 0),
        prompt_tokens=receipt.prompt_tokens,
        expected_s=receipt.expected_s,
        score=receipt.score,
        candidates=[
            pb.RouteCandidate(
                replica=one.replica,
                queue_depth=one.queue_depth,
                matched_blocks=one.matched,
                cached_tokens=one.cached_tokens,
                expected_s=one.expected_s,
                score=one.score,
                asleep=one.asleep,
            )
            for one in receipt.candidates
        ],
        asleep=receipt.asleep,
    )
    return pb.GenerateResponse(route=route).SerializeToString()


def check_room(unread_bytes: int, buffer_bytes: int) -> None:
    """Raises `ClientTooSlow` where a client has left more unread than is kept for it."""
    if unread_bytes > buffer_bytes:
        raise ClientTooSlow(f"the client left more than {buffer_bytes} bytes of its stream unread")


class Unread(Protocol):
    """Output on its way to a client."""

    @property
    def unread_bytes(self) -> int:
        """What the client has not taken yet."""

    async def flushed(self, limit_s: float) -> bool:
        """Whether the client has taken everything; waits for that up to `limit_s`."""


async def taken(output: Unread, limit_s: float, failure: Exception | None = None) -> None:
    """Waits until the client has taken all of an ended output.

    Raises `failure`, by default `ClientTooSlow`, where it takes nothing for `limit_s` seconds.
    """
    before = output.unread_bytes
    while not await output.flushed(limit_s):
        if output.unread_bytes == before:
            raise failure or ClientTooSlow(f"the client left {before} bytes unread for {limit_s:g} s")
        before = output.unread_bytes


class StreamSink(ABC):
    """A stream's way to its client. Payloads are serialized messages, sent as they came and in order.

    Nothing is sent before the first data, initial metadata neither: a call that fails before it is answered by a status
    alone, which clients' own retry rules may retry. Only a stream that waits long for a replica is begun before, where
    its edge's sink has a method `waiting`.
    """

    __slots__ = ("_receipt", "started")

    def __init__(self) -> None:
        self.started = False
        self._receipt: Receipt | None = None

    def routed(self, receipt: Receipt) -> None:
        """Keeps the receipt until the first data: a try that fails before it is replaced by the next one's."""
        self._receipt = receipt

    def head(self, status: int, headers: Headers) -> None:
        """Never called on gRPC streams."""
        raise InternalError("a gRPC stream has no HTTP head")

    @abstractmethod
    def data(self, payload: bytes, tokens: int) -> None:
        """Takes one serialized message. Raises `ClientTooSlow` where too much is unread already."""

    @abstractmethod
    def complete(self) -> None:
        """The stream ended whole. One without any output still has its route to tell."""

    @abstractmethod
    def stop(self) -> None:
        """Nothing more will come; what came is the client's."""

    @property
    @abstractmethod
    def unread_bytes(self) -> int:
        """What the client has not taken yet."""

    @abstractmethod
    async def flushed(self, limit_s: float) -> bool:
        """After `complete` or `stop`: whether the client has taken everything; waits for that up to `limit_s`."""

    @abstractmethod
    async def close(self) -> None:
        """Throws away what waits, but for the rest of a message that is out in part."""


class UnarySink:
    """The one answer of a unary call. Nothing reaches the client before the end, so any failed try can be replaced."""

    def __init__(self) -> None:
        self.started = False
        self._receipt: Receipt | None = None
        self._payload: bytes | None = None

    def routed(self, receipt: Receipt) -> None:
        """A new try: what an earlier one left is forgotten."""
        self._receipt = receipt
        self._payload = None

    def head(self, status: int, headers: Headers) -> None:
        """Never called on gRPC streams."""
        raise InternalError("a gRPC stream has no HTTP head")

    def data(self, payload: bytes, tokens: int) -> None:
        """Takes the answer. Raises `ReplicaFailed` on a second one."""
        if self._payload is not None:
            raise ReplicaFailed("the replica answered a unary call with more than one message")
        self._payload = payload

    def answer(self) -> bytes:
        """The serialized response with the route in it. Raises `ReplicaFailed` where the replica sent none."""
        if self._payload is None:
            raise ReplicaFailed("the replica ended a unary call without an answer")
        # Serialized messages put one after the other are their merge: the route joins without a parse.
        return (route_message(self._receipt) if self._receipt is not None else b"") + self._payload
