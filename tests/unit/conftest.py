"""Unit tests share processes with those that start engines, which leave loggers with levels of their own."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from router.compiled import VARIABLE, part


@pytest.fixture(autouse=True)
def _levels() -> None:
    """What is logged is as in a new process."""
    logging.getLogger().setLevel(logging.WARNING)
    for name in ("engine", "router"):
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture(scope="module", params=["python", "compiled"])
def block_store(request: pytest.FixtureRequest) -> Iterator[None]:
    """The prefix stage has either of its two block stores."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "python":
            patch.setenv(VARIABLE, "0")
        elif part("router.prefix._blocks") is None:
            pytest.skip("router.prefix._blocks is not compiled, or left out by KVLANE_COMPILED")
        yield
