"""The demo of `kvlane up`: one streamed chat over each protocol, with its route receipt and time to first token."""

from __future__ import annotations

import asyncio
import http.client
import json
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

from kvlane.client import Client, KvlaneCallError
from rich.console import Console

QUESTION = "Say hello to the world."
MAX_TOKENS = 32
TIMEOUT_S = 120.0


class DemoFailed(Exception):
    """A demo answer did not come whole; says why."""


def over_http(console: Console, address: str, model: str) -> None:
    """Streams a chat over the OpenAI-compatible HTTP ingress. Raises `DemoFailed`."""
    console.print(f"\nHTTP  POST /v1/chat/completions  {QUESTION!r}")
    url = urlsplit(address)
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=TIMEOUT_S)
    body = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": MAX_TOKENS,
        "stream": True,
    }
    began = time.monotonic()
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise DemoFailed(f"the HTTP demo got status {response.status}: {response.read().decode()}")
        ttft_s = 0.0
        for text in _deltas(response):
            ttft_s = ttft_s or time.monotonic() - began
            console.out(text, end="", highlight=False)
        _receipt(console, response.getheader("x-kvlane-route", ""), ttft_s)
    except (OSError, http.client.HTTPException) as error:
        raise DemoFailed(f"the HTTP demo failed: {error}") from error
    finally:
        connection.close()


def _deltas(response: http.client.HTTPResponse) -> Iterator[str]:
    for line in response:
        if not line.startswith(b"data: "):
            continue
        if line.strip() == b"data: [DONE]":
            return
        event = json.loads(line[6:])
        if "error" in event:
            raise DemoFailed(f"the HTTP demo's stream broke: {event['error']['message']}")
        for choice in event["choices"]:
            if text := choice["delta"].get("content"):
                yield text
    raise DemoFailed("the HTTP demo's stream ended without [DONE]")


def over_grpc(console: Console, address: str, model: str) -> None:
    """Streams a chat over the gRPC ingress. Raises `DemoFailed`."""
    console.print(f"\ngRPC  kvlane.v1.Inference/Chat  {QUESTION!r}")
    try:
        asyncio.run(_chat(console, address, model))
    except KvlaneCallError as error:
        raise DemoFailed(f"the gRPC demo failed: {error}") from error


async def _chat(console: Console, address: str, model: str) -> None:
    began, ttft_s, receipt = time.monotonic(), 0.0, ""
    async with Client(address) as client:
        messages = [{"role": "user", "content": QUESTION}]
        async for delta in client.chat(model, messages, max_tokens=MAX_TOKENS, timeout_s=TIMEOUT_S):
            if delta.route is not None:
                route = delta.route
                receipt = (
                    f"replica={route.replica};policy={route.policy};reason={route.reason};queue={route.queue_depth}"
                )
            if delta.text:
                ttft_s = ttft_s or time.monotonic() - began
                console.out(delta.text, end="", highlight=False)
    _receipt(console, receipt, ttft_s)


def _receipt(console: Console, route: str, ttft_s: float) -> None:
    words = "  ".join(route.split(";"))
    console.print(f"\n  -> {words}  ttft={ttft_s * 1000:.0f} ms", style="green", soft_wrap=True)
