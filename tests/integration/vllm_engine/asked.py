"""What several parts ask the engine for."""

from __future__ import annotations

from typing import Any

from kvlane.v1 import inference_pb2 as pb

from tests.integration.vllm_fixtures import MODEL

USER = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"sunny": {"type": "boolean"}},
    "required": ["sunny"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "d", "parameters": SCHEMA}}
]
Sampling = pb.SamplingParams


def bad_generate(**sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(model=MODEL, text="Hello", sampling=Sampling(**sampling))
