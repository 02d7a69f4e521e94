"""`python -m loadtests.request_cost`, in a process of its own, for it sets up the garbage collector."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "more", [[], pytest.param(["--cold", "--gc", "default", "--replicas", "64"], marks=pytest.mark.slow)]
)
def test_what_a_request_costs_is_told(more: list[str]) -> None:
    command = [sys.executable, "-m", "loadtests.request_cost", "--requests", "320", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    head, _, row = (line.strip("| ").split(" | ") for line in done.stdout.splitlines())
    told = dict(zip(head, row, strict=True))
    assert told["replicas"] == ("64" if more else "4")
    assert 20 < int(told["CPU per request, µs"]) < 20_000
    assert (float(told["collections per 1,000"]) > 0) is bool(more)
