"""One repetition of one load on one system, and what it showed."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Coroutine, Sequence
from typing import Any, Final

import msgspec
import uvloop

from loadtests.peers import load
from loadtests.peers.answers import Tally
from loadtests.peers.base import Running
from loadtests.peers.cost import FamilyCost, family_rss_mb
from loadtests.peers.errors import PeerError
from loadtests.peers.load import Prompts

REQUESTS: Final = 2000
"""Of one token, to tell what a request costs."""
PACED_CHUNKS_PER_S: Final = 16_000.0
"""What engines that set the pace give out at most."""
MOST_AT_ONCE: Final = 2000
"""Requests of an open loop under way; of more than so many some wait, and are asked late."""
GRACE_S: Final = 30.0
"""What a load may take longer than it would without any delay."""


class Shape(msgspec.Struct, frozen=True):
    """What a load is like."""

    tokens: int
    """Of an answer where chunks are measured."""
    prompt_kb: float
    repeated: bool
    """Whether a stream's requests all have the same prompt."""
    step_ms: float
    """Of an engine step while the engines set the pace; more where so many streams would ask for too much."""
    seconds: float
    """How long each timed load goes on."""
    paced_rate: float = PACED_CHUNKS_PER_S
    """The most chunks per second while the engines set the pace."""
    requests: int = REQUESTS
    """Of one token, to tell what each costs; fewer where they would take too long, four per stream at the least."""

    def open_step_ms(self) -> float:
        """For open loops: an answer takes a second at most, so that soon as many are under way as ever will be."""
        return min(self.step_ms, 1e3 / self.tokens)

    def paced_step_ms(self, streams: int) -> float:
        """That of the engines, or longer where so many streams would have more chunks than `paced_rate`."""
        return max(self.step_ms, 1e3 * streams / self.paced_rate)


class Paced(msgspec.Struct):
    """A repetition with the engines setting the pace. CPU in microseconds, times in milliseconds."""

    cpu_us_per_chunk: float
    cpu_us_per_token: float
    cpu_us_per_request: float
    engine_cpu_us_per_chunk: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    tokens_per_chunk: float
    cores: float
    """How much of a core the router was busy with while chunks were relayed."""
    errors: int
    causes: Counter[str]
    what = "paced"


class Saturated(msgspec.Struct):
    """A repetition with engines that are not waited for: who is slowest sets the pace."""

    chunks_per_s: float
    tokens_per_s: float
    requests_per_s: float
    router_cores: float
    """How much of a core each side was busy with while chunks were relayed: who is at its limit, and who is not."""
    engine_cores: float
    load_cores: float
    errors: int
    causes: Counter[str]
    what = "saturated"


class Open(msgspec.Struct):
    """A repetition of an open loop: arrivals at a fraction of capacity, or a trace."""

    requests_per_s: float
    """Answered."""
    chunks_per_s: float
    cpu_us_per_chunk: float
    cpu_us_per_token: float
    cpu_us_per_request: float
    """The same CPU by requests."""
    engine_cpu_us_per_chunk: float
    ttft_mean_ms: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    errors: int
    causes: Counter[str]
    what = "open loop"


