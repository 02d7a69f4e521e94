"""Where requests go with four real vLLM replicas behind a real router: what vLLM found cached, and what was expected.

The figures are vLLM's own (`usage.prompt_tokens_details.cached_tokens`). Run with ``-s`` to see them.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine import deployment
from engine.tiny_model import make_tiny_model
from tests.integration.conversations import Answered, Ask, Conversation, Load, Shared, computed_blocks, reachable
from tests.integration.ray_local import DEADLINE_S, NAMESPACE, cluster, wait_until

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

MODEL = "tiny"
REPLICAS = 4
BLOCK_TOKENS = 32
KV_BLOCKS = 512
"""Of each replica: about half of what the load below computes, so that no replica can hold all of it."""
BLOCK_BYTES = 32
"""A token is at least one byte, so a prefix block is never longer than a KV block."""
ENGINE_ARGS: dict[str, Any] = {
    "max_num_seqs": 16,
    "block_size": BLOCK_TOKENS,
    "num_gpu_blocks_override": KV_BLOCKS,
    "enable_prompt_tokens_details": True,
}
START_DEADLINE_S = 400.0
AT_ONCE = 6
"""Requests in flight: more would only queue on the two cores that the four engines share."""
_SAMPLE = re.compile(r"^(\w+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


class Router:
    """A running `kvlane serve`."""

    def __init__(self, url: str) -> None:
        self.url = url

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        text = httpx.get(f"{self.url}/metrics", timeout=DEADLINE_S).text
        return sum(float(value) for found, value in _SAMPLE.findall(text) if found == name)

    def knows_all(self) -> bool:
        """Whether every replica's cache is known exactly."""
        caches = httpx.get(f"{self.url}/readyz", timeout=DEADLINE_S).json()["caches"]
        return len(caches) == REPLICAS and all(cache["mode"] == "exact" for cache in caches.values())

    def predictions(self) -> tuple[int, int]:
        """Requests that replicas compared with what was expected since the lanes opened, and those that were off."""
        return int(self.metric("kvlane_cache_predictions_total")), int(
            self.metric("kvlane_cache_predictions_off_total")
        )


class Fleet:
    """Four replicas under Ray Serve, for any number of routers."""

    def __init__(self, config: Path, log: Path) -> None:
        self._config = config
        self._log = log

    @contextmanager
    def router(self, policy: str) -> Iterator[Router]:
        """A router process of its own that has told what it knows of each replica."""
        command = [*kvlane("serve", "--config", str(self._config), "--policy", policy)]
        command += ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]
        with self._log.open("ab") as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as process:
            try:
                assert process.stdout is not None
                ready = re.match(rb"ready http=(\S+) grpc=(\S+)$", process.stdout.readline())
                assert ready is not None, self._log.read_text()[-3000:]
                router = Router(ready[1].decode())
                wait_until(router.knows_all, "every replica's snapshot is here")
                yield router
                process.send_signal(signal.SIGTERM)
                assert process.wait(DEADLINE_S) == 0
            finally:
                process.kill()


def kvlane(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "router", *arguments]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    directory = tmp_path_factory.mktemp("fleet")
    model = make_tiny_model(directory / "model")
    arguments = "\n".join(f"{name} = {json.dumps(value)}" for name, value in ENGINE_ARGS.items())
    config = directory / "config.toml"
    began = time.monotonic()
    with cluster() as address:
        config.write_text(
            f'[membership]\nray_address = "{address}"\nray_namespace = "{NAMESPACE}"\n'
            f'[prefix]\nblock_bytes = {BLOCK_BYTES}\n[[engines]]\nname = "{MODEL}"\nmodel = "{model}"\n'
            f"replicas = {REPLICAS}\n[engines.args]\n{arguments}\n"
        )
        subprocess.run(kvlane("deploy", "--config", str(config)), check=True, timeout=START_DEADLINE_S)
        print(f"\n{REPLICAS} vLLM replicas are up after {time.monotonic() - began:.0f} s")
        try:
            yield Fleet(config, directory / "router.log")
            assert "Traceback" not in (log := (directory / "router.log").read_text()), log[-5000:]
        finally:
            deployment.undeploy([MODEL])


# -- the loads

CONVERSATIONS, TURNS = 16, 5
PROMPTS, USERS = 8, 8


class Traffic:
    """Conversations, and system prompts with many users: the same at each run with the same seed."""

    def __init__(self, seed: int, conversations: int = CONVERSATIONS, prompts: int = PROMPTS) -> None:
        self._random = random.Random(seed)
        self._conversations = [Conversation(1000 * seed + i, 200, 60, 24) for i in range(conversations)]
        self._shared = [Shared(2000 * seed + i, 400, 12, 8) for i in range(prompts)]

    def rounds(self, turns: int = TURNS, users: int = USERS) -> Iterator[list[Ask]]:
        """In each a turn of each conversation and some of the users, in any order."""
        for round in range(turns):
            asks: list[Ask] = [one.turn for one in self._conversations]
            count = users * (round + 1) // turns - users * round // turns
            asks += [one.question for one in self._shared for _ in range(count)]
            self._random.shuffle(asks)
            yield asks


async def send(router: Router, salt: str, rounds: Iterable[list[Ask]], into: list[Answered]) -> list[Answered]:
    load = Load(router.url, MODEL, salt, AT_ONCE)
    try:
        for asks in rounds:
            await load.run(asks)
    finally:
        await load.close()
    into += load.answered
    return load.answered


def off(answered: Sequence[Answered]) -> list[Answered]:
    """Those whose cached KV blocks were expected wrong by more than one."""
    return [one for one in answered if abs(one.expected // BLOCK_TOKENS - one.cached // BLOCK_TOKENS) > 1]


def tell(what: str, answered: Sequence[Answered]) -> None:
    cached, prompt = sum(one.cached for one in answered), sum(len(one.prompt) for one in answered)
    bound = sum(reachable(answered, BLOCK_TOKENS))
    gaps = Counter(one.cached // BLOCK_TOKENS - one.expected // BLOCK_TOKENS for one in answered)
    print(
        f"{what}: {len(answered)} requests, {prompt} prompt tokens, cached {cached} of {bound} reachable "
        f"({cached / max(bound, 1):.1%}), {len(off(answered))} expected wrong; gaps {sorted(gaps.items())}; "
        f"served {sorted(Counter(one.replica for one in answered).values())}, "
        f"blocks {sorted(computed_blocks(answered, BLOCK_TOKENS).values())}"
    )
