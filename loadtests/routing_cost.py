"""What routing costs the router's event loop: hashing a prompt, and the whole decision.

`python -m loadtests.routing_cost [--part hashing,hostile,decision] [--json FILE]`. *Hashing* takes requests of every
kind from their bytes to their chains, for several sizes of a prefix block. *Hostile* does so with bodies of 20 MB that
are made to keep the router busy. *Decision* is `loadtests.decision`: the router's own dispatch with 64 replicas and a
million indexed blocks. Times are of the thread's CPU, so that other processes disturb least; those of hashing are
medians over runs of several calls each, of several rounds over all requests the one that was disturbed least, and those
of hostile bodies the longest of five calls.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from kvlane.v1 import inference_pb2 as pb

from loadtests import decision
from router.prefix.canonical import MAX_PROMPT_BYTES, Canonical, canonical
from router.prefix.hashing import Hasher, chain_of
from router.types import Request, Rpc

MODEL = "m"
CALLS = 20
RUNS = 12
HOSTILE_BYTES = 20_000_000
TARGETS_US = {"chat, 8 KB": 15, "chat, 200 KB": 250}


class HashingRow(msgspec.Struct):
    """One request with one size of a prefix block; microseconds."""

    request: str
    body_bytes: int
    block_bytes: int
    blocks: int
    read_us: float
    """From the body to its canonical bytes."""
    hash_us: float
    """From there to the chain."""
    chain_us: float
    """Both, as the router does it: of plain chats, where that is built, by compiled code instead of those two."""


class HostileRow(msgspec.Struct):
    """One body that is made to keep the router busy."""

    body: str
    body_bytes: int
    chain_ms: float
    blocks: int


class DecisionRow(msgspec.Struct):
    """Whole decisions under one policy; microseconds, medians over rounds."""

    policy: str
    replicas: int
    blocks: int
    p50_us: float
    p90_us: float
    p99_us: float


class Prose:
    """Text with the words, lines and quotes of ordinary prompts."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        letters = "etaoinshrdlucmfwypvbgkqjxz"
        self._words = ["".join(self._random.choices(letters, k=self._random.randint(2, 9))) for _ in range(3000)]

    def text(self, length: int) -> str:
        made: list[str] = []
        size = 0
        while size < length:
            word = self._random.choice(self._words)
            made.append(word + self._random.choices([" ", ", ", ".\n", ' "', "\n\n"], [85, 8, 4, 2, 1])[0])
            size += len(made[-1])
        return "".join(made)[:length]


