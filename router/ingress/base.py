"""What an ingress needs of the router: somebody who runs requests, and what there is to run them on."""

from __future__ import annotations

from typing import Protocol

import msgspec

from router.lane.frames import End
from router.types import CacheMode, ModelCard, Request, Sink


class Dispatch(Protocol):
    """Runs requests."""

    async def run(self, request: Request, sink: Sink) -> End:
        """Routes `request`, streams its output into `sink`, and returns once it ended whole.

        Raises a `KvlaneError` however else it ends. Cancelling the caller aborts the request in the engine.
        """


class ModelStatus(msgspec.Struct, frozen=True):
    """One model that the router knows."""

    card: ModelCard
    ready_replicas: int
    announced: bool = True
    """False where no replica has been there yet, and only the configuration names the model."""


class CacheStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the router knows of one replica's KV cache."""

    mode: CacheMode
    cause: str = ""
    """Why the mode is not exact."""


class Readiness(msgspec.Struct, frozen=True):
    """Whether the router can serve, and of each required model how many replicas are ready."""

    ready: bool
    models: dict[str, int]
    caches: dict[str, CacheStatus] = {}
    """Of the ready replicas."""
    held: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    """Models without any replica whose requests wait for one, which is as good as ready; in words."""


class Fleet(Protocol):
    """What the replicas offer, all pools together."""

    def models(self) -> tuple[ModelStatus, ...]:
        """All models that a replica has announced, ready now or not, by name."""

    def parent(self, model: str) -> str:
        """The base model where `model` is a LoRA adapter that a replica has announced; else empty."""

    def methods(self, path: str) -> tuple[str, ...]:
        """HTTP methods that some replica's application answers at `path` (no query); empty where none does."""

    def readiness(self) -> Readiness:
        """For readiness probes."""
