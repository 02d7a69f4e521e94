"""A real vLLM engine on the tiny model, started once for all parts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from engine.tiny_model import make_tiny_model
from engine.vllm import VllmEngine
from tests.integration.vllm_fixtures import running_engine


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models"))


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def engine(model: Path) -> AsyncIterator[VllmEngine]:
    async with running_engine(model) as started:
        yield started
