"""Parts that there are twice, as Python and compiled: a file's tests run on both."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from router import compiled


def built(name: str) -> Any:
    """The compiled part; skips the test where there is none."""
    part = compiled.part(name)
    if part is None:
        pytest.skip(f"{name} is turned off" if os.environ.get(compiled.VARIABLE) == "0" else f"{name} is not compiled")
    return part


def resident_kb() -> int:
    """This process's memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 1024


def twins(*names: str) -> Callable[..., Any]:
    """A fixture that has all tests of a module run on the Python, and then on these compiled parts."""

    @pytest.fixture(scope="module", autouse=True, params=["python", "compiled"])
    def twin(request: pytest.FixtureRequest) -> Iterator[str]:
        kind: str = request.param
        with pytest.MonkeyPatch.context() as patch:
            if kind == "python":
                patch.setenv(compiled.VARIABLE, "0")
            else:
                for name in names:
                    built(name)
            yield kind

    return twin