def chat(prose: Prose, total: int, turns: int) -> dict[str, Any]:
    """A conversation of `turns` messages behind a system prompt of a fifth of the text."""
    system = total // 5
    messages = [{"role": "system", "content": prose.text(system)}]
    for turn in range(turns):
        role = "user" if turn % 2 == 0 else "assistant"
        messages.append({"role": role, "content": prose.text((total - system) // turns)})
    return {"model": MODEL, "messages": messages, "stream": True, "temperature": 0.7}


def agent(prose: Prose, total: int, turns: int) -> dict[str, Any]:
    """The same with tools, calls of them and their results."""
    body = chat(prose, total, turns)
    for number, message in enumerate(body["messages"]):
        if number % 4 == 2:
            arguments = json.dumps({"path": "src/main.py", "query": prose.text(60)})
            call = {"id": f"call_{number}", "type": "function", "function": {"name": "read", "arguments": arguments}}
            message["tool_calls"] = [call]
        elif number and number % 4 == 3:
            message |= {"role": "tool", "tool_call_id": f"call_{number - 1}"}
    schema = {"type": "object", "properties": {f"p{i}": {"type": "string", "description": "x"} for i in range(8)}}
    function = {"name": "read", "description": prose.text(300), "parameters": schema}
    body["tools"] = [{"type": "function", "function": function | {"name": f"tool{i}"}} for i in range(12)]
    return body


def requests() -> dict[str, Request]:
    """One of each kind, by what it is."""
    prose = Prose(0)
    tokens = random.Random(0).choices(range(128_000), k=2_000)
    responses = chat(prose, 8192, 5)
    responses["input"] = responses.pop("messages")
    anthropic = chat(prose, 8192, 5)
    anthropic["system"] = anthropic["messages"].pop(0)["content"]
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "iVBORw0K" * 64_000}}
    pictured = chat(prose, 8192, 5)
    pictured["messages"][-1]["content"] = [{"type": "text", "text": prose.text(500)}, picture]
    return {
        "chat, 4 KB": _http("/v1/chat/completions", chat(prose, 4096, 3)),
        "chat, 8 KB": _http("/v1/chat/completions", chat(prose, 8192, 5)),
        "chat, 8 KB, escaped by the client": _http(
            "/v1/chat/completions", chat(_Accented(0), 8192, 5), ascii_only=True
        ),
        "chat, 200 KB": _http("/v1/chat/completions", chat(prose, 204_800, 30)),
        "chat with tools, 200 KB": _http("/v1/chat/completions", agent(prose, 204_800, 60)),
        "chat with a picture of 512 KB": _http("/v1/chat/completions", pictured),
        "completion, 8 KB": _http("/v1/completions", {"model": MODEL, "prompt": prose.text(8192)}),
        "completion, 2,000 token ids": _http("/v1/completions", {"model": MODEL, "prompt": tokens}),
        "responses, 8 KB": _http("/v1/responses", responses),
        "messages, 8 KB": _http("/v1/messages", anthropic),
        "embedding, 2 KB": _http("/v1/embeddings", {"model": MODEL, "input": prose.text(2048)}),
        "gRPC chat, 8 KB": _grpc_chat(chat(prose, 8192, 5)),
        "gRPC chat, 200 KB": _grpc_chat(chat(prose, 204_800, 30)),
    }


class _Accented(Prose):
    def text(self, length: int) -> str:
        return super().text(length).replace("e", "é")


def _http(path: str, body: dict[str, Any], *, ascii_only: bool = False) -> Request:
    encoded = json.dumps(body, ensure_ascii=ascii_only).encode()
    return Request("r", MODEL, Rpc.HTTP, path, encoded)


def _grpc_chat(body: dict[str, Any]) -> Request:
    message = pb.ChatRequest(model=MODEL, messages=[pb.ChatMessage(**turn) for turn in body["messages"]])
    return Request("r", MODEL, Rpc.GRPC, "/kvlane.v1.Inference/Chat", message.SerializeToString())


def hostile() -> dict[str, bytes]:
    """Bodies of `HOSTILE_BYTES`, by what fills them."""

    def filled(before: bytes, unit: bytes, after: bytes) -> bytes:
        return b'{"model":"m",' + before + unit * ((HOSTILE_BYTES - len(before)) // len(unit)) + after

    open_text = b'"messages":[{"role":"user","content":"'
    return {
        "one text": filled(open_text, b"a", b'"}]}'),
        "a text of escapes": filled(open_text, b"\\u00e9", b'"}]}'),
        "a text of quotes": filled(open_text, b'\\"', b'"}]}'),
        "lists in the messages": filled(b'"messages":[', b"[],", b"[]]}"),
        "nested lists in the messages": filled(b'"messages":', b"[", b""),
        "empty messages": filled(b'"messages":[', b"{},", b"{}]}"),
        "messages without content": filled(b'"messages":[', b'{"role":""},', b'{"role":""}]}'),
        "parts without content": filled(b'"messages":[{"role":"","content":[', b'{"type":"text"},', b'""]}]}'),
        "parts of an empty text": filled(b'"messages":[{"role":"","content":[', b'"",', b'""]}]}'),
        "lists in the tools": filled(b'"tools":[', b"[],", b"[]]}"),
        "token ids": filled(b'"prompt":[', b"1,", b"1]}"),
        "prompts": filled(b'"prompt":[', b'"",', b'""]}'),
        "an image": filled(b'"messages":[{"role":"","content":[{"type":"image_url","image_url":"', b"QUJD", b'"}]}]}'),
        "text like an image": filled(open_text, b"QUJD", b'"}]}'),
    }


def measure_hashing(block_sizes: list[int], rounds: int) -> list[HashingRow]:
    """A row per request and block size: of several rounds the one that was disturbed least."""
    best: dict[tuple[str, int], HashingRow] = {}
    asked = requests()
    for _ in range(rounds):
        for what, request in asked.items():
            for size in block_sizes:
                row = _hashing(what, request, size)
                if (what, size) not in best or row.chain_us < best[what, size].chain_us:
                    best[what, size] = row
    return list(best.values())


def _hashing(what: str, request: Request, block_bytes: int) -> HashingRow:
    hasher = Hasher(block_bytes, MAX_PROMPT_BYTES)
    memo: dict[bytes, bytes] = {}

    def read() -> Canonical | None:
        return canonical(request.rpc, request.path, request.body, model=request.model, memo=memo)

    prompt, chain = read(), hasher.chain(request)
    assert prompt is not None
    assert chain is not None
    read_us, hash_us, chain_us = (
        _times(call)
        for call in (read, partial(chain_of, prompt, block_bytes, MAX_PROMPT_BYTES), partial(hasher.chain, request))
    )
    medians = [round(statistics.median(each), 1) for each in (read_us, hash_us, chain_us)]
    return HashingRow(
        request=what,
        body_bytes=len(request.body),
        block_bytes=block_bytes,
        blocks=len(chain.blocks),
        read_us=medians[0],
        hash_us=medians[1],
        chain_us=medians[2],
    )


def _times(call: Callable[[], object]) -> list[float]:
    """Microseconds per call, of each run."""
    took = []
    for _ in range(RUNS):
        began = time.thread_time()
        for _ in range(CALLS):
            call()
        took.append((time.thread_time() - began) / CALLS * 1e6)
    return took


def measure_hostile(block_bytes: int) -> list[HostileRow]:
    rows = []
    for what, body in hostile().items():
        path = "/v1/completions" if b'"prompt"' in body[:64] else "/v1/chat/completions"
        request = Request("r", MODEL, Rpc.HTTP, path, body)
        took = []
        for _ in range(5):
            began = time.thread_time()
            chain = Hasher(block_bytes, MAX_PROMPT_BYTES).chain(request)
            took.append((time.thread_time() - began) * 1e3)
        rows.append(HostileRow(what, len(body), round(max(took), 2), len(chain.blocks) if chain else 0))
    return rows


def measure_decision(policies: str, replicas: int, blocks: int) -> list[DecisionRow]:
    setup = decision.Setup(policies=policies, replicas=replicas, blocks=blocks)
    rows = []
    for policy, rounds in asyncio.run(decision.measure(setup)).items():
        usual = decision.medians(rounds)
        rows.append(DecisionRow(policy, replicas, blocks, usual.p50_us, usual.p90_us, usual.p99_us))
    return rows


def markdown(rows: list[Any]) -> str:
    """A table of rows of one kind."""
    fields = rows[0].__struct_fields__
    lines = ["| " + " | ".join(fields) + " |", "|---" * len(fields) + "|"]
    lines += ["| " + " | ".join(str(getattr(row, field)) for field in fields) + " |" for row in rows]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.routing_cost", description=__doc__)
    parser.add_argument("--part", default="hashing,hostile,decision", help="what to measure, by commas")
    parser.add_argument("--block-bytes", default="128,256,512", help="sizes of a prefix block, by commas")
    parser.add_argument(
        "--rounds", type=int, default=20, help=f"rounds over all requests, of {RUNS} runs of {CALLS} calls"
    )
    parser.add_argument("--policies", default="cost,power-of-two")
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=1_000_000, help="prefix blocks in the index")
    parser.add_argument("--json", metavar="FILE", help="write the rows here as well")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.block_bytes.split(",")]
    parts: dict[str, Callable[[], list[Any]]] = {
        "hashing": lambda: measure_hashing(sizes, arguments.rounds),
        "hostile": lambda: measure_hostile(256),
        "decision": lambda: measure_decision(arguments.policies, arguments.replicas, arguments.blocks),
    }
    results = {part: parts[part]() for part in arguments.part.split(",")}
    for part, rows in results.items():
        print(f"\n{part}\n\n{markdown(rows)}")
    for row in results.get("hashing", []):
        if row.request in TARGETS_US and row.block_bytes == 256:
            print(f"\n{row.request}: {row.chain_us} µs, to be at most {TARGETS_US[row.request]} µs")
    if arguments.json:
        Path(arguments.json).write_bytes(msgspec.json.format(msgspec.json.encode(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
