"""Prometheus metrics.

Job: count requests and show the state of lanes and pools at each scrape. Rule: nothing here runs per token; token and
step counts are read from the lanes when somebody scrapes. `Metrics` owns its registry.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from router.admission import Admission
from router.errors import KvlaneError
from router.holding import Queue
from router.observe.histograms import Counts, powers_of_two
from router.observe.loop_lag import LoopLag
from router.observe.merge import Families, exposition_in_slices, merge, snapshot_in_slices
from router.observe.policies import PolicyMetrics
from router.observe.prefixes import PrefixMetrics
from router.observe.security import SecurityMetrics
from router.prefix.prefixes import Prefixes
from router.replicas import Replicas
from router.turns import in_turns
from router.types import Receipt, Request, Rpc

_TTFT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_DURATION_BUCKETS_S = (0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_HELD_BUCKETS_S = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_RATIO_BUCKETS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.1, 1.33, 2, 4, 10)
_WAKE_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_FRAME_BITS = range(6, 25, 2)
_BATCH_BITS = range(13)
_RPC_NAMES = {Rpc.HTTP: "http", Rpc.GRPC: "grpc"}


class Metrics:
    """The metrics of one router process (`router.dispatch.Observer`)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, worker: int = 0) -> None:
        """`worker` is this process's number among those that share its ports."""
        self._clock = clock
        self._scraping = asyncio.Lock()
        """However many scrapes there are, streams wait for one slice at a time, not for one of each."""
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self.loop_lag = LoopLag(worker)
        registry.register(self.loop_lag)
        self._requests = Counter(
            "kvlane_requests",
            "Requests ended, by outcome: ok or an error's name.",
            ["rpc", "outcome"],
            registry=registry,
        )
        self._counters: dict[tuple[str, str], Counter] = {}
        self._times = _Times()
        registry.register(self._times)
        self._retries = Counter(
            "kvlane_retries", "Requests sent to another replica, by the error before.", ["error"], registry=registry
        )
        self._membership = Counter(
            "kvlane_membership_failures",
            "Tries to reach Ray or the directory that came to nothing, by cause.",
            ["kind"],
            registry=registry,
        )
        for kind in ("token", "tls", "timeout", "unreachable"):
            self._membership.labels(kind)
        self._wakes = Counter(
            "kvlane_wakes",
            "Sleeping replicas that woke: a request waited (`request`), or this router had told them to (`ahead`).",
            ["cause"],
            registry=registry,
        )
        self.policies = PolicyMetrics(registry)
        """What guards and shadows report to."""
        self._held = Counter(
            "kvlane_held",
            "Requests that had to wait for a replica, by how that ended: released, gave_up, expired or refused.",
            ["model", "outcome"],
            registry=registry,
        )
        self._held_models: dict[str, None] = {}
        """Those whose requests ever had to wait: they go on to be shown, with 0."""
        self.security = SecurityMetrics(registry)
        """What the gate, TLS ports and followed files report to."""
        self._prefixes = PrefixMetrics()
        registry.register(self._prefixes)

    def watch(
        self,
        admission: Admission,
        replicas: Replicas,
        prefixes: Prefixes,
        connections: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        """Shows these at each scrape; `connections` are those of clients, by protocol."""
        self._registry.register(_State(admission, replicas, connections))
        replicas.woke = self.woke
        self._prefixes.watch(prefixes, replicas)

    def watch_held(self, queues: Mapping[str, Queue]) -> None:
        """Shows who is held at each scrape."""
        self._registry.register(_Held(queues, self._held_models))

    def held(self, model: str, outcome: str, waited_s: float) -> None:
        """A request waits for a replica no longer, or could not (`router.hold.HoldObserver`)."""
        self._held_models[model] = None
        self._held.labels(model, outcome).inc()
        if outcome != "refused":
            self._times.held.add(waited_s)

    def began(self) -> float:
        """A request begins; hand the result to `ended`."""
        return self._clock()

    def ended(self, request: Request, began: float, outcome: str) -> None:
        """A request ended: `ok`, `cancelled` or an error's name."""
        self._count(_RPC_NAMES[request.rpc], outcome)
        self._times.durations[request.rpc].add(self._clock() - began)

    def refused(self, rpc: str, error: str) -> None:
        """An ingress answered a request with that error without dispatching it."""
        self._count(rpc, error)

    def _count(self, rpc: str, outcome: str) -> None:
        counter = self._counters.get((rpc, outcome))
        if counter is None:  # looking a child up by its labels costs more than counting
            counter = self._counters[rpc, outcome] = self._requests.labels(rpc, outcome)
        counter.inc()

    def first_output(self, waited_s: float, expected_s: float) -> None:
        """A stream's first output came; 0 expected where nobody knew."""
        self._times.first_outputs.add(waited_s)
        if expected_s > 0.0:
            self._times.ratios.add(waited_s / expected_s)

    def woke(self, waited_s: float | None, told: bool) -> None:
        """A replica that slept is awake; `waited_s` is how long this router's oldest request waited for it."""
        if waited_s is not None:
            self._times.wakes.add(waited_s)
            self._wakes.labels("request").inc()
        elif told:
            self._wakes.labels("ahead").inc()

    def hashed(self, seconds: float, times: int = 1) -> None:
        """A prompt was read and hashed, in that time; it stands for so many of them."""
        self._prefixes.hashing.add(seconds, times)

    def looked_up(self, seconds: float, times: int = 1) -> None:
        """It was looked up who holds how much of a prompt; that stands for so many look-ups."""
        self._prefixes.lookup.add(seconds, times)

    def routed(self, request: Request, receipt: Receipt) -> None:
        """A replica was chosen; once per try."""
        if receipt.prompt_tokens:
            self._prefixes.routed(request.model, receipt)

    def retried(self, error: KvlaneError) -> None:
        """A request goes to another replica."""
        self._retries.labels(error.name).inc()

    def membership_failed(self, kind: str) -> None:
        """Membership could not be asked."""
        self._membership.labels(kind).inc()

    async def snapshot(self) -> Families:
        """All figures of this process now. Other tasks run meanwhile."""
        async with self._scraping:
            return await in_turns(snapshot_in_slices(self._registry))

    async def exposition(self) -> tuple[bytes, str]:
        """What a scrape of this process alone gets: the text, and its content type. Other tasks run meanwhile."""
        families = merge([await self.snapshot()])
        async with self._scraping:
            return await in_turns(exposition_in_slices(families))


class _Times(Collector):
    """What is measured once per request."""

    def __init__(self) -> None:
        self.durations = {rpc: Counts(_DURATION_BUCKETS_S) for rpc in _RPC_NAMES}
        self.first_outputs = Counts(_TTFT_BUCKETS_S)
        self.ratios = Counts(_RATIO_BUCKETS)
        self.held = Counts(_HELD_BUCKETS_S)
        self.wakes = Counts(_WAKE_BUCKETS_S)

    def collect(self) -> Iterator[Metric]:
        durations = HistogramMetricFamily(
            "kvlane_request_seconds", "Time from dispatch to the end of a request.", labels=["rpc"]
        )
        for rpc, took in self.durations.items():
            took.show(durations, [_RPC_NAMES[rpc]])
        yield durations
        for counts, name, documentation in (
            (
                self.first_outputs,
                "kvlane_first_output_seconds",
                "Time from submit on a lane to the stream's first output.",
            ),
            (
                self.ratios,
                "kvlane_first_output_ratio",
                "That time over what the load model expected of it; 1 where it is right.",
            ),
            (self.held, "kvlane_held_seconds", "Time that requests waited for a replica, however it ended."),
            (
                self.wakes,
                "kvlane_wake_seconds",
                "Time from the submit that woke a sleeping replica until it was awake.",
            ),
        ):
            family = HistogramMetricFamily(name, documentation)
            counts.show(family)
            yield family


class _Held(Collector):
    """Reads at each scrape who is held."""

    def __init__(self, queues: Mapping[str, Queue], known: dict[str, None]) -> None:
        self._queues = queues
        self._known = known

    def collect(self) -> Iterator[Metric]:
        self._known.update(dict.fromkeys(self._queues))
        requests = GaugeMetricFamily("kvlane_held_requests", "Requests that wait for a replica.", labels=["model"])
        size = GaugeMetricFamily("kvlane_held_bytes", "Bytes of these requests' bodies.", labels=["model"])
        for model in self._known:
            queue = self._queues.get(model)
            requests.add_metric([model], len(queue) if queue is not None else 0)
            size.add_metric([model], queue.bytes if queue is not None else 0)
        yield requests
        yield size


class _State(Collector):
    """Reads the router's state at each scrape."""

    def __init__(self, admission: Admission, replicas: Replicas, connections: Callable[[], Mapping[str, int]]) -> None:
        self._admission = admission
        self._replicas = replicas
        self._connections = connections

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("kvlane_streams_in_flight", "Requests admitted.", self._admission.in_flight)
        connections = GaugeMetricFamily("kvlane_connections", "Connections of clients.", labels=["protocol"])
        for protocol, count in self._connections().items():
            connections.add_metric([protocol], count)
        yield connections
        steps, tokens = self._replicas.totals()
        yield CounterMetricFamily("kvlane_steps", "Step frames received.", steps)
        yield CounterMetricFamily("kvlane_tokens", "Tokens received.", tokens)
        failures = CounterMetricFamily(
            "kvlane_lane_failures", "Lanes that could not be opened or were lost, by cause.", labels=["kind"]
        )
        for kind, count in self._replicas.troubles.counts.items():
            failures.add_metric([kind], count)
        yield failures
        yield from self._frames()
        ready = GaugeMetricFamily("kvlane_replicas_ready", "Ready replicas of a model.", labels=["model"])
        for status in self._replicas.models():
            ready.add_metric([status.card.name], status.ready_replicas)
        yield ready
        asleep = GaugeMetricFamily("kvlane_replicas_asleep", "Ready replicas of a model that sleep.", labels=["model"])
        sleepers = self._replicas.asleep()
        for status in self._replicas.models():
            asleep.add_metric([status.card.name], sleepers.get(status.card.name, 0))
        yield asleep
        lanes = [(lane.replica, lane.account) for lane in self._replicas.lanes()]
        for name, text, values in (
            ("running", "Requests in the engine's batch.", [account.load.running for _, account in lanes]),
            ("waiting", "Requests waiting at the replica.", [account.load.waiting for _, account in lanes]),
            ("kv_usage", "Share of the KV blocks in use.", [account.load.kv_usage for _, account in lanes]),
            ("leases", "This router's requests in flight there.", [account.leases for _, account in lanes]),
        ):
            found = GaugeMetricFamily(f"kvlane_replica_{name}", text, labels=["replica"])
            for (replica, _), value in zip(lanes, values, strict=True):
                found.add_metric([replica], value)
            yield found  # One at a time: a scrape is taken in slices.

    def _frames(self) -> Iterator[Metric]:
        meter = self._replicas.meter
        sizes = HistogramMetricFamily("kvlane_lane_frame_bytes", "Size of frames from replicas; one of seven counts.")
        powers_of_two(meter.sizes, _FRAME_BITS, sizes, meter.bytes)
        yield sizes
        batches = HistogramMetricFamily(
            "kvlane_step_outputs", "Streams that a step frame brings output for; one of seven counts."
        )
        powers_of_two(meter.batches, _BATCH_BITS, batches, meter.outputs)
        yield batches
