"""Metrics of several processes as one.

Job: take a registry's figures out of its process (`snapshot`), add those of several up (`merge`), and show them
(`exposition`). Rule: counters, histograms and summaries are sums, and gauges follow the table below. What has ended is
kept by `remains`, so that no sum ever falls when a process does. Pure functions over plain data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

import msgspec
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

CUMULATIVE: Final = frozenset({"counter", "histogram", "summary"})
GAUGES: Final[Mapping[str, Callable[[float, float], float]]] = {
    # What each worker has for itself adds up.
    "kvlane_streams_in_flight": float.__add__,
    "kvlane_replica_leases": float.__add__,
    "kvlane_prefix_blocks": float.__add__,
    "kvlane_prefix_holds": float.__add__,
    "kvlane_prefix_index_bytes": float.__add__,
    "process_resident_memory_bytes": float.__add__,
    "process_virtual_memory_bytes": float.__add__,
    "process_open_fds": float.__add__,
    "process_start_time_seconds": min,
}
"""How two workers' gauges become one. Of any other the greater counts: workers see the same replicas, each a little
later or earlier than the others."""

Key = tuple[str, tuple[tuple[str, str], ...]]


class Family(msgspec.Struct, array_like=True):
    """One metric of one process."""

    name: str
    kind: str
    text: str
    samples: dict[Key, float]
    """Values by sample name and labels."""


Families = list[Family]


def snapshot(registry: Collector) -> Families:
    """All figures of a registry now. When they began to be counted is left out: of a sum it says nothing."""
    found = []
    for metric in registry.collect():
        began = f"{metric.name}_created"
        samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): float(sample.value)
            for sample in metric.samples
            if sample.name != began
        }
        found.append(Family(metric.name, metric.type, metric.documentation, samples))
    return found


def merge(snapshots: Iterable[Families]) -> Families:
    """Those of several processes as those of one."""
    merged: dict[str, Family] = {}
    for families in snapshots:
        for family in families:
            there = merged.get(family.name)
            if there is None:
                merged[family.name] = Family(family.name, family.kind, family.text, dict(family.samples))
            else:
                _add(there, family)
    return list(merged.values())


def _add(there: Family, family: Family) -> None:
    both = float.__add__ if family.kind in CUMULATIVE else GAUGES.get(family.name, max)
    for key, value in family.samples.items():
        before = there.samples.get(key)
        there.samples[key] = value if before is None else both(before, value)


def remains(families: Families) -> Families:
    """What stays of a process that ended, or does not answer: what it had counted."""
    return [family for family in families if family.kind in CUMULATIVE]


def exposition(families: Families) -> tuple[bytes, str]:
    """What a scrape gets: the text, and its content type."""
    return generate_latest(_Shown(families)), CONTENT_TYPE_LATEST


class _Shown(Collector):
    def __init__(self, families: Families) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            metric = Metric(family.name, family.text, family.kind)
            metric.samples = [Sample(name, dict(labels), value) for (name, labels), value in family.samples.items()]
            yield metric