class Bench:
    """Runs the loads of one shape. Every load raises `PeerError` where nothing is answered."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        # One for all loads: a prompt that was asked before is in somebody's cache.
        self._prompts = Prompts(shape.prompt_kb, repeated=shape.repeated)

    def warm_up(self, system: str, running: Running, streams: int) -> None:
        """Opens connections and fills pools."""
        self._closed(system, running, streams, 5, 2)

    def paced(self, system: str, running: Running, streams: int) -> Paced:
        """Long streams for the cost per chunk, answers of one token for that of a request, arrivals for TTFT."""
        shape = self._shape
        rounds = max(1, math.ceil(shape.seconds / (shape.tokens * shape.step_ms / 1e3)))
        router, engine = FamilyCost(running.router_pids), FamilyCost(running.engine_pids)
        long = self._closed(system, running, streams, shape.tokens, rounds)
        router_us, engine_us = router.cpu_s() * 1e6, engine.cpu_s() * 1e6
        router = FamilyCost(running.router_pids)
        # Each waits for the step under way and takes one.
        asked = max(4, min(shape.requests // streams, int(shape.seconds * 1e3 / (2 * shape.step_ms))))
        short = self._closed(system, running, streams, 1, asked)
        request_us = router.cpu_s() * 1e6
        first = self._arrivals(system, running, streams)
        tallies = (long, short, first)
        return Paced(
            cpu_us_per_chunk=router_us / long.chunks,
            cpu_us_per_token=router_us / long.tokens,
            cpu_us_per_request=request_us / short.requests,
            engine_cpu_us_per_chunk=engine_us / long.chunks,
            ttft_p50_ms=1e3 * percentile(first.ttft_s, 50),
            ttft_p99_ms=1e3 * percentile(first.ttft_s, 99),
            itl_p50_ms=1e3 * percentile(long.gaps_s, 50),
            itl_p99_ms=1e3 * percentile(long.gaps_s, 99),
            tokens_per_chunk=long.tokens / long.chunks,
            cores=router_us / 1e6 / long.wall_s,
            errors=sum(each.errors for each in tallies),
            causes=sum((each.causes for each in tallies), Counter()),
        )

    def saturated(self, system: str, running: Running, streams: int) -> Saturated:
        """As much as goes through."""
        router, engine = FamilyCost(running.router_pids), FamilyCost(running.engine_pids)
        long = self._saturation(system, running, streams, self._shape.tokens)
        router_s, engine_s, took_s = router.cpu_s(), engine.cpu_s(), long.wall_s
        short = self._saturation(system, running, streams, 1)
        return Saturated(
            router_cores=router_s / took_s,
            engine_cores=engine_s / took_s,
            load_cores=long.cpu_s / took_s,
            chunks_per_s=long.chunks / long.seconds,
            tokens_per_s=long.tokens / long.seconds,
            requests_per_s=short.requests / short.seconds,
            errors=long.errors + short.errors,
            causes=long.causes + short.causes,
        )

    def open_loop(self, system: str, running: Running, rate: float) -> Open:
        """Answers of the shape's length, `rate` of them to the second, for as long as all are under way and then on."""
        shape = self._shape
        arriving_s = shape.tokens * shape.step_ms / 1e3 + shape.seconds
        total = max(20, int(rate * arriving_s))
        most = min(MOST_AT_ONCE, total)
        limit_s = arriving_s + self._limit_s(shape.tokens + 1)
        asked = load.arrivals(running.client, rate, total, most, shape.tokens, self._prompts, limit_s=limit_s)
        return opened(system, running, asked)

    def _closed(self, system: str, running: Running, streams: int, tokens: int, rounds: int) -> Tally:
        limit_s = self._limit_s(rounds * (tokens + 1))
        return _run(
            system,
            load.closed_loop(running.client, streams, tokens, self._prompts, rounds=rounds, limit_s=limit_s),
        )

    def _saturation(self, system: str, running: Running, streams: int, tokens: int) -> Tally:
        seconds, limit_s = self._shape.seconds, self._limit_s(tokens)
        return _run(
            system, load.saturation(running.client, streams, tokens, self._prompts, seconds=seconds, limit_s=limit_s)
        )

    def _arrivals(self, system: str, running: Running, streams: int) -> Tally:
        """At such a rate that `streams` answers are under way on average, of a length that saturates nothing."""
        tokens = 10 if streams <= 64 else 50
        rate = streams / (tokens * self._shape.step_ms / 1e3)
        total, most = max(2, int(rate * self._shape.seconds)), 2 * streams + 8
        limit_s = self._limit_s(tokens + 1)
        return _run(system, load.arrivals(running.client, rate, total, most, tokens, self._prompts, limit_s=limit_s))

    def _limit_s(self, steps: int) -> float:
        """For a load that would take so many steps one after the other."""
        return GRACE_S + self._shape.seconds + 2 * steps * self._shape.step_ms / 1e3


def opened(system: str, running: Running, asked: Coroutine[Any, Any, Tally]) -> Open:
    """Runs an open loop and tells what it showed."""
    router, engine = FamilyCost(running.router_pids), FamilyCost(running.engine_pids)
    got = _run(system, asked)
    router_us, engine_us = router.cpu_s() * 1e6, engine.cpu_s() * 1e6
    return Open(
        requests_per_s=got.requests / got.seconds,
        chunks_per_s=got.chunks / got.seconds,
        cpu_us_per_chunk=router_us / got.chunks,
        cpu_us_per_token=router_us / got.tokens,
        cpu_us_per_request=router_us / got.requests,
        engine_cpu_us_per_chunk=engine_us / got.chunks,
        ttft_mean_ms=1e3 * statistics.fmean(got.ttft_s),
        ttft_p50_ms=1e3 * percentile(got.ttft_s, 50),
        ttft_p99_ms=1e3 * percentile(got.ttft_s, 99),
        itl_p50_ms=1e3 * percentile(got.gaps_s, 50),
        itl_p99_ms=1e3 * percentile(got.gaps_s, 99),
        errors=got.errors,
        causes=got.causes,
    )


def peak_memory_mb(running: Running) -> float:
    """Of the router side, in MiB."""
    return family_rss_mb(running.router_pids)


def percentile(values: Sequence[float], percent: int) -> float:
    """0 where there are none: answers of one token have no gaps."""
    if len(values) < 2:
        return sum(values)
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def _run(system: str, asked: Coroutine[Any, Any, Tally]) -> Tally:
    tally = uvloop.run(asked)
    if not tally.ttft_s:
        causes = ", ".join(f"{cause} ({times} times)" for cause, times in tally.causes.most_common(3))
        raise PeerError(system, f"answered nothing: {causes or 'no answer in time'}")
    return tally
