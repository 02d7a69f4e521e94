"""What every installed policy and scorer owes, built-in or plugin."""

from __future__ import annotations

from typing import Any

import pytest

from router.policies import registry
from router.policies.registry import Spec
from router.testing import check_policy, check_scorer

pytestmark = pytest.mark.slow

EVERY_SCORER = {spec.name: 1.0 for spec in registry.scorers.installed()}
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "power-of-two": [{}, {"choices": 3}, {"choices": 100}],
    "session": [{}, {"max_lead": 0, "load_factor": 1}],
    "prefix-hash": [{}, {"blocks": 1}, {"blocks": 1000, "max_lead": 0, "load_factor": 1}],
    "prefix-affinity": [{}, {"min_share": 0}, {"min_share": 1, "max_lead": 0, "load_factor": 1}],
    "lora-affinity": [{}, {"slots": 1, "max_lead": 0, "load_factor": 1}],
    "weighted": [{}, {"scorers": {"queue": 1}}, {"scorers": EVERY_SCORER, "scorer_options": {"queue": {"lead": 1}}}],
}
POLICIES = [(spec, options) for spec in registry.installed() for options in SETTINGS.get(spec.name, [{}])]
SCORERS = registry.scorers.installed()


@pytest.mark.parametrize(("spec", "options"), POLICIES, ids=[f"{spec.name}-{options}" for spec, options in POLICIES])
def test_an_installed_policy_keeps_the_promises_of_policies(spec: Spec, options: dict[str, Any]) -> None:
    check_policy(spec.plugin, options, seeds=range(4))


@pytest.mark.parametrize("spec", SCORERS, ids=[spec.name for spec in SCORERS])
def test_an_installed_scorer_keeps_the_promises_of_scorers(spec: Spec) -> None:
    check_scorer(spec.plugin, seeds=range(4))


def test_nothing_that_is_installed_is_broken() -> None:
    assert registry.policies.broken() == []
    assert registry.scorers.broken() == []
