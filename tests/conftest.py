"""How the tests share the machine: two at a time, but only one of those that start engines and clusters.

Those of real processes get a second try, for what the machine does to them besides; how each first one failed is told
in full at the end, and it is to be looked at like a failure. What runs in the test's own process gets none.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

HEAVY = ("pytest.mark.ray", "pytest.mark.vllm")
"""Marks of files that start a Ray cluster or vLLM."""


class OneThatStartsEngines(LoadScopeScheduling):
    """Files with Ray or vLLM run in one process, one after the other; of the rest, the unit tests share no process."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        if nodeid.startswith("tests/unit/"):
            return nodeid
        return "engines" if _is_heavy(path) else path


@cache
def _is_heavy(path: str) -> bool:
    text = (Path(__file__).parents[1] / path).read_text()
    return any(mark in text for mark in HEAVY)


@pytest.hookimpl(tryfirst=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OneThatStartsEngines | None:
    """For `--dist loadscope`."""
    return OneThatStartsEngines(config, log) if config.getvalue("dist") == "loadscope" else None


REAL_PROCESSES = ("tests/integration/", "tests/hosts/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(REAL_PROCESSES):
            item.add_marker(pytest.mark.flaky(reruns=1))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    tried_again = terminalreporter.getreports("rerun")
    if tried_again:
        terminalreporter.section("first tries that failed")
        for report in tried_again:
            terminalreporter.write_sep("_", report.nodeid)
            terminalreporter.write_line(report.longreprtext)
