"""Single runs, least-queue's saturation rate and the search for goodput, as plain functions."""

from __future__ import annotations

import gc
import hashlib
import os
import random
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from importlib import import_module
from math import sqrt
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from loadtests.simulate import traces
from loadtests.simulate.baselines import BASELINES
from loadtests.simulate.cluster import Change, Cluster, Outcome, Setup
from loadtests.simulate.context import Context
from loadtests.simulate.measure import GOOD_SHARE, WARM_UP, Result, cold_prefills, is_late, summary
from loadtests.simulate.perf import PROFILES
from loadtests.simulate.traces import Trace
from router.policies import registry
from router.policies.base import Policy

FLOOD: Final = 1000.0
"""To find the saturation rate the trace is compressed so much that all requests wait from the beginning."""
GOODPUT_STEP: Final = 0.02
"""The search for goodput ends when the rate is known to this share."""
FIRST_LOAD: Final = 0.8
"""Where it begins."""
BRACKET: Final = 1.25
"""It goes up or down by this factor until the rate lies between two loads."""
LEAST_LOAD: Final = 0.01
AT_ONCE_S: Final = 0.001
"""And no further up than where all requests come within this time."""
SOURCES: Final = (
    "loadtests/simulate/*.py",
    "engine/simulated_*.py",
    "router/load/**/*.py",
    "router/policies/**/*.py",
    "router/prefix/**/*.py",
)
"""The code that decides a saturation rate: a remembered one is good as long as none of it changes."""
BLIND: Final = frozenset({"least-queue", "power-of-two", "random", "round-robin", "greedy", "ideal"})
"""Policies that do not look at prefixes as routers know them."""
POOLED: Final = frozenset({"ideal"})
"""Baselines for which every replica finds in its cache what any replica holds."""


class Knobs(msgspec.Struct, frozen=True):
    """The conditions of a run, beside trace, fleet size, policy and load."""

    seed: int = 0
    profile: str = "h200-8b"
    staleness_s: float = 0.0
    """How late replicas' reports come."""
    routers: int = 1
    model_error: float = 0.0
    """Each term of the fleet's cost model (per token, per attention pair, per step) is wrong by up to this share, drawn
    once per router and the same for all replicas."""
    replica_error: float = 0.0
    """Beyond that, each replica is taken to be faster or slower by up to this share, drawn once per router and
    replica. Policies without a cost model, which most baselines are, are not touched by these two."""
    token_error: float = 0.05
    """The estimate of a prompt's length is wrong by up to this share, drawn per request."""
    slow_factor: float = 1.0
    """The first replica's steps take so many times as long."""
    joins: tuple[float, ...] = ()
    """When replicas join, as shares of the run."""
    leaves: tuple[float, ...] = ()
    """When replicas are lost."""
    options: Mapping[str, Any] = {}
    """Of the policy."""


TRUTHFUL: Final = frozenset({"greedy", "ideal"})
"""Baselines that know the truth, so that nothing of it is withheld from their accounts either."""


def effective(policy: str, knobs: Knobs) -> Knobs:
    """The conditions that the policy runs under."""
    if policy not in TRUTHFUL:
        return knobs
    return msgspec.structs.replace(
        knobs, routers=1, staleness_s=0.0, model_error=0.0, replica_error=0.0, token_error=0.0
    )


def run(
    trace: Trace | str,
    replicas: int,
    policy: str,
    load: float,
    seed: int = 0,
    *,
    knobs: Knobs | None = None,
    **more: Any,
) -> Result:
    """One run at `load` times least-queue's saturation rate. `more` are fields of `Knobs`."""
    knobs = msgspec.structs.replace(knobs or Knobs(), seed=seed, **more)
    if isinstance(trace, str):
        trace = traces.load(trace, knobs.seed)
    rate = load * saturation_rps(trace, replicas, knobs.profile)
    return run_at(trace, replicas, policy, rate, load, knobs)


def run_at(trace: Trace, replicas: int, policy: str, rate_rps: float, load: float, knobs: Knobs) -> Result:
    """One run at a rate in requests per second."""
    result = _run(trace, replicas, policy, rate_rps, load, knobs, may_give_up=False)
    assert result is not None
    return result


