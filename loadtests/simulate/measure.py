"""What a run is judged by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Final

import msgspec

from engine.simulated_core import StepWork
from loadtests.simulate.cluster import Cluster, Outcome
from loadtests.simulate.perf import Profile, cold_prefill_s, step_ms

WARM_UP: Final = 0.1
"""The first share of the requests, which find empty caches, counts for nothing."""
TTFT_BASE_S: Final = 0.5
TTFT_PREFILLS: Final = 2.0
TPOT_LIMIT_S: Final = 0.05
SHORT_TOKENS: Final = 4_000
LONG_TOKENS: Final = 20_000
"""Classes of prompt length: past saturation, short requests may win at the cost of long ones."""
GOOD_SHARE: Final = 0.9
"""A fleet copes with a rate at which this share of the requests meets both limits."""


class Result(msgspec.Struct, frozen=True):
    """One run. Times are in seconds, over the requests after the warm-up; those with errors have no times."""

    policy: str
    trace: str
    replicas: int
    load: float
    """Share of the rate at which least-queue is saturated."""
    hit_ratio: float
    """Prompt tokens found in a KV cache, of all prompt tokens."""
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float
    goodput_rps: float
    """Requests per second that met both limits; in a search, the highest rate at which enough of them do."""
    imbalance: float
    """Most work on one replica by the mean: time for uncached prompt tokens and for answers."""
    inflight_imbalance: float
    """Most requests on one replica by the mean, averaged over arrivals."""
    good_share: float
    """Requests that met both limits, of all."""
    rate_rps: float
    requests: int
    errors: int
    seed: int
    profile: str
    staleness_ms: float
    routers: int
    model_error: float
    replica_error: float = 0.0
    token_error: float = 0.05
    slow_factor: float = 1.0
    joins: tuple[float, ...] = ()
    leaves: tuple[float, ...] = ()
    options: Mapping[str, Any] = {}
    """Of the policy. These and the errors are what the policy ran under, not what was asked for: no error or delay
    reaches the bounds."""
    ttft_short_mean_s: float = 0.0
    """Mean over prompts of less than `SHORT_TOKENS`; 0 where there are none."""
    ttft_middle_mean_s: float = 0.0
    """Over those between."""
    ttft_long_mean_s: float = 0.0
    """Over those of `LONG_TOKENS` and more."""
    unlimited: bool = False
    """Of a search: no rate is too much for this trace; the goodput is the rate of all requests at once."""
    seconds: float = 0.0
    """Processor time that the run took."""


def cold_prefills(profile: Profile, tokens: Sequence[int]) -> dict[int, float]:
    """By prompt length: see `cold_prefill_s`."""
    return {count: cold_prefill_s(profile, count) for count in set(tokens)}


def is_good(outcome: Outcome, cold_s: float) -> bool:
    """Whether a request met both limits."""
    if outcome.error:
        return False
    return outcome.first_s - outcome.at_s <= TTFT_BASE_S + TTFT_PREFILLS * cold_s and tpot_s(outcome) <= TPOT_LIMIT_S


def is_late(outcome: Outcome, cold_s: float, now: float) -> bool:
    """Whether a request is sure by `now` to miss a limit."""
    if outcome.error or outcome.end_s:
        return not is_good(outcome, cold_s)
    return (outcome.first_s or now) - outcome.at_s > TTFT_BASE_S + TTFT_PREFILLS * cold_s


def tpot_s(outcome: Outcome) -> float:
    """Mean time per output token after the first; 0 where there is only one."""
    more = outcome.request.answer_tokens - 1
    return (outcome.end_s - outcome.first_s) / more if more else 0.0


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of sorted values, by linear interpolation; 0 where there are none."""
    if not ordered:
        return 0.0
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def measured(outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
    """Those after the warm-up."""
    return outcomes[int(len(outcomes) * WARM_UP) :]


def imbalance(outcomes: Sequence[Outcome], cluster: Cluster, profile: Profile) -> float:
    """Most work on one replica by the mean, in what the work would take on idle replicas of the profile."""
    work = dict.fromkeys([*cluster.replicas, *(replica.name for replica in cluster.gone)], 0.0)
    idle = step_ms(profile, StepWork(0, 0.0, 0, 0))
    for outcome in outcomes:
        if outcome.error:
            continue
        request = outcome.request
        new, end, answer = request.prompt.tokens - outcome.cached_tokens, request.prompt.tokens, request.answer_tokens
        work[outcome.replica] += step_ms(profile, StepWork(new, new * (end - new * 0.5), 0, 0)) - idle
        work[outcome.replica] += profile.options.roofline_ms_per_token * answer
        work[outcome.replica] += profile.options.decode_ms_per_context_token * answer * (end + answer * 0.5)
    mean = fmean(work.values())
    return max(work.values()) / mean if mean else 1.0


def _mean_ttft_s(outcomes: Sequence[Outcome], least: float, below: float) -> float:
    """Over prompts of such lengths; 0 where there are none."""
    times = [outcome.first_s - outcome.at_s for outcome in outcomes if least <= outcome.request.prompt.tokens < below]
    return fmean(times) if times else 0.0


def summary(
    outcomes: Sequence[Outcome], cluster: Cluster, profile: Profile, cold: dict[int, float]
) -> dict[str, float]:
    """The measured fields of a `Result`."""
    counted = measured(outcomes)
    whole = [outcome for outcome in counted if not outcome.error]
    ttfts = sorted(outcome.first_s - outcome.at_s for outcome in whole)
    tpots = sorted(tpot_s(outcome) for outcome in whole if outcome.request.answer_tokens > 1)
    good = sum(is_good(outcome, cold[outcome.request.prompt.tokens]) for outcome in counted)
    tokens = sum(outcome.request.prompt.tokens for outcome in whole)
    span = max(counted[-1].at_s - counted[0].at_s, 1e-9)
    samples = cluster.inflight_samples
    return {
        "hit_ratio": sum(outcome.cached_tokens for outcome in whole) / max(tokens, 1),
        "ttft_mean_s": fmean(ttfts) if ttfts else 0.0,
        "ttft_p50_s": percentile(ttfts, 0.5),
        "ttft_p90_s": percentile(ttfts, 0.9),
        "ttft_p99_s": percentile(ttfts, 0.99),
        "ttft_short_mean_s": _mean_ttft_s(whole, 0, SHORT_TOKENS),
        "ttft_middle_mean_s": _mean_ttft_s(whole, SHORT_TOKENS, LONG_TOKENS),
        "ttft_long_mean_s": _mean_ttft_s(whole, LONG_TOKENS, math.inf),
        "tpot_p50_s": percentile(tpots, 0.5),
        "tpot_p99_s": percentile(tpots, 0.99),
        "goodput_rps": good / span,
        "imbalance": imbalance(counted, cluster, profile),
        "inflight_imbalance": cluster.inflight_peak_sum / samples if samples else 1.0,
        "good_share": good / len(counted),
        "requests": len(counted),
        "errors": len(counted) - len(whole),
    }
