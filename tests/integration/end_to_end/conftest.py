"""The servers that all parts share: kvlane over two vLLM replicas, and a bare vLLM beside it; started once."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import openai
import pytest

from engine.tiny_model import make_tiny_model
from tests.integration.bare_vllm import bare_vllm_server
from tests.integration.end_to_end.sending import DEADLINE_S
from tests.integration.stack import Stack, kvlane_up
from tests.integration.vllm_fixtures import ENGINE_ARGS, MODEL


@pytest.fixture(scope="package")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, str]]:
    """kvlane over two vLLM replicas, and a bare vLLM with the same model and arguments; they start side by side."""
    directory = tmp_path_factory.mktemp("servers")
    model = make_tiny_model(directory / "model")
    arguments = "\n".join(f"{name} = {json.dumps(value)}" for name, value in ENGINE_ARGS.items())
    config = directory / "config.toml"
    config.write_text(
        f'[membership]\nray_address = "local"\n[[engines]]\nname = "{MODEL}"\nmodel = "{model}"\nreplicas = 2\n'
        f"health_check_period_s = 1.0\n[engines.args]\n{arguments}\n"
    )
    address: list[str] = []
    over = threading.Event()
    up = threading.Event()

    def bare() -> None:
        try:
            with bare_vllm_server(model, MODEL, ENGINE_ARGS, directory / "bare.log") as url:
                address.append(url)
                up.set()
                over.wait()
        finally:
            up.set()

    thread = threading.Thread(target=bare)
    thread.start()
    try:
        with kvlane_up(directory / "kvlane.log", "--config", str(config)) as stack:
            up.wait()
            assert address, (directory / "bare.log").read_text()[-3000:]
            yield stack, address[0]
            assert stack.stop() == 0
            log = stack.log()
            assert "Traceback" not in log, log[-5000:]
    finally:
        over.set()
        thread.join()


@pytest.fixture
def stack(servers: tuple[Stack, str]) -> Stack:
    return servers[0]


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.http}/v1", api_key="none", max_retries=0, timeout=DEADLINE_S) as client:
        yield client