def _run(
    trace: Trace, replicas: int, policy: str, rate_rps: float, load: float, knobs: Knobs, *, may_give_up: bool
) -> Result | None:
    """None where it gave up, being sure that too few requests will meet the limits."""
    began = time.process_time()
    knobs = effective(policy, knobs)
    profile = PROFILES[knobs.profile]
    cold = cold_prefills(profile, [request.prompt.tokens for request in trace.requests])
    warm_up = int(len(trace.requests) * WARM_UP)
    too_many = (1 - GOOD_SHARE) * (len(trace.requests) - warm_up)

    def hopeless(outcomes: list[Outcome], now: float) -> bool:
        late = [is_late(outcome, cold[outcome.request.prompt.tokens], now) for outcome in outcomes[warm_up:]]
        return sum(late) > too_many

    cluster, outcomes = replay(trace, replicas, policy, rate_rps, knobs, hopeless if may_give_up else None)
    if outcomes is None:
        return None
    figures: dict[str, Any] = summary(outcomes, cluster, profile, cold)
    return Result(
        policy=policy,
        trace=trace.name,
        replicas=replicas,
        load=load,
        rate_rps=rate_rps,
        seed=knobs.seed,
        profile=knobs.profile,
        staleness_ms=knobs.staleness_s * 1000,
        routers=knobs.routers,
        model_error=knobs.model_error,
        replica_error=knobs.replica_error,
        token_error=knobs.token_error,
        slow_factor=knobs.slow_factor,
        joins=knobs.joins,
        leaves=knobs.leaves,
        options=knobs.options,
        seconds=time.process_time() - began,
        **figures,
    )


def replay(
    trace: Trace,
    replicas: int,
    policy: str,
    rate_rps: float,
    knobs: Knobs,
    hopeless: Callable[[list[Outcome], float], bool] | None = None,
) -> tuple[Cluster, list[Outcome] | None]:
    """The cluster after a run, and what became of each request; None where it was `hopeless`."""
    arrivals = traces.arrivals(trace, rate_rps, knobs.seed)
    span = arrivals[-1][0]
    knobs = effective(policy, knobs)
    setup = Setup(
        profile=PROFILES[knobs.profile],
        replicas=replicas,
        routers=knobs.routers,
        staleness_s=knobs.staleness_s,
        model_error=knobs.model_error,
        replica_error=knobs.replica_error,
        token_error=knobs.token_error,
        slow_factor=knobs.slow_factor,
        changes=tuple(
            [Change(share * span, joins=True) for share in knobs.joins]
            + [Change(share * span, joins=False) for share in knobs.leaves]
        ),
        index=policy not in BLIND,
        pooled=policy in POOLED,
        seed=knobs.seed,
    )
    cluster = Cluster(setup, maker(policy, knobs.options), trace.requests)
    was_enabled = gc.isenabled()
    gc.disable()  # A run makes millions of objects and no cycles.
    try:
        return cluster, cluster.run(arrivals, hopeless)
    finally:
        if was_enabled:
            gc.enable()


def maker(name: str, options: Mapping[str, Any]) -> Callable[[Context], Policy]:
    """What makes a policy of that name: a baseline, an installed policy, or a class as `module:Class`."""
    if name in BASELINES:
        make = BASELINES[name]
        return lambda context: make(msgspec.structs.replace(context, options=options))
    if ":" in name:
        module, _, attribute = name.partition(":")
        cls = getattr(import_module(module), attribute)
        return lambda context: cls(msgspec.convert(dict(options), cls.Options), context.random)
    return lambda context: registry.create(name, options, context.random)


def check(name: str, options: Mapping[str, Any]) -> None:
    """Raises `ValueError` or `ConfigError` where there is no such policy, or not with these options."""
    installed = {spec.name for spec in registry.installed()}
    broken = {spec.name for spec in registry.broken()}
    if ":" not in name and name not in installed | broken | BASELINES.keys():
        known = ", ".join(sorted(installed | BASELINES.keys()))
        raise ValueError(f"no policy {name!r}; there are {known}, and classes as module:Class")
    if options and name in TRUTHFUL:
        raise ValueError(f"the policy {name!r} has no options")
    context = Context(random.Random(0), lambda: 0.0, {}, PROFILES["h200-8b"], lambda request: request)
    try:
        maker(name, options)(context)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"no policy {name!r}: {error}") from error
    except msgspec.ValidationError as error:
        raise ValueError(f"options of {name!r}: {error}") from error


