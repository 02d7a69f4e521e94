"""A Ray Serve deployment's replicas as kvlane's policies see them, and the choice among them.

Job: make a snapshot of what one of Serve's routers knows, ask the policy behind its guard, and remember what was sent
where. Rule: stock replicas report nothing, so all knowledge of their KV caches is approximate and says so. Imports no
Ray; `router.ray_router` owns one for each handle of a deployment.
"""

from __future__ import annotations

import random
import time
from collections import Counter, OrderedDict
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

UNTAKEN_S: Final = 5.0
"""How long a choice counts that no replica confirms: the request was cancelled before it was sent."""
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
    """Requests running or waiting there, of all routers, as last heard; 0 where nothing was heard for long."""
    limit: int
    """Serve's `max_ongoing_requests`."""


class InFlight:
    """This router's requests by replica, from the choice to the end.

    Ray's own count is that of the replica at the last request it took, which leaves out those on their way there. It
    never says that a request was cancelled before it was sent, so one that no replica took in time is forgotten.
    """

    def __init__(self) -> None:
        self._place: dict[str, str] = {}
        self._count: Counter[str] = Counter()
        self._pending: OrderedDict[str, float] = OrderedDict()
        """Those that no replica took yet, with the time of the choice, oldest first."""

    def chosen(self, request_id: str, replica: str, now: float) -> None:
        """A request is to go there; a choice made for it before is void."""
        self.ended(request_id)
        self._place[request_id] = replica
        self._count[replica] += 1
        self._pending[request_id] = now

    def taken(self, request_id: str, replica: str) -> None:
        """That replica took it, be it the chosen one or not. It may have ended already."""
        if request_id in self._place:
            self.ended(request_id)
            self._place[request_id] = replica
            self._count[replica] += 1

    def ended(self, request_id: str) -> None:
        """It is done, or was refused."""
        replica = self._place.pop(request_id, None)
        if replica is not None:
            self._count[replica] -= 1
            self._pending.pop(request_id, None)

    def left(self, replica: str) -> None:
        """The replica is gone."""
        for request_id in [each for each, place in self._place.items() if place == replica]:
            self.ended(request_id)
        del self._count[replica]

    def expire(self, now: float) -> None:
        """Forgets those that nobody took in time."""
        while self._pending and now - next(iter(self._pending.values())) > UNTAKEN_S:
            self.ended(next(iter(self._pending)))

    def count(self, replica: str) -> int:
        return self._count[replica]


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
        self._in_flight = InFlight()
        self._replicas: set[str] = set()
        policy = registry.create(options.policy, options.options, rng, _PLACE)
        fallback = registry.create("least-queue", {}, rng)
        self._guard = Guard(
            policy,
            options.policy,
            fallback,
            observer,
            timer,
            options.stall_ms * 1e-3,
            instead="Ray Serve's power-of-two decides instead",
        )

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
        self._in_flight.left(replica)

    def choose(
        self, seen: Sequence[Seen], args: Iterable[Any], kwargs: Mapping[str, Any], metadata: Any
    ) -> tuple[str, ...]:
        """The replica for a call to the deployment and the policy's fallbacks, best first.

        Empty where the policy could not decide. `seen` must not be empty; `metadata` is Ray's `RequestMetadata`.
        """
        now = self._clock()
        self._prefixes.sweep()
        self._in_flight.expire(now)
        request, has_prompt = request_of(args, kwargs, metadata, default_model=self._model)
        snapshot = self._snapshot(seen, request, has_prompt, now)
        decision = self._guard.choose(request, snapshot)
        if decision.reason in _UNDECIDED:
            return ()
        self._in_flight.chosen(metadata.internal_request_id, decision.replica, now)
        # Replicas without reports have a mirror, which remembers the prompt; there is no hold to be released.
        self._prefixes.hold(decision.replica, snapshot.prefix.chain)
        names = {each.name for each in seen}
        return (decision.replica, *(name for name in decision.fallbacks if name in names))

    def _snapshot(self, seen: Sequence[Seen], request: Request, has_prompt: bool, now: float) -> Snapshot:
        chain = self._prefixes.chain(request) if has_prompt else None
        views = tuple([self._view(each) for each in seen])
        return Snapshot(request.model, views, self._prefixes.view(request.model, chain), now)

    def _view(self, seen: Seen) -> ReplicaView:
        own = self._in_flight.count(seen.name)
        return ReplicaView(
            seen.name,
            Load(running=max(seen.queue, own)),
            unacked=0,
            leases=own,
            max_num_seqs=seen.limit,
            kv_tokens=self._kv_tokens,
            cache=self._prefixes.mode(seen.name),
        )

    def routed(self, replica: str, args: Iterable[Any], kwargs: Mapping[str, Any], metadata: Any) -> None:
        """The replica took that call; it may be another one than was chosen."""
        self._in_flight.taken(metadata.internal_request_id, replica)
        request, has_prompt = request_of(args, kwargs, metadata, default_model=self._model)
        if has_prompt:
            self._prefixes.hold(replica, self._prefixes.chain(request))

    def ended(self, request_id: str) -> None:
        """That call, by its internal id, is done."""
        self._in_flight.ended(request_id)
