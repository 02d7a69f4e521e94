"""For authors of policies and scorers: requests and snapshots to test with, and what every one of them owes.

`check_policy` and `check_scorer` need no test framework; what does not hold raises `AssertionError` in a plain
sentence.
"""

from __future__ import annotations

import inspect
import math
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from types import FrameType
from typing import Any

import msgspec

from router.policies.base import Policy
from router.types import (
    NO_PREFIX,
    CacheMode,
    Chain,
    Decision,
    Held,
    Load,
    Outlook,
    PrefixView,
    Reason,
    ReplicaView,
    Request,
    Rpc,
    Snapshot,
)

SIZES = (1, 2, 64)
"""Numbers of replicas that a policy must cope with."""
CALLS_PER_REPLICA = 50
"""Python and C calls that one `choose` or `score` may make for each replica, with `CALLS_AT_LEAST` on top."""
CALLS_AT_LEAST = 500
BLOCK_BYTES = 256
"""Size of a prefix block here."""
BYTES_PER_TOKEN = 4
"""Of prompts here."""

_DRAWS = 16
_MODEL = "model"
_frozen = msgspec.msgpack.Encoder(enc_hook=dict).encode
"""For comparing what was with what is; a deep copy takes thirty times as long."""


def make_request(
    prompt: str = "Hello", *, model: str = _MODEL, request_id: str = "request-0", session_id: str = "", **fields: Any
) -> Request:
    """A streamed chat request for that prompt; `fields` are further fields of `Request`."""
    messages = [{"role": "user", "content": prompt}]
    body = msgspec.json.encode({"model": model, "messages": messages, "stream": True})
    given = {"rpc": Rpc.HTTP, "path": "/v1/chat/completions", "body": body, "session_id": session_id, **fields}
    return Request(request_id=request_id, model=model, **given)


def make_replica(name: str, queue_depth: int = 0, *, max_num_seqs: int = 32, **fields: Any) -> ReplicaView:
    """A replica with that many requests, running as far as its batch goes and waiting beyond; it reports its cache.

    `fields` are further fields of its `Load` or of the `ReplicaView` itself.
    """
    running = min(queue_depth, max_num_seqs)
    load: dict[str, Any] = {"running": running, "waiting": queue_depth - running}
    load |= {field: fields.pop(field) for field in Load.__struct_fields__ if field in fields}
    given = {"unacked": 0, "leases": 0, "cache": CacheMode.EXACT, **fields}
    return ReplicaView(name, Load(**load), max_num_seqs=max_num_seqs, **given)


def make_snapshot(
    queue_depths: Iterable[int] = (0, 0),
    *,
    model: str = _MODEL,
    names: Sequence[str] | None = None,
    held: Mapping[str, int] | None = None,
    prompt: str = "Hello",
    prompt_tokens: int = 0,
) -> Snapshot:
    """A snapshot of one replica for each queue depth, named ``replica-0`` and on where no `names` are given.

    With `held` (prefix blocks by replica) or `prompt_tokens` it has a prompt, as `make_prefix` makes it.
    """
    depths = list(queue_depths)
    names = [f"replica-{index}" for index in range(len(depths))] if names is None else names
    replicas = (make_replica(name, depth) for name, depth in zip(names, depths, strict=True))
    has_prompt = held is not None or prompt_tokens > 0
    prefix = make_prefix(held or {}, prompt=prompt, prompt_tokens=prompt_tokens or 1024) if has_prompt else NO_PREFIX
    return Snapshot(model, tuple(replicas), prefix)


