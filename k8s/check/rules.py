"""All rules, and what they know besides the rendering: the documentation's Secrets, metrics and alerts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from k8s.check import alerts, exposure, network, pods, schemas, settings, wiring
from k8s.check.objects import Finding, Object, Objects

_ROOT = Path(__file__).resolve().parents[2]
_GENERIC = re.compile(r"create secret generic (\S+)((?:\s+\\?\s*--from-(?:file|literal)=\S+)+)")
_TLS = re.compile(r"create secret tls (\S+)")
_KEY = re.compile(r"--from-(?:file|literal)=([^\s=]+)")
_METRIC = re.compile(r"`(kvlane_[a-z0-9_]+)")
_ALERT = re.compile(r"^#+ `?(Kvlane\w+)`?$", re.MULTILINE)


class Documented(NamedTuple):
    """What the documentation tells."""

    secrets: frozenset[str]
    """``name/key`` of each that the operator makes."""
    metrics: frozenset[str]
    alerts: frozenset[str]


def documented(operations: str, metrics: str) -> Documented:
    """What docs/operations.md and docs/metrics.md tell, as far as rules need it."""
    secrets = {f"{name}/{key}" for name, files in _GENERIC.findall(operations) for key in _KEY.findall(files)}
    secrets |= {f"{name}/{key}" for name in _TLS.findall(operations) for key in ("tls.crt", "tls.key")}
    return Documented(frozenset(secrets), frozenset(_METRIC.findall(metrics)), frozenset(_ALERT.findall(operations)))


def our_documentation() -> Documented:
    """That of this checkout."""
    return documented((_ROOT / "docs/operations.md").read_text(), (_ROOT / "docs/metrics.md").read_text())


def check(rendered: list[Object], known: Documented) -> list[Finding]:
    """All that is wrong, in the order of the rules. Where schemas refuse something, the other rules do not run."""
    objects = Objects(rendered)
    found = list(schemas.check(objects))
    if not found:
        found += pods.check(objects)
        found += wiring.check(objects, known.secrets)
        found += settings.check(objects)
        found += exposure.check(objects)
        found += network.check(objects)
        found += alerts.check(objects, known.metrics, known.alerts)
    return list(dict.fromkeys(found))
