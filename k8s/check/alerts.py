"""Rules on alerts: their metrics exist, and somebody who is woken finds what to do."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from k8s.check.objects import Finding, Objects, dig

_METRIC = re.compile(r"\bkvlane_[a-z0-9_]+")
_SUFFIX = re.compile(r"_(bucket|sum|count)$")
_SCALER = re.compile(r"^(?:prometheus\.googleapis\.com\|)?(kvlane_[a-z0-9_]+)(?:\|(gauge|counter))?$")
SEVERITIES = ("page", "ticket")


def check(objects: Objects, metrics: Collection[str], runbooks: Collection[str]) -> Iterator[Finding]:
    """`metrics` are those that the router has, `runbooks` the alerts that docs/operations.md tells about."""
    seen = set[str]()
    for rules in objects.of("Rules"):
        for at, group in enumerate(rules.at("spec.groups") or ()):
            for place, rule in enumerate(group["rules"]):
                field, expr = f"spec.groups.{at}.rules.{place}", str(rule.get("expr"))
                for name in sorted({_SUFFIX.sub("", name) for name in _METRIC.findall(expr)} - set(metrics)):
                    yield rules.finding(f"{field}.expr", f"there is no metric {name} in docs/metrics.md")
                if any(expr.count(left) != expr.count(right) for left, right in ("()", "{}", "[]")):
                    yield rules.finding(f"{field}.expr", "brackets do not match")
                alert = rule.get("alert")
                if not alert:
                    continue
                if alert in seen:
                    yield rules.finding(f"{field}.alert", f"there is another alert {alert}")
                seen.add(alert)
                if alert not in runbooks:
                    yield rules.finding(f"{field}.alert", f"docs/operations.md does not say what to do about {alert}")
                if dig(rule, "labels.severity") not in SEVERITIES:
                    yield rules.finding(f"{field}.labels.severity", f"must be one of {', '.join(SEVERITIES)}")
                if not dig(rule, "annotations.summary"):
                    yield rules.finding(f"{field}.annotations.summary", "missing")
    yield from _scalers(objects, metrics)


def _scalers(objects: Objects, metrics: Collection[str]) -> Iterator[Finding]:
    for scaler in objects.of("HorizontalPodAutoscaler"):
        for at, metric in enumerate(scaler.at("spec.metrics") or ()):
            name = dig(metric, "pods.metric.name")
            match = _SCALER.match(str(name))
            if name and (match is None or match[1] not in metrics):
                yield scaler.finding(
                    f"spec.metrics.{at}.pods.metric.name", f"there is no metric {name} in docs/metrics.md"
                )
