"""What several parts send, over the client or byte by byte, and how long they wait for what follows."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable

from tests.integration.stack import Stack
from tests.integration.vllm_fixtures import ENGINE_ARGS, MODEL

DEADLINE_S = 60.0
LONG = 3900
"""Tokens that nearly fill the model's context; alone on the machine they take 10 s and more."""
ABORT_DEADLINE_S = 4.0
"""For the end of what a client has left: far less than it takes to generate `LONG` tokens, so a lost abort shows."""
PLACES = 2 * ENGINE_ARGS["max_num_seqs"]
"""How many requests the two engines run at a time; more of them wait and have no token."""

MESSAGES = [{"role": "system", "content": "You are terse."}, {"role": "user", "content": "Tell me a story."}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather somewhere.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 5}},
                "required": ["city"],
            },
        },
    }
]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}


def eventually(
    condition: Callable[[], bool], deadline_s: float = DEADLINE_S, told: Callable[[], object] = lambda: ""
) -> float:
    """Waits until it holds; returns for how many seconds. `told` is what there was instead."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < deadline_s, told()
        time.sleep(0.002)
    return time.monotonic() - began


def long_body(stream: bool, tokens: int = LONG) -> bytes:
    body = {"model": MODEL, "prompt": "Once", "max_tokens": tokens, "ignore_eos": True, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    return json.dumps(body).encode()


def post_raw(stack: Stack, body: bytes) -> socket.socket:
    host, _, port = stack.http.removeprefix("http://").rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=DEADLINE_S)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + body)
    return connection
