"""How the tests share the machine: two at a time, but only one of those that start engines, clusters and routers."""

from __future__ import annotations

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling


class OneThatStartsThings(LoadScopeScheduling):
    """All but the unit tests run in one process, one after the other."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid if nodeid.startswith("tests/unit/") else "machine"


@pytest.hookimpl(tryfirst=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OneThatStartsThings | None:
    """For `--dist loadscope`."""
    return OneThatStartsThings(config, log) if config.getvalue("dist") == "loadscope" else None
