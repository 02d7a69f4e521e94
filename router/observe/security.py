"""Metrics of who is let in: API keys, TLS handshakes, certificates, and files that are read again when they change.

Rule: what a client showed is no label, only its tenant's name from the keys file; beyond so many tenants they are one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

MAX_TENANTS: Final = 200
OTHERS: Final = "(others)"


class SecurityMetrics(Collector):
    """Those of one router process."""

    def __init__(self, registry: CollectorRegistry, wall: Callable[[], float] = time.time) -> None:
        """`wall` is in seconds since 1970."""
        self._wall = wall
        self._asked: Mapping[str, int] = {}
        self._expiries: dict[str, Callable[[], float]] = {}
        self._keys = Counter(
            "kvlane_auth_refused", "Requests refused for their API key.", ["ingress", "reason"], registry=registry
        )
        self._handshakes = Counter(
            "kvlane_tls_handshakes_refused", "TLS handshakes refused.", ["ingress", "reason"], registry=registry
        )
        self._reads = Counter(
            "kvlane_file_reloads", "Files read again because they changed.", ["what", "outcome"], registry=registry
        )
        registry.register(self)

    def key_refused(self, ingress: str, reason: str) -> None:
        """A request was refused for its API key."""
        self._keys.labels(ingress, reason).inc()

    def handshake_refused(self, ingress: str, reason: str) -> None:
        """A TLS handshake failed."""
        self._handshakes.labels(ingress, reason).inc()

    def read_again(self, what: str, outcome: str) -> None:
        """Files changed and were read: ``ok`` or ``failed``."""
        self._reads.labels(what, outcome).inc()

    def watch_tenants(self, asked: Mapping[str, int]) -> None:
        """Shows at each scrape how many requests of each tenant were let in."""
        self._asked = asked

    def watch_certificate(self, ingress: str, expires_at: Callable[[], float]) -> None:
        """Shows at each scrape how long the certificate is still good; that is told in seconds since 1970."""
        self._expiries[ingress] = expires_at

    def collect(self) -> Iterator[Metric]:
        tenants = CounterMetricFamily("kvlane_tenant_requests", "Requests let in by API key.", labels=["tenant"])
        shown = list(self._asked.items())
        for tenant, asked in shown[:MAX_TENANTS]:
            tenants.add_metric([tenant], asked)
        if len(shown) > MAX_TENANTS:
            tenants.add_metric([OTHERS], sum(asked for _, asked in shown[MAX_TENANTS:]))
        yield tenants
        expiry = GaugeMetricFamily(
            "kvlane_tls_certificate_expiry_seconds", "Until the certificate expires.", labels=["ingress"]
        )
        for ingress, expires_at in self._expiries.items():
            expiry.add_metric([ingress], expires_at() - self._wall())
        yield expiry
