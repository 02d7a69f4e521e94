"""Clients that ask for a completion over either protocol and tell how it ended: for tests that take replicas away."""

from __future__ import annotations

import json
import os

import grpc
import httpx
from kvlane.client import Client, KvlaneCallError

WHOLE = "whole"
ERROR_EVENT = "error event"
"""An HTTP stream that had begun ended with an event that says what went wrong."""
CUT = "cut"
"""A gRPC stream that had begun ended with the status UNAVAILABLE."""


async def ask(client: httpx.AsyncClient, url: str, model: str, tokens: int, *, stream: bool) -> tuple[str, str]:
    """One completion over HTTP; returns the replica it came from and how it ended."""
    body = {"model": model, "prompt": os.urandom(8).hex(), "max_tokens": tokens, "stream": stream, "ignore_eos": True}
    if stream:
        body["stream_options"] = {"include_usage": True}
    try:
        response = await client.post(f"{url}/v1/completions", json=body)
    except httpx.HTTPError as error:
        return "", type(error).__name__
    route = response.headers.get("x-kvlane-route", "").partition(";")[0]
    return route.removeprefix("replica="), _outcome(response, tokens, stream=stream)


def _outcome(response: httpx.Response, tokens: int, *, stream: bool) -> str:
    if response.status_code != 200:
        return str(response.status_code)
    if not stream:
        return WHOLE if response.json()["usage"]["completion_tokens"] == tokens else "short"
    events = response.text.split("\n\n")
    broken = [i for i, event in enumerate(events) if event.startswith('data: {"error"')]
    if broken:
        told = broken[0] > 0 and json.loads(events[broken[0]][6:])["error"]["message"]
        return ERROR_EVENT if told else f"an error event where a status was due: {response.text!r}"
    if events[-2:] != ["data: [DONE]", ""]:
        return f"ended without a word: {response.text[-200:]!r}"
    return WHOLE if json.loads(events[-3][6:])["usage"]["completion_tokens"] == tokens else "short"


async def ask_grpc(client: Client, model: str, tokens: int) -> tuple[str, str]:
    """The same as a gRPC stream."""
    replica, seen = "", 0
    try:
        async for delta in client.generate(model, os.urandom(8).hex(), max_tokens=tokens, ignore_eos=True):
            replica = delta.route.replica if delta.route is not None else replica
            seen += len(delta.token_ids)
    except KvlaneCallError as error:
        return replica, CUT if seen and error.status is grpc.StatusCode.UNAVAILABLE else str(error)
    return replica, WHOLE if seen == tokens else "short"
