"""Ray Serve's request routers without Ray Serve: asked for one choice at a time, and answering at once.

Such a router is written for Ray's event loop, its replicas and its actors. Here it gets replicas whose queue lengths
are known already, a loop that runs each task on the spot, and, where it keeps a prefix tree in an actor, Ray's own tree
in this process. The rule: nothing waits. A router that awaits what is not there yet fails the request at hand, and none
of them may start a Ray cluster. Much of this is Ray API that is not public; see `router.ray_private`. Importing it
imports Ray.
"""

from __future__ import annotations

import sys
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from itertools import count
from operator import attrgetter
from types import ModuleType
from typing import Any, Final, TypeVar
from urllib.parse import quote

import ray
from ray._private import auto_init_hook
from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    RequestMetadata,
    RequestProtocol,
    RunningReplicaInfo,
)
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from router import ray_private
from router.ray_requests import ask_of
from router.types import Load, ReplicaView, Request, Rpc

T = TypeVar("T")

APPLICATION: Final = "kvlane"
"""What Ray's routers take for the Serve application; it labels their metrics and log lines."""
ROUNDS: Final = 4
"""How often a router that names nobody is asked; Ray's own widen their choice in up to three steps."""
UNLIMITED: Final = 1 << 30
"""Requests that a replica takes at once: kvlane's replicas queue what does not fit into the batch."""
_PREFIX_MODULE: Final = "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router"


def load(path: str) -> type[Any]:
    """The request router class at ``module:name`` or ``module.name``.

    Raises `ValueError`, and `ConfigError` for a Ray version that this was not tried with.
    """
    ray_private.check_version()
    module, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, RequestRouter)):
        raise ValueError(f"{path} is no subclass of Ray Serve's RequestRouter")
    return found


class Driver:
    """One Ray request router for the replicas of one pool."""

    def __init__(self, router_class: type[Any], kwargs: Mapping[str, Any], pool: str) -> None:
        """`kwargs` are for `initialize_state`, as in Ray's `RequestRouterConfig.request_router_kwargs`.

        Raises what `initialize_state` raises.
        """
        self._deployment = DeploymentID(_quoted(pool), APPLICATION)
        self._stand_ins: dict[Any, _StandIn] = {}
        self._by_name: dict[str, _StandIn] = {}
        self._ids = count()
        with _no_cluster():
            self._router = _answering(router_class)(
                deployment_id=self._deployment,
                handle_source=DeploymentHandleSource.UNKNOWN,
                use_replica_queue_len_cache=True,
            )
            self._router._replica_queue_len_cache = _QueueLengths(self._stand_ins)
            self._router._lazily_fetched_loop = _OnTheSpot()
            self._router.initialize_state(**_state(router_class, kwargs))

    def choose(self, request: Request, views: Iterable[ReplicaView]) -> list[str]:
        """The replica for `request`, and behind it the others that the router named, best first.

        The router learns of the choice as if the request had been sent. Raises what the router raises.
        """
        with _no_cluster():
            self._update(views)
            pending = self._pending(request)
            chosen, ranks = _at_once(self._decide(pending))
            self._router.on_send_request(chosen.replica_id)
            self._router.on_request_routed(pending, chosen.replica_id, None)
        named = [each.name for rank in ranks for each in sorted(rank, key=_queue)]
        return list(dict.fromkeys([chosen.name, *named]))

    async def _decide(self, pending: Any) -> tuple[_StandIn, list[list[_StandIn]]]:
        """Ray's own procedure: of the first rank in which somebody is free, the one with the shortest queue."""
        router = self._router
        for _ in range(ROUNDS):
            ranks = await router.choose_replicas(
                candidate_replicas=list(router.curr_replicas.values()), pending_request=pending
            )
            for rank in ranks:
                if rank and (chosen := await router._select_from_candidate_replicas(rank, 0)) is not None:
                    return chosen, ranks
        raise RuntimeError(f"{type(router).__name__} chose nobody")

    def _update(self, views: Iterable[ReplicaView]) -> None:
        """Shows the router the replicas as they are now; it is told where some came or went.

        A replica that failed a request is missing while that request is retried, and the router forgets it: Ray's
        routers have no other way to be kept off it.
        """
        now = {view.replica: view for view in views}
        if now.keys() != self._by_name.keys():
            self._by_name = {name: self._by_name.get(name) or self._stand_in(name) for name in now}
            self._stand_ins.clear()
            self._stand_ins.update({each.replica_id: each for each in self._by_name.values()})
            self._router.update_replicas(list(self._by_name.values()))
        for name, view in now.items():
            stand_in = self._by_name[name]
            stand_in.load, stand_in.queue = view.load, view.queue_depth

    def _stand_in(self, name: str) -> _StandIn:
        return _StandIn(ReplicaID(_quoted(name), self._deployment), name)

    def _pending(self, request: Request) -> Any:
        ask = ask_of(request)
        metadata = RequestMetadata(
            request_id=request.request_id,
            internal_request_id=str(next(self._ids)),
            call_method=request.path.rpartition("/")[2],
            route=request.path,
            app_name=APPLICATION,
            session_id=request.session_id,
            is_streaming=True,
            _request_protocol=RequestProtocol.GRPC if request.rpc is Rpc.GRPC else RequestProtocol.HTTP,
        )
        # Its future would be Ray's way to hand over the choice, and belongs to a loop; nobody here waits for it.
        return PendingRequest(args=[] if ask is None else [ask], kwargs={}, metadata=metadata, future=None)


