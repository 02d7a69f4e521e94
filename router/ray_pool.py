"""A Ray Serve deployment's replicas as kvlane's policies see them, and the choice among them.

Job: make a snapshot of what one of Serve's routers knows, ask the policy behind its guard, and remember what was sent
where. Rule: stock replicas report nothing, so all knowledge of their KV caches is approximate and says so. Imports no
Ray; `router.ray_router` owns one for each handle of a deployment.
"""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Final

import msgspec

from router.errors import ConfigError
from router.fields import problems
from router.options import PrefixOptions
from router.policies import registry
from router.policies.guard import Guard, GuardObserver
from router.prefix.prefixes import Prefixes
from router.ray_requests import request_of
from router.types import EngineInfo, Load, ModelCard, Reason, ReplicaView, Request, Snapshot

UNSENT_S: Final = 5.0
"""How long a choice counts that Ray does not act on: the request was cancelled before it was sent."""
_UNDECIDED: Final = frozenset({Reason.POLICY_FAILED, Reason.POLICY_STALLED})


class RouterOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What ``request_router_kwargs`` may hold."""

    policy: str = "prefix-affinity"
    """A kvlane policy. The default needs nothing that stock replicas do not tell."""
    options: dict[str, Any] = {}
    """The policy's options."""
    stall_ms: Annotated[float, msgspec.Meta(gt=0)] = 5.0
    """Longest time that the policy may take, in milliseconds, as `[policy] stall_ms`."""
    kv_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Size of a replica's KV cache in tokens; 0 is unknown and taken for that of a small GPU."""
    prefix: PrefixOptions = PrefixOptions()


def read_options(kwargs: Mapping[str, Any]) -> RouterOptions:
    """Raises `ConfigError` for options that are unknown or out of range, and for policies that cannot be made."""
    plain = dict(kwargs)
    if lines := list(problems(plain, RouterOptions, ("request_router_kwargs",))):
        raise ConfigError("\n".join(lines))
    options = msgspec.convert(plain, RouterOptions)
    registry.create(options.policy, options.options, random.Random(), _PLACE)
    return options


_PLACE: Final = registry.Place("request_router_kwargs.policy", ("request_router_kwargs", "options"))


class Seen(msgspec.Struct, frozen=True):
    """One replica as Serve's router knows it."""

    name: str
    queue: int
    """Requests running or waiting there, of all routers, as last heard; this router's own are counted as they go."""
    limit: int
    """Serve's `max_ongoing_requests`."""


class Unsent:
    """Requests whose replica is chosen and that Ray's router has not sent yet, so that no queue counts them.

    Ray says that it sent something to a replica, but not what; so the oldest one counts as sent.
    """

    def __init__(self) -> None:
        self._by_replica: dict[str, OrderedDict[str, float]] = {}
        """Ids with the time of the choice, oldest first."""
        self._place: dict[str, str] = {}

    def chosen(self, request_id: str, replica: str, now: float) -> None:
        """A request is to go there; a choice made for it before is void."""
        self.drop(request_id)
        self._place[request_id] = replica
        self._by_replica.setdefault(replica, OrderedDict())[request_id] = now

    def sent(self, replica: str) -> None:
        """Something was sent there."""
        if waiting := self._by_replica.get(replica):
            self._drop_oldest(waiting)

    def drop(self, request_id: str) -> None:
        """The request counts no longer, wherever it was to go."""
        replica = self._place.pop(request_id, None)
        if replica is not None:
            del self._by_replica[replica][request_id]

    def left(self, replica: str) -> None:
        """The replica is gone."""
        for request_id in self._by_replica.pop(replica, ()):
            del self._place[request_id]

    def count(self, replica: str, now: float) -> int:
        """Requests on their way there."""
        waiting = self._by_replica.get(replica)
        if not waiting:
            return 0
        while waiting and now - next(iter(waiting.values())) > UNSENT_S:
            self._drop_oldest(waiting)
        return len(waiting)

    def _drop_oldest(self, waiting: OrderedDict[str, float]) -> None:
        request_id, _ = waiting.popitem(last=False)
        del self._place[request_id]


