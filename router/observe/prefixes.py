"""Metrics of what the router knows of KV caches: how good it is, what it costs, and what it was worth.

Rule: per request only plain numbers are added up; they become metrics when somebody scrapes. Models are labels only
once a replica announced them, so clients cannot make up new ones.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from router.prefix.prefixes import Prefixes
from router.replicas import Replicas
from router.types import Receipt


class Took:
    """How often something was done, and how long it took in all; where not each time was taken, an estimate."""

    __slots__ = ("count", "seconds")

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        """So many times more, each as long as the one that was timed."""
        self.count += times
        self.seconds += seconds * times


class PrefixMetrics(Collector):
    """Adds up what dispatch tells, and reads the rest at each scrape."""

    def __init__(self) -> None:
        self.hashing = Took()
        self.lookup = Took()
        self._tokens: dict[str, list[int]] = {}
        """Prompt tokens and those of them that were held where they went, by model."""
        self._sources: tuple[Prefixes, Replicas] | None = None

    def watch(self, prefixes: Prefixes, replicas: Replicas) -> None:
        """Shows these from now on."""
        self._sources = prefixes, replicas

    def routed(self, model: str, receipt: Receipt) -> None:
        """A request for a model that is there was routed."""
        tokens = self._tokens.get(model)
        if tokens is None:
            tokens = self._tokens[model] = [0, 0]
        tokens[0] += receipt.prompt_tokens
        tokens[1] += receipt.cached_tokens

    def collect(self) -> Iterator[Metric]:
        yield _summary(
            "kvlane_prefix_hash_seconds",
            "Reading and hashing prompts; where they are short, judged by samples.",
            self.hashing,
        )
        yield _summary(
            "kvlane_prefix_lookup_seconds", "Looking up who holds a prompt's prefix, judged by samples.", self.lookup
        )
        prompt = CounterMetricFamily("kvlane_prompt_tokens", "Estimated tokens of prompts.", labels=["model"])
        matched = CounterMetricFamily(
            "kvlane_prefix_matched_tokens",
            "Those of them that the chosen replica was believed to hold.",
            labels=["model"],
        )
        for model, (tokens, cached) in self._tokens.items():
            prompt.add_metric([model], tokens)
            matched.add_metric([model], cached)
        yield prompt
        yield matched
        if self._sources is not None:
            yield from _caches(self._sources[1])
            yield from _index(self._sources[0])
            yield CounterMetricFamily("kvlane_cache_reports", "Cache reports of replicas.", self._sources[1].reports)


def _summary(name: str, text: str, took: Took) -> Metric:
    return SummaryMetricFamily(name, text, count_value=took.count, sum_value=took.seconds)


def _caches(replicas: Replicas) -> Iterator[Metric]:
    modes = GaugeMetricFamily(
        "kvlane_replica_cache_mode", "1 for what is known of a replica's KV cache.", labels=["replica", "mode"]
    )
    for replica, status in replicas.caches().items():
        modes.add_metric([replica, status.mode], 1)
    yield modes


def _index(prefixes: Prefixes) -> Iterator[Metric]:
    status = prefixes.status()
    yield GaugeMetricFamily("kvlane_prefix_blocks", "Prefix blocks indexed, of all replicas together.", status.blocks)
    yield CounterMetricFamily("kvlane_prefix_blocks_refused", "Blocks that the index had no room for.", status.refused)
    yield GaugeMetricFamily("kvlane_prefix_holds", "Requests whose blocks count as soon cached.", status.holds)
    yield CounterMetricFamily("kvlane_prefix_holds_expired", "Those that outlived their time.", status.expired)
    yield GaugeMetricFamily(
        "kvlane_prefix_late_replicas", "Replicas whose cache reports are still being taken in.", status.late
    )
    yield GaugeMetricFamily("kvlane_prefix_index_bytes", "Estimated memory of the index.", status.bytes)
    yield CounterMetricFamily("kvlane_cache_gaps", "Times that cache reports were missed.", status.gaps)
    yield CounterMetricFamily("kvlane_cache_gaps_healed", "Those of them that a snapshot made good for.", status.healed)
    yield CounterMetricFamily(
        "kvlane_cache_predictions",
        "Requests whose expected cached blocks could be held against the engine's own count.",
        status.compared,
    )
    yield CounterMetricFamily(
        "kvlane_cache_predictions_off", "Those among them that were off by more than one KV block.", status.off
    )