class _StandIn(RunningReplica):  # type: ignore[misc]
    """A replica as Ray's routers know them, without an actor; its queue is that of the snapshot."""

    # What all routers look at: plain attributes, where Ray has properties.
    replica_id: Any = None
    max_ongoing_requests = UNLIMITED

    def __init__(self, replica_id: Any, name: str) -> None:
        self.replica_id = replica_id
        self.name = name
        self.load = Load()
        self.queue = 0
        """Requests running or waiting there, those on their way included."""
        self._multiplexed_model_ids: set[str] = set()

    @cached_property
    def _replica_info(self) -> Any:
        return RunningReplicaInfo(
            replica_id=self.replica_id,
            node_id=None,
            node_ip=None,
            availability_zone=None,
            actor_name=self.name,
            max_ongoing_requests=UNLIMITED,
        )

    @property
    def routing_stats(self) -> dict[str, Any]:
        """The replica's load after its last step, by the names of `router.types.Load`: fresher than Ray's own."""
        return {name: getattr(self.load, name) for name in self.load.__struct_fields__}

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return self.queue


_queue: Final = attrgetter("queue")


def _quoted(name: str) -> str:
    """A part of an identity: Ray writes "#" between such parts, and its metrics take ASCII. Different names stay so."""
    if not name.isascii():
        return quote(name, _KEPT, errors="surrogatepass")
    return name.replace("%", "%25").replace("#", "%23")


_KEPT: Final = "".join(each for each in map(chr, range(128)) if each not in "%#")


class _QueueLengths:
    """In the place of Ray's cache of queue lengths: always what the snapshot says, whatever is noted in between."""

    def __init__(self, stand_ins: Mapping[Any, _StandIn]) -> None:
        self._stand_ins = stand_ins

    def get(self, replica_id: Any) -> int | None:
        found = self._stand_ins.get(replica_id)
        return None if found is None else found.queue

    def update(self, replica_id: Any, queue_len: int) -> None: ...
    def invalidate_key(self, replica_id: Any) -> None: ...
    def remove_inactive_replicas(self, *, active_replica_ids: set[Any]) -> None: ...


