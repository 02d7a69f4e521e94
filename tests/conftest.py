"""How the tests share the machine: two at a time, but only one of those that start Ray clusters, and one with vLLM.

Those of real processes get a second try, for what the machine does to them besides; how each first one failed is told
in full at the end, and it is to be looked at like a failure. What runs in the test's own process gets none.

`make test-fast` neither imports files of which it runs nothing nor draws as many random examples as `make test`.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import hypothesis
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


FAST = "fast"
"""The profile of `make test-fast`: of each property a tenth of its examples, but `FEW` where it has as many."""
FEW = 10
hypothesis.settings.register_profile(FAST, max_examples=FEW)
OWN_SETTINGS = "_hypothesis_internal_use_settings"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if not item.nodeid.startswith("tests/unit/") or item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.flaky(reruns=1))
    if config.getoption("--hypothesis-profile") == FAST:
        # A number that a test names itself outdoes the profile's.
        for test in {item.function for item in items if isinstance(item, pytest.Function)}:
            own = getattr(test, OWN_SETTINGS, None)
            if own is not None:
                few = min(own.max_examples, max(FEW, own.max_examples // 10))
                setattr(test, OWN_SETTINGS, hypothesis.settings(own, max_examples=few))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A file of which nothing is to run is not imported: Ray, vLLM and their clients take seconds in each process."""
    if collection_path.suffix != ".py" or not collection_path.name.startswith("test_"):
        return None
    return bool(refused(config.getoption("markexpr")) & marks_of(collection_path)) or None


def refused(expression: str) -> frozenset[str]:
    """The marks of which any one suffices to leave a test out: those of "not a and not b", no more is understood."""
    if "(" in expression or " or " in expression:
        return frozenset()
    return frozenset(term.strip()[4:] for term in expression.split(" and ") if term.strip().startswith("not "))


@cache
def marks_of(path: Path) -> frozenset[str]:
    """The marks that a file gives to all its tests."""
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "pytestmark":
            value = statement.value
            marks = value.elts if isinstance(value, ast.List) else [value]
            return frozenset(ast.unparse(mark).removeprefix("pytest.mark.") for mark in marks)
    return frozenset()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    tried_again = terminalreporter.getreports("rerun")
    if tried_again:
        terminalreporter.section("first tries that failed")
        for report in tried_again:
            terminalreporter.write_sep("_", report.nodeid)
            terminalreporter.write_line(report.longreprtext)
