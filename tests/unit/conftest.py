"""Unit tests share processes with those that start engines, which leave loggers with levels of their own."""

from __future__ import annotations

import logging

import pytest


@pytest.fixture(autouse=True)
def _levels() -> None:
    """What is logged is as in a new process."""
    logging.getLogger().setLevel(logging.WARNING)
    for name in ("engine", "router"):
        logging.getLogger(name).setLevel(logging.NOTSET)