def _answering(router_class: type[Any]) -> type[Any]:
    """The class with probes that are answered from the snapshot; Ray's own asks actors and waits."""

    async def probe(router: Any, replicas: list[_StandIn], backoff_index: int) -> list[tuple[_StandIn, int]]:
        return [(replica, replica.queue) for replica in replicas]

    return type(router_class.__name__, (router_class,), {"_probe_queue_lens": probe})


class _OnTheSpot:
    """The event loop that a router sees: a task is done when it is made."""

    def create_task(self, work: Coroutine[Any, Any, Any]) -> None:
        _at_once(work)


def _at_once(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never has to wait. Raises `RuntimeError` for one that does."""
    try:
        work.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    work.close()
    raise RuntimeError("a request router must choose without waiting here, and it awaits something else than queues")


@contextmanager
def _no_cluster() -> Iterator[None]:
    """Ray's API starts a cluster of its own where none is there; here it raises instead."""
    before = auto_init_hook.enable_auto_connect
    auto_init_hook.enable_auto_connect = False
    try:
        yield
    finally:
        auto_init_hook.enable_auto_connect = before


# -- the prefix tree that Ray keeps in an actor


def _state(router_class: type[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What `initialize_state` gets. Ray's prefix-aware router takes the actor of its tree as an argument; it gets the
    tree itself, and forgets old prompts unless told otherwise, since it would grow for ever."""
    base = getattr(sys.modules.get(_PREFIX_MODULE), "PrefixCacheAffinityRouter", None)
    if base is None or not issubclass(router_class, base):
        return dict(kwargs)
    for each in router_class.__mro__:
        if issubclass(each, base):
            _see_here(sys.modules[each.__module__])
    return {"tree_actor": _Actor(_tree()), "do_eviction": True, **kwargs}


def shared_prefix(one: str, other: str) -> int:
    """Characters at the beginning that two texts have in common."""
    same, most = 0, min(len(one), len(other))
    if one[:most] == other[:most]:
        return most
    while same < most:
        middle = (same + most + 1) // 2
        if one[same:middle] == other[same:middle]:
            same = middle
        else:
            most = middle - 1
    return same


def _tree() -> Any:
    """Ray's prefix tree, fit for an event loop: instead of a thread that looks every few seconds, each insertion sees
    to the limit, and texts are compared in C. Ray goes character by character, which takes a millisecond for 4 KB."""
    from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_tree import PrefixTree

    class Tree(PrefixTree):  # type: ignore[misc]
        limit = target = UNLIMITED
        _shared_prefix_count = staticmethod(shared_prefix)

        def start_eviction_loop(self, eviction_threshold: int, eviction_target: int, interval_secs: float) -> bool:
            self.limit, self.target = eviction_threshold, eviction_target
            return True

        def insert(self, text: str, tenant: str, time_s: float) -> None:
            super().insert(text, tenant, time_s)
            size = self.tenant_to_char_count.get(tenant, 0)
            if size > self.limit:
                self.evict_tenant_by_lru(tenant, size - self.target)

    return Tree()


class _Here:
    """The result of a call to something in this process, in the place of a reference to an actor's result."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Method:
    def __init__(self, function: Any) -> None:
        self._function = function

    def remote(self, *args: Any, **kwargs: Any) -> _Here:
        return _Here(self._function(*args, **kwargs))


class _Actor:
    """An object of this process, called as one calls an actor."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> _Method:
        return _Method(getattr(self._target, name))


class _RayOrHere:
    """The module `ray` as a router's module sees it: `get` knows results that are here already."""

    @staticmethod
    def get(reference: Any, **kwargs: Any) -> Any:
        return reference.value if isinstance(reference, _Here) else ray.get(reference, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(ray, name)


def _see_here(module: ModuleType) -> None:
    """Lets the code of that module `ray.get` what is here; for everything else nothing changes."""
    if getattr(module, "ray", None) is ray:
        module.ray = _RayOrHere()  # type: ignore[attr-defined]