_saturations: dict[str, float] = {}


def saturation_rps(trace: Trace, replicas: int, profile: str = "h200-8b") -> float:
    """Requests per second that least-queue gets done when all of them wait; remembered in memory and in a file.

    Raises `ValueError` where no request fits into a replica.
    """
    key = _key(trace, replicas, profile)
    if key not in _saturations:
        path = _cache_dir() / f"{key}.json"
        rate = _remembered(path)
        if rate is None:
            rate = _flooded_rps(trace, replicas, profile)
            _remember(path, rate)
        _saturations[key] = rate
    return _saturations[key]


def _flooded_rps(trace: Trace, replicas: int, profile: str) -> float:
    _, outcomes = replay(trace, replicas, "least-queue", trace.rate_rps * FLOOD, Knobs(profile=profile))
    done = [outcome for outcome in outcomes or () if not outcome.error]
    if not done:
        raise ValueError(f"no request of the trace {trace.name!r} fits into a replica")
    return len(done) / max(outcome.end_s for outcome in done)


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvlane" / "saturation"


@cache
def _sources() -> tuple[Path, ...]:
    root = Path(__file__).resolve().parents[2]
    found = [path for pattern in SOURCES for path in root.glob(pattern)]
    return tuple(sorted(found))


def _remembered(path: Path) -> float | None:
    """None where the file is not there, is not whole or cannot be read: then the rate is found anew."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Saturation).rps
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _remember(path: Path, rps: float) -> None:
    """Without a place to remember it, the next process just looks for it again."""
    part = path.with_suffix(f".{os.getpid()}")  # Several may look for it at once.
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(msgspec.json.encode(_Saturation(rps)))
        part.replace(path)


class _Saturation(msgspec.Struct):
    rps: Annotated[float, msgspec.Meta(gt=0)]


def _key(trace: Trace, replicas: int, profile: str) -> str:
    """Of all that decides a saturation rate: the requests, the fleet, the code that simulates it, and the router's."""
    digest = hashlib.sha256()
    for request in trace.requests:
        digest.update(
            repr((request.at_s, request.prompt.tokens, request.answer_tokens, request.prompt.hashes)).encode()
        )
    for path in _sources():
        digest.update(path.read_bytes())
    return f"{trace.name}-{replicas}-{profile}-{digest.hexdigest()[:16]}"


def goodput(trace: Trace | str, replicas: int, policy: str, seed: int = 0, *, knobs: Knobs | None = None) -> Result:
    """The run at the highest rate at which enough requests meet the limits, found by bisection of the load.

    Where there is none down to a hundredth of least-queue's saturation: that run, with a goodput of 0. Where no rate
    is too much: the run in which all requests come at once, marked `unlimited`.
    """
    knobs = msgspec.structs.replace(knobs or Knobs(), seed=seed)
    if isinstance(trace, str):
        trace = traces.load(trace, knobs.seed)
    base = saturation_rps(trace, replicas, knobs.profile)
    best: Result | None = None
    low, high = LEAST_LOAD, 0.0  # `high` is the lowest load that is known to be too much; 0: none yet.
    load = FIRST_LOAD
    greatest = len(trace.requests) / AT_ONCE_S / base
    while not high or high / low > 1 + GOODPUT_STEP:
        result = _run(trace, replicas, policy, load * base, load, knobs, may_give_up=True)
        if result is not None and result.good_share >= GOOD_SHARE:
            low, best = load, result
            if load >= greatest:
                return msgspec.structs.replace(best, goodput_rps=best.rate_rps, unlimited=True)
        else:
            high = load
        if not high:
            load = min(low * BRACKET, greatest)
        elif best is None:
            load = max(high / BRACKET, low)
            if high <= LEAST_LOAD:
                break
        else:
            load = sqrt(low * high)
    if best is None:
        return msgspec.structs.replace(run_at(trace, replicas, policy, low * base, low, knobs), goodput_rps=0.0)
    return msgspec.structs.replace(best, goodput_rps=best.rate_rps)
