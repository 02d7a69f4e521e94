"""For authors of policies: requests and snapshots to test with, and `check_policy` for what every policy owes.

Needs no test framework; what does not hold raises `AssertionError` in a plain sentence.
"""

from __future__ import annotations

import copy
import inspect
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any

import msgspec

from router.policies.base import Policy
from router.types import Decision, Load, Reason, ReplicaView, Request, Rpc, Snapshot

SIZES = (1, 2, 64)
"""Numbers of replicas that a policy must cope with."""
CALLS_PER_REPLICA = 50
"""Python and C calls that one `choose` may make for each replica, with `CALLS_AT_LEAST` on top."""
CALLS_AT_LEAST = 500

_DRAWS = 16
_MODEL = "model"


def make_request(
    prompt: str = "Hello", *, model: str = _MODEL, request_id: str = "request-0", session_id: str = "", **fields: Any
) -> Request:
    """A streamed chat request for that prompt; `fields` are further fields of `Request`."""
    messages = [{"role": "user", "content": prompt}]
    body = msgspec.json.encode({"model": model, "messages": messages, "stream": True})
    given = {"rpc": Rpc.HTTP, "path": "/v1/chat/completions", "body": body, "session_id": session_id, **fields}
    return Request(request_id=request_id, model=model, **given)


def make_replica(name: str, queue_depth: int = 0, *, max_num_seqs: int = 32, **load: Any) -> ReplicaView:
    """A replica with that many requests, running as far as its batch goes and waiting beyond; `load` as in `Load`."""
    running = min(queue_depth, max_num_seqs)
    given = {"running": running, "waiting": queue_depth - running, **load}
    return ReplicaView(name, Load(**given), unacked=0, leases=0, max_num_seqs=max_num_seqs)


def make_snapshot(
    queue_depths: Iterable[int] = (0, 0), *, model: str = _MODEL, names: Sequence[str] | None = None
) -> Snapshot:
    """A snapshot of one replica for each queue depth, named ``replica-0`` and on where no `names` are given."""
    depths = list(queue_depths)
    names = [f"replica-{index}" for index in range(len(depths))] if names is None else names
    replicas = (make_replica(name, depth) for name, depth in zip(names, depths, strict=True))
    return Snapshot(model, tuple(replicas))


def check_policy(
    policy_class: Callable[..., Policy], options: Mapping[str, Any] | None = None, *, seeds: Iterable[int] = range(3)
) -> None:
    """Raises `AssertionError` where the policy breaks a promise that every policy makes.

    It chooses among the snapshot's replicas, whatever their number and load and while they come and go; it changes
    nothing that it is shown; its chance comes from its random source alone; it needs no more than a bounded number of
    calls. On an idle pool it neither sends all prompts to one replica nor picks by position, unless the class says
    ``affinity = True``: a policy that may have a reason to keep requests together.
    """
    subject = _Subject(policy_class, dict(options or {}))
    for seed in seeds:
        _copes_with_every_size(subject, seed)
        _survives_coming_and_going(subject, seed)
        _is_deterministic(subject, seed)
        if not getattr(policy_class, "affinity", False):
            _spreads_unique_prompts(subject, seed)
    if not getattr(policy_class, "affinity", False):
        _has_no_favourite_position(subject)
    _stays_within_the_call_budget(subject)


class _Subject:
    """The policy under test and the checks that hold at each of its decisions."""

    def __init__(self, policy_class: Callable[..., Policy], options: dict[str, Any]) -> None:
        self.name: str = getattr(policy_class, "__name__", repr(policy_class))
        self._class = policy_class
        kind = getattr(policy_class, "Options", None)
        if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
            raise AssertionError(f"{self.name} has no class attribute Options that is a msgspec.Struct")
        choose = getattr(policy_class, "choose", None)
        if not callable(choose):
            raise AssertionError(f"{self.name} has no method choose")
        if inspect.iscoroutinefunction(choose) or inspect.isasyncgenfunction(choose):
            raise AssertionError(f"{self.name}.choose is async; it must be a plain function")
        try:
            self._options = msgspec.convert(options, kind)
        except msgspec.ValidationError as error:
            raise AssertionError(f"{self.name} does not take the options {options}: {error}") from error

    def create(self, seed: int) -> Policy:
        return self._class(self._options, random.Random(seed))

    def choose(self, policy: Policy, request: Request, snapshot: Snapshot) -> Decision:
        before = copy.deepcopy((request, snapshot))
        try:
            decision = policy.choose(request, snapshot)
        except Exception as error:
            raise AssertionError(f"{self.name}.choose raised {error!r} for {_told(snapshot)}") from error
        self._must(isinstance(decision, Decision), f"returned {decision!r}, which is no Decision")
        self._must((request, snapshot) == before, "changed the request or the snapshot")
        names = {view.replica for view in snapshot.replicas}
        self._must(decision.replica in names, f"chose {decision.replica!r}, which is not in {_told(snapshot)}")
        for fallback in decision.fallbacks:
            self._must(fallback in names, f"named the fallback {fallback!r}, which is not in {_told(snapshot)}")
        self._must(decision.replica not in decision.fallbacks, f"chose {decision.replica!r} as its own fallback")
        self._must(len(set(decision.fallbacks)) == len(decision.fallbacks), "named one fallback twice")
        self._must(isinstance(decision.reason, Reason), f"gave {decision.reason!r}, which is no Reason")
        return decision

    def _must(self, holds: bool, fault: str) -> None:
        if not holds:
            raise AssertionError(f"{self.name}.choose {fault}")


