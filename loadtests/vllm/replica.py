"""A process with one vLLM replica, without Ray: prints its lane as one JSON line, and ends when its input closes."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import uvloop

from engine.replica import Replica
from engine.vllm import VllmEngine
from loadtests.engines import SECRET


async def serve(model: str, name: str, args: dict[str, Any], *, fast: bool) -> None:
    """Runs the replica until standard input closes."""
    replica = Replica("vllm-0", VllmEngine(model, name, args, fast_rendering=fast), SECRET)
    await replica.start()
    port = await replica.listen("127.0.0.1")
    # vLLM writes to standard output too.
    print("\nlane " + json.dumps({"replica": replica.name, "lane": port}), flush=True)
    closed = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), closed.set)
    await closed.wait()
    await replica.close()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), fast=sys.argv[4] == "fast"))
