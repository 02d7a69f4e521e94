"""What `kvlane up` and `kvlane deploy` make of an engine with autoscaling."""

from __future__ import annotations

import pytest

from engine import deployment
from router import up
from router.errors import ConfigError
from router.options import AutoscalingOptions, Config, EngineOptions

SCALED = EngineOptions(
    name="scaled", num_cpus=2, replicas=7, autoscaling=AutoscalingOptions(min_replicas=0, max_replicas=3)
)
FIXED = EngineOptions(name="fixed", num_cpus=1, replicas=2)


def test_a_cluster_of_our_own_has_cpus_for_the_most_replicas() -> None:
    assert up._cpus_needed(Config(engines=(SCALED, FIXED))) == 3 * 2 + 2 * 1 + 1


def test_engines_at_zero_are_ready_as_soon_as_serve_runs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {
        "kvlane-scaled": deployment.ApplicationState("RUNNING", 0, ""),
        "kvlane-fixed": deployment.ApplicationState("RUNNING", 2, ""),
    }
    monkeypatch.setattr(deployment, "statuses", lambda: states)
    monkeypatch.setattr(up, "START_TIMEOUT_S", 0.0)
    up._wait_for_engines(Config(engines=(SCALED, FIXED)))
    states["kvlane-fixed"] = deployment.ApplicationState("RUNNING", 1, "")
    with pytest.raises(up.StartFailed, match="1 of 2 replicas"):
        up._wait_for_engines(Config(engines=(SCALED, FIXED)))


def test_a_number_of_replicas_for_an_engine_with_autoscaling_is_refused() -> None:
    with pytest.raises(ConfigError, match="autoscaling"):
        up.with_engine(Config(engines=(SCALED,)), None, None, 2)
    assert up.with_engine(Config(engines=(SCALED,)), None, "org/Model", None).engines[0].autoscaling is not None
    assert up.with_engine(Config(engines=(FIXED,)), None, None, 4).engines[0].replicas == 4