def _copes_with_every_size(subject: _Subject, seed: int) -> None:
    chance = random.Random(seed)
    for size in SIZES:
        policy = subject.create(seed)
        for depths in ([0] * size, [chance.randrange(50) for _ in range(size)], [1000] * size):
            for request in _unique_requests(4):
                subject.choose(policy, request, make_snapshot(depths))


def _survives_coming_and_going(subject: _Subject, seed: int) -> None:
    """One policy, two models, and at each call other replicas than before, in another order."""
    policy = subject.create(seed)
    for request, snapshot in _changing_world(seed):
        subject.choose(policy, request, snapshot)


def _is_deterministic(subject: _Subject, seed: int) -> None:
    first, second = (
        [subject.choose(policy, request, snapshot) for request, snapshot in _changing_world(seed)]
        for policy in (subject.create(seed), subject.create(seed))
    )
    if first != second:
        raise AssertionError(f"{subject.name} decides differently under one seed: is all its chance from `random`?")


def _spreads_unique_prompts(subject: _Subject, seed: int) -> None:
    policy = subject.create(seed)
    snapshot = make_snapshot([0] * 4)
    chosen = {subject.choose(policy, request, snapshot).replica for request in _unique_requests(_DRAWS)}
    if len(chosen) == 1:
        raise AssertionError(f"{subject.name} sends {_DRAWS} unique prompts to one replica of four idle ones")


def _has_no_favourite_position(subject: _Subject) -> None:
    snapshot = make_snapshot([0] * 4)
    chosen = {subject.choose(subject.create(seed), make_request(), snapshot).replica for seed in range(_DRAWS)}
    if len(chosen) == 1:
        raise AssertionError(f"{subject.name} starts at {chosen.pop()!r} under every seed: ties go by position")


def _stays_within_the_call_budget(subject: _Subject) -> None:
    size = max(SIZES)
    policy = subject.create(0)
    budget = CALLS_AT_LEAST + CALLS_PER_REPLICA * size
    request, snapshot = make_request(), make_snapshot(range(size))
    calls = _count_calls(lambda: policy.choose(request, snapshot))
    if calls > budget:
        raise AssertionError(f"{subject.name}.choose makes {calls} calls for {size} replicas; {budget} are too many")


def _count_calls(work: Callable[[], object]) -> int:
    """Calls that `work` makes, Python's and C's; a measure that does not depend on the machine."""
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls


def _unique_requests(count: int) -> list[Request]:
    return [
        make_request(f"Question {index}", request_id=f"request-{index}", session_id=f"session-{index}")
        for index in range(count)
    ]


def _changing_world(seed: int) -> list[tuple[Request, Snapshot]]:
    chance = random.Random(seed)
    world = []
    for index in range(100):
        names = chance.sample([f"replica-{each}" for each in range(8)], chance.randrange(1, 9))
        model = chance.choice(["model-a", "model-b"])
        session = f"session-{chance.randrange(5)}"
        request = make_request(f"Question {index}", model=model, request_id=f"request-{index}", session_id=session)
        depths = [chance.randrange(5) for _ in names]
        world.append((request, make_snapshot(depths, model=model, names=names)))
    return world


def _told(snapshot: Snapshot) -> str:
    names = [view.replica for view in snapshot.replicas]
    return f"the snapshot of {len(names)} replicas: {', '.join(names[:8])}{' …' if len(names) > 8 else ''}"