def make_prefix(held: Mapping[str, int], *, prompt: str = "Hello", prompt_tokens: int = 1024) -> PrefixView:
    """A prompt of that length that repeats `prompt`, and the replicas that hold so many of its blocks, computed.

    A block is 256 bytes, which are 64 tokens. Raises `ValueError` where somebody holds more than there is.
    """
    size = prompt_tokens * BYTES_PER_TOKEN
    chain = FakePrefixes().chain((prompt * (size // max(len(prompt), 1) + 1))[:size])
    for replica, blocks in held.items():
        if not 0 < blocks <= len(chain.blocks):
            raise ValueError(f"{replica} cannot hold {blocks} blocks of a prompt that has {len(chain.blocks)}")
    return PrefixView(chain, prompt_tokens, {name: _held(blocks) for name, blocks in held.items()})


class FakePrefixes:
    """Who holds what, without bound, eviction or reports: for sending many requests through a policy."""

    def __init__(self) -> None:
        self._held: dict[str, set[int]] = {}

    def chain(self, prompt: str) -> Chain:
        """The prompt's chain; that of a prompt continued begins with it."""
        data = prompt.encode()
        hashes, last = [], b""
        for end in range(BLOCK_BYTES, len(data) + 1, BLOCK_BYTES):
            last = blake2b(last + data[end - BLOCK_BYTES : end], digest_size=8).digest()
            hashes.append(int.from_bytes(last))
        return Chain(BLOCK_BYTES, 0, tuple(hashes), len(data))

    def hold(self, replica: str, chain: Chain) -> None:
        """From now on the replica holds all blocks of the chain."""
        self._held.setdefault(replica, set()).update(chain.blocks)

    def lost(self, replica: str) -> None:
        """The replica is gone."""
        self._held.pop(replica, None)

    def view(self, chain: Chain) -> PrefixView:
        """What a snapshot shows of it."""
        held = {}
        for replica, hashes in self._held.items():
            missing = (place for place, block in enumerate(chain.blocks) if block not in hashes)
            if blocks := next(missing, len(chain.blocks)):
                held[replica] = _held(blocks)
        return PrefixView(chain, chain.prompt_bytes // BYTES_PER_TOKEN, held)


def _held(blocks: int) -> Held:
    return Held(blocks, blocks * BLOCK_BYTES // BYTES_PER_TOKEN)


def check_policy(
    policy_class: Callable[..., Policy], options: Mapping[str, Any] | None = None, *, seeds: Iterable[int] = range(3)
) -> None:
    """Raises `AssertionError` where the policy breaks a promise that every policy makes.

    It chooses among the snapshot's replicas, whatever their number and load, whoever holds the prompt, and while they
    come and go; it changes nothing that it is shown; its chance comes from its random source alone; it needs no more
    than a bounded number of calls. On an idle pool it neither sends all prompts to one replica nor picks by position,
    and a replica that holds a prompt but is far busier than all others does not get every request for it, unless the
    class says ``affinity = True``: a policy that may have a reason to keep requests together.
    """
    subject = _PolicyUnderTest(policy_class, dict(options or {}))
    has_affinity = getattr(policy_class, "affinity", False)
    for seed in seeds:
        _copes_with_every_size(subject, seed)
        _survives_coming_and_going(subject, seed)
        _is_deterministic(subject, seed)
        if not has_affinity:
            _spreads_unique_prompts(subject, seed)
            _leaves_a_busy_holder(subject, seed)
    if not has_affinity:
        _has_no_favourite_position(subject)
    _stays_within_the_call_budget(subject)


def check_scorer(
    scorer_class: Callable[..., Any], options: Mapping[str, Any] | None = None, *, seeds: Iterable[int] = range(3)
) -> None:
    """Raises `AssertionError` where the scorer breaks a promise that every scorer makes.

    It gives one finite figure of at most 1 for each replica of the snapshot, whatever their number and load, whoever
    holds the prompt, and while they come and go; a figure depends on the replica, not on its position; it changes
    nothing that it is shown; it needs no more than a bounded number of calls. Where it has a method ``chosen``, that
    is called after each choice.
    """
    subject = _ScorerUnderTest(scorer_class, dict(options or {}))
    for seed in seeds:
        _copes_with_every_size(subject, seed)
        _survives_coming_and_going(subject, seed)
        _is_deterministic(subject, seed)
    _goes_by_name(subject)
    _stays_within_the_call_budget(subject)


class _Subject:
    """A class under test, and the checks that hold at each of its calls."""

    method: str

    def __init__(self, plugin_class: Callable[..., Any], options: dict[str, Any]) -> None:
        self.name: str = getattr(plugin_class, "__name__", repr(plugin_class))
        self._class = plugin_class
        kind = getattr(plugin_class, "Options", None)
        if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
            raise AssertionError(f"{self.name} has no class attribute Options that is a msgspec.Struct")
        method = getattr(plugin_class, self.method, None)
        if not callable(method):
            raise AssertionError(f"{self.name} has no method {self.method}")
        if inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method):
            raise AssertionError(f"{self.name}.{self.method} is async; it must be a plain function")
        try:
            self._options = msgspec.convert(options, kind)
        except msgspec.ValidationError as error:
            raise AssertionError(f"{self.name} does not take the options {options}: {error}") from error

    def create(self, seed: int) -> Any:
        return self._class(self._options, random.Random(seed))

    def ask(self, plugin: Any, request: Request, snapshot: Snapshot) -> Any:
        """What it answers, once it was found to be right."""
        before = _frozen((request, snapshot))
        try:
            answer = getattr(plugin, self.method)(request, snapshot)
        except Exception as error:
            raise AssertionError(f"{self.name}.{self.method} raised {error!r} for {_told(snapshot)}") from error
        self._must(_frozen((request, snapshot)) == before, "changed the request or the snapshot")
        self._judge(answer, snapshot)
        return answer

    def _judge(self, answer: Any, snapshot: Snapshot) -> None:
        """Raises `AssertionError` for an answer that must not be."""
        raise NotImplementedError

    def _must(self, holds: bool, fault: str) -> None:
        if not holds:
            raise AssertionError(f"{self.name}.{self.method} {fault}")


class _PolicyUnderTest(_Subject):
    method = "choose"

    def _judge(self, answer: Any, snapshot: Snapshot) -> None:
        self._must(isinstance(answer, Decision), f"returned {answer!r}, which is no Decision")
        names = {view.replica for view in snapshot.replicas}
        self._must(answer.replica in names, f"chose {answer.replica!r}, which is not in {_told(snapshot)}")
        for fallback in answer.fallbacks:
            self._must(fallback in names, f"named the fallback {fallback!r}, which is not in {_told(snapshot)}")
        self._must(answer.replica not in answer.fallbacks, f"chose {answer.replica!r} as its own fallback")
        self._must(len(set(answer.fallbacks)) == len(answer.fallbacks), "named one fallback twice")
        self._must(isinstance(answer.reason, Reason), f"gave {answer.reason!r}, which is no Reason")


class _ScorerUnderTest(_Subject):
    method = "score"

    def ask(self, plugin: Any, request: Request, snapshot: Snapshot) -> Any:
        scores = super().ask(plugin, request, snapshot)
        if hasattr(plugin, "chosen"):
            plugin.chosen(request, snapshot.replicas[scores.index(max(scores))].replica)
        return scores

    def _judge(self, answer: Any, snapshot: Snapshot) -> None:
        self._must(isinstance(answer, Sequence), f"returned {answer!r}, which is no sequence of figures")
        size = len(snapshot.replicas)
        self._must(len(answer) == size, f"gave {len(answer)} figures for {size} replicas")
        for score in answer:
            self._must(isinstance(score, int | float), f"gave {score!r}, which is no figure")
            self._must(math.isfinite(score) and score <= 1, f"gave {score!r}; figures are finite and at most 1")


def _copes_with_every_size(subject: _Subject, seed: int) -> None:
    chance = random.Random(seed)
    for size in SIZES:
        plugin = subject.create(seed)
        for depths in ([0] * size, [chance.randrange(50) for _ in range(size)], [1000] * size):
            for request in _unique_requests(4):
                subject.ask(plugin, request, _known(make_snapshot(depths), request))
            subject.ask(plugin, make_request(), make_snapshot(depths))
            everyone = {f"replica-{index}": chance.randrange(1, 17) for index in range(size)}
            subject.ask(plugin, make_request(lora="adapter"), make_snapshot(depths, held=everyone))


def _survives_coming_and_going(subject: _Subject, seed: int) -> None:
    """One plugin, two models, and at each call other replicas than before, in another order."""
    plugin = subject.create(seed)
    for request, snapshot in _changing_world(seed):
        subject.ask(plugin, request, snapshot)


def _is_deterministic(subject: _Subject, seed: int) -> None:
    first, second = (
        [subject.ask(plugin, request, snapshot) for request, snapshot in _changing_world(seed)]
        for plugin in (subject.create(seed), subject.create(seed))
    )
    if first != second:
        raise AssertionError(f"{subject.name} decides differently under one seed: is all its chance from `random`?")


def _spreads_unique_prompts(subject: _Subject, seed: int) -> None:
    policy = subject.create(seed)
    snapshot = make_snapshot([0] * 4)
    requests = _unique_requests(_DRAWS)
    for known in (False, True):
        shown = [(each, _known(snapshot, each) if known else snapshot) for each in requests]
        chosen = {subject.ask(policy, request, snapshot).replica for request, snapshot in shown}
        if len(chosen) == 1:
            raise AssertionError(f"{subject.name} sends {_DRAWS} unique prompts to one replica of four idle ones")


def _leaves_a_busy_holder(subject: _Subject, seed: int) -> None:
    policy = subject.create(seed)
    busy = make_replica(
        "replica-0",
        1000,
        queued_prefill_tokens=1_000_000,
        kv_usage=1.0,
        outlook=Outlook(wait_s=100.0, step_s=0.1, token_s=1e-4),
    )
    idle = [make_replica(f"replica-{index}", outlook=Outlook(step_s=0.01, token_s=1e-4)) for index in (1, 2, 3)]
    snapshot = Snapshot(_MODEL, (busy, *idle), make_prefix({"replica-0": 16}))
    chosen = {subject.ask(policy, request, snapshot).replica for request in _unique_requests(_DRAWS)}
    if chosen == {"replica-0"}:
        raise AssertionError(f"{subject.name} sends all to the holder of a prefix, a thousand requests behind the idle")


def _has_no_favourite_position(subject: _Subject) -> None:
    snapshot = make_snapshot([0] * 4)
    chosen = {subject.ask(subject.create(seed), make_request(), snapshot).replica for seed in range(_DRAWS)}
    if len(chosen) == 1:
        raise AssertionError(f"{subject.name} starts at {chosen.pop()!r} under every seed: ties go by position")


def _goes_by_name(subject: _Subject) -> None:
    for request, snapshot in _changing_world(0):
        turned = msgspec.structs.replace(snapshot, replicas=snapshot.replicas[::-1])
        scores = subject.ask(subject.create(0), request, snapshot)
        if list(scores) != list(subject.ask(subject.create(0), request, turned))[::-1]:
            raise AssertionError(f"{subject.name} gives other figures for the same replicas in another order")


def _stays_within_the_call_budget(subject: _Subject) -> None:
    size = max(SIZES)
    plugin = subject.create(0)
    budget = CALLS_AT_LEAST + CALLS_PER_REPLICA * size
    request = make_request(session_id="session", lora="adapter")
    everyone = {f"replica-{index}": 1 + index % 16 for index in range(size)}
    snapshot = make_snapshot(range(size), held=everyone)
    method = getattr(plugin, subject.method)
    calls = _count_calls(lambda: method(request, snapshot))
    if calls > budget:
        told = f"{subject.name}.{subject.method} makes {calls} calls for {size} replicas"
        raise AssertionError(f"{told}; {budget} are too many")


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


def _known(snapshot: Snapshot, request: Request) -> Snapshot:
    """With the request's own prompt, which nobody holds."""
    return msgspec.structs.replace(snapshot, prefix=make_prefix({}, prompt=request.request_id))


def _unique_requests(count: int) -> list[Request]:
    return [
        make_request(f"Question {index}", request_id=f"request-{index}", session_id=f"session-{index}")
        for index in range(count)
    ]


def _changing_world(seed: int) -> list[tuple[Request, Snapshot]]:
    """Replicas that come and go, sessions, adapters and prompts that come again, holders that are not candidates."""
    chance = random.Random(seed)
    everyone = [f"replica-{each}" for each in range(8)]
    world = []
    for index in range(100):
        model = chance.choice(["model-a", "model-b"])
        request = make_request(
            f"Question {index}",
            model=model,
            request_id=f"request-{index}",
            session_id=chance.choice(["", f"session-{chance.randrange(5)}"]),
            lora=chance.choice(["", f"adapter-{chance.randrange(5)}"]),
        )
        names = chance.sample(everyone, chance.randrange(1, 9))
        replicas = tuple(_any_replica(name, chance) for name in names)
        holders = chance.sample(everyone, chance.randrange(9))
        held = {name: chance.randrange(1, 17) for name in holders}
        prefix = chance.choice([NO_PREFIX, make_prefix(held, prompt=f"prompt {chance.randrange(5)} ")])
        world.append((request, Snapshot(model, replicas, prefix, now=float(index))))
    return world


def _any_replica(name: str, chance: random.Random) -> ReplicaView:
    outlook = Outlook(chance.random(), 0.01, 1e-4, 1e-9, 0.005, as_of=chance.random() * 100)
    return make_replica(
        name,
        chance.randrange(5),
        queued_prefill_tokens=chance.randrange(10_000),
        kv_usage=chance.random(),
        outlook=chance.choice([Outlook(), outlook]),
        cache=chance.choice(list(CacheMode)),
    )


def _told(snapshot: Snapshot) -> str:
    names = [view.replica for view in snapshot.replicas]
    return f"the snapshot of {len(names)} replicas: {', '.join(names[:8])}{' …' if len(names) > 8 else ''}"
