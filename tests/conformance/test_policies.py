"""What every installed policy owes, built-in or plugin."""

from __future__ import annotations

from typing import Any

import pytest

from router.policies import registry
from router.policies.registry import PolicySpec
from router.testing import check_policy

SETTINGS: dict[str, list[dict[str, Any]]] = {"power-of-two": [{}, {"choices": 3}, {"choices": 100}]}
CASES = [(spec, options) for spec in registry.installed() for options in SETTINGS.get(spec.name, [{}])]


@pytest.mark.parametrize(("spec", "options"), CASES, ids=[f"{spec.name}-{options}" for spec, options in CASES])
def test_an_installed_policy_keeps_the_promises_of_policies(spec: PolicySpec, options: dict[str, Any]) -> None:
    check_policy(spec.policy, options, seeds=range(8))


def test_no_installed_policy_is_broken() -> None:
    assert registry.broken() == []
