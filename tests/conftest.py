"""How the tests share the machine: two at a time, but only one of those that start Ray clusters, and one with vLLM.

Those of real processes get a second try, for what the machine does to them besides; how each first one failed is told
in full at the end, and it is to be looked at like a failure. What runs in the test's own process gets none.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling


class OneOfEach(LoadScopeScheduling):
    """Files with Ray run in one process, one after the other, and so do those with vLLM alone; of the rest, the unit
    tests share no process. Hosts have their own Ray, network and /tmp, and are in nobody's way."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        if nodeid.startswith("tests/unit/"):
            return nodeid
        return path if nodeid.startswith("tests/hosts/") else _starts(path) or path


@cache
def _starts(path: str) -> str:
    """What a file's marks say that it starts, in one word."""
    text = (Path(__file__).parents[1] / path).read_text()
    return next((kind for kind in ("ray", "vllm") if f"pytest.mark.{kind}" in text), "")


@pytest.hookimpl(tryfirst=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OneOfEach | None:
    """For `--dist loadscope`."""
    return OneOfEach(config, log) if config.getvalue("dist") == "loadscope" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.nodeid.startswith("tests/unit/") or item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.flaky(reruns=1))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    tried_again = terminalreporter.getreports("rerun")
    if tried_again:
        terminalreporter.section("first tries that failed")
        for report in tried_again:
            terminalreporter.write_sep("_", report.nodeid)
            terminalreporter.write_line(report.longreprtext)