class Pool:
    """The replicas of one deployment."""

    def __init__(
        self,
        deployment: str,
        options: RouterOptions,
        observer: GuardObserver,
        *,
        clock: Callable[[], float] = time.monotonic,
        timer: Callable[[], float] = time.perf_counter,
        rng: random.Random | None = None,
    ) -> None:
        """`deployment` stands for the model where a request names none; `timer` measures the policy. Raises
        `ConfigError`."""
        rng = rng or random.Random()
        self._model = deployment
        self._info = EngineInfo("ray", (ModelCard(deployment),), kv_blocks=options.kv_tokens, kv_block_tokens=1)
        self._kv_tokens = options.kv_tokens
        self._clock = clock
        self._prefixes = Prefixes(options.prefix, clock)
        self._unsent = Unsent()
        self._replicas: set[str] = set()
        policy = registry.create(options.policy, options.options, rng, _PLACE)
        fallback = registry.create("least-queue", {}, rng)
        self._guard = Guard(policy, options.policy, fallback, observer, timer, options.stall_ms * 1e-3)

    def listed(self, replicas: Iterable[str]) -> None:
        """Takes all replicas that there are now."""
        now = set(replicas)
        for replica in self._replicas - now:
            self.left(replica)
        for replica in now - self._replicas:
            self._prefixes.opened(replica, self._info)
        self._replicas = now

    def left(self, replica: str) -> None:
        """A replica is gone."""
        self._replicas.discard(replica)
        self._prefixes.lost(replica)
        self._unsent.left(replica)

    def choose(
        self, seen: Sequence[Seen], args: Iterable[Any], kwargs: Mapping[str, Any], metadata: Any
    ) -> tuple[str, ...]:
        """The replica for a call to the deployment and the policy's fallbacks, best first.

        Empty where the policy could not decide. `seen` must not be empty; `metadata` is Ray's `RequestMetadata`.
        """
        now = self._clock()
        self._prefixes.sweep()
        request, has_prompt = request_of(args, kwargs, metadata, default_model=self._model)
        snapshot = self._snapshot(seen, request, has_prompt, now)
        decision = self._guard.choose(request, snapshot)
        if decision.reason in _UNDECIDED:
            return ()
        self._unsent.chosen(metadata.internal_request_id, decision.replica, now)
        # Replicas without reports have a mirror, which remembers the prompt; there is no hold to be released.
        self._prefixes.hold(decision.replica, snapshot.prefix.chain)
        names = {each.name for each in seen}
        return (decision.replica, *(name for name in decision.fallbacks if name in names))

    def _snapshot(self, seen: Sequence[Seen], request: Request, has_prompt: bool, now: float) -> Snapshot:
        chain = self._prefixes.chain(request) if has_prompt else None
        views = tuple([self._view(each, now) for each in seen])
        return Snapshot(request.model, views, self._prefixes.view(request.model, chain), now)

    def _view(self, seen: Seen, now: float) -> ReplicaView:
        unsent = self._unsent.count(seen.name, now)
        return ReplicaView(
            seen.name,
            Load(running=seen.queue),
            unacked=unsent,
            leases=unsent,
            max_num_seqs=seen.limit,
            kv_tokens=self._kv_tokens,
            cache=self._prefixes.mode(seen.name),
        )

    def sent(self, replica: str) -> None:
        """Ray's router sent a request there, and counts it from now on."""
        self._unsent.sent(replica)

    def routed(self, replica: str, args: Iterable[Any], kwargs: Mapping[str, Any], metadata: Any) -> None:
        """The replica took that call; it may be another one than was chosen."""
        self._unsent.drop(metadata.internal_request_id)
        request, has_prompt = request_of(args, kwargs, metadata, default_model=self._model)
        if has_prompt:
            self._prefixes.hold(replica, self._prefixes.chain(request))
