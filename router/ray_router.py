"""Any kvlane policy as a request router of Ray Serve.

::

    RequestRouterConfig(
        request_router_class="router.ray_router:KvlaneRequestRouter",
        request_router_kwargs={"policy": "least-queue"},
    )

Serve takes this module by value to every process that has a handle of the deployment, so it holds no more than what
Serve calls; everything else is in `router.ray_pool`, which those processes import.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import LocalityMixin, MultiplexMixin, PendingRequest, RequestRouter, RunningReplica
from ray.util import metrics

from router import ray_private
from router.ray_pool import Pool, Seen, read_options

log = logging.getLogger(__name__)


def request_router_config(**kwargs: Any) -> RequestRouterConfig:
    """A deployment's configuration for a kvlane policy, checked here: Serve itself finds mistakes in the keyword
    arguments when the first handle is made, in that process's log. They are the fields of
    `router.ray_pool.RouterOptions`. Raises `ConfigError`."""
    ray_private.check_version()
    read_options(kwargs)
    return RequestRouterConfig(
        request_router_class="router.ray_router.KvlaneRequestRouter", request_router_kwargs=kwargs
    )


class Counts:
    """What the policy's guard reports (`router.policies.guard.GuardObserver`), as metrics of Ray."""

    def __init__(self, application: str, deployment: str) -> None:
        tags = {"application": application, "deployment": deployment}
        self._seconds = metrics.Histogram(
            "kvlane_policy_seconds",
            description="Time that a policy took to decide.",
            boundaries=[1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2],
            tag_keys=(*tags, "policy"),
        ).set_default_tags(tags)
        self._failures = metrics.Counter(
            "kvlane_policy_failures",
            description="Decisions that were left to Ray Serve's own router.",
            tag_keys=(*tags, "policy", "kind"),
        ).set_default_tags(tags)

    def policy_took(self, policy: str, seconds: float) -> None:
        self._seconds.observe(seconds, {"policy": policy})

    def policy_failed(self, policy: str, kind: str) -> None:
        self._failures.inc(tags={"policy": policy, "kind": str(kind)})


class KvlaneRequestRouter(LocalityMixin, MultiplexMixin, RequestRouter):  # type: ignore[misc]
    """Lets a kvlane policy choose; where it cannot, Ray's power-of-two does."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Called by Serve with the `request_router_kwargs`. Raises `ConfigError`."""
        ray_private.check_version()
        deployment = self._deployment_id
        options = read_options(kwargs)
        self._pool = Pool(deployment.name, options, Counts(deployment.app_name, deployment.name))
        self._probe: asyncio.Task[Any] | None = None

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The policy's replica alone, then its fallbacks one by one, then all: Ray takes the first that is not full."""
        if pending_request is not None and candidate_replicas:
            try:
                ranks = self._ranks(candidate_replicas, pending_request)
            except Exception:  # Serve would never answer the request
                log.exception("kvlane could not choose a replica; Ray Serve's own router does")
                ranks = []
            if ranks:
                # Without it Ray would ask again without any pause while all replicas are full.
                pending_request.routing_context.should_backoff = True
                return ranks
        own: list[list[RunningReplica]] = await ray_private.power_of_two().choose_replicas(
            self, candidate_replicas, pending_request
        )
        return own

    def _ranks(self, candidates: list[RunningReplica], pending: PendingRequest) -> list[list[RunningReplica]]:
        self._look(candidates)
        free = self.select_available_replicas(candidates) or candidates
        by_name = {each.replica_id.unique_id: each for each in free}
        seen = [
            Seen(name, self.replica_queue_len_cache.get(each.replica_id) or 0, each.max_ongoing_requests)
            for name, each in by_name.items()
        ]
        chosen = self._pool.choose(seen, pending.args, pending.kwargs, pending.metadata)
        return [*([by_name[name]] for name in chosen), list(candidates)] if chosen else []

    def _look(self, candidates: list[RunningReplica]) -> None:
        """Asks those for their queues, in the background, of which nothing was heard for long."""
        silent = [each for each in candidates if self.replica_queue_len_cache.get(each.replica_id) is None]
        if silent and (self._probe is None or self._probe.done()):
            self._probe = self._event_loop.create_task(self._probe_queue_lens(silent, 0))

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._pool.listed(each.replica_id.unique_id for each in replicas)

    def on_replica_actor_died(self, replica_id: Any) -> None:
        super().on_replica_actor_died(replica_id)
        self._pool.left(replica_id.unique_id)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: Any, result: Any) -> None:
        self._pool.routed(replica_id.unique_id, pending_request.args, pending_request.kwargs, pending_request.metadata)

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        self._pool.ended(internal_request_id)
