"""How the tests share the machine: two at a time, but only one of those that start engines, clusters and routers."""

from __future__ import annotations

from pathlib import Path

import pytest

UNIT = Path(__file__).parent / "unit"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts all but the unit tests into one group, which pytest-xdist runs in one process, in order."""
    for item in items:
        if not item.path.is_relative_to(UNIT):
            item.add_marker(pytest.mark.xdist_group("machine"))
