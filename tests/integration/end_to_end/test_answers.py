"""Answers equal to a bare vLLM's, whole and streamed, right and wrong."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.integration.end_to_end.sending import DEADLINE_S, MESSAGES, SCHEMA, TOOLS
from tests.integration.stack import Stack
from tests.integration.vllm_fixtures import MODEL

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

CHAT: dict[str, dict[str, Any]] = {
    "plain": {},
    "logprobs": {"logprobs": True, "top_logprobs": 3},
    "n2": {"n": 2},
    "n2-sampled": {"n": 2, "temperature": 0.8, "seed": 7},
    "stop": {"stop": ["e"]},
    "tools-offered": {"tools": TOOLS, "tool_choice": "none"},
    "tool-forced": {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "weather"}}},
    "json-schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}},
        "max_tokens": 64,
    },
    "regex": {"structured_outputs": {"regex": "[a-c]{4}"}},
    "choice": {"structured_outputs": {"choice": ["red", "green"]}},
    "bias": {"logit_bias": {"40": 5.0}, "frequency_penalty": 0.5, "presence_penalty": 0.1},
    "too-long": {"messages": [{"role": "user", "content": "word " * 9000}]},
    "bad-temperature": {"temperature": -1},
    "bad-n": {"n": 0},
    "bad-type": {"max_tokens": "many"},
    "bad-role-type": {"messages": "hello"},
    "no-messages": {"messages": []},
}
COMPLETIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "token-ids": {"prompt": [5, 6, 7, 8, 9, 10]},
    "several-prompts": {"prompt": ["one two", "three four five"]},
    "echo": {"echo": True},
    "logprobs": {"logprobs": 2},
    "n2": {"n": 2},
    "empty-prompt": {"prompt": ""},
    "token-out-of-vocabulary": {"prompt": [1, 99999999]},
}
OTHER: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tokenize": ("POST", "/tokenize", {"prompt": "hello world"}),
    "detokenize": ("POST", "/detokenize", {"tokens": [5, 6, 7]}),
    "responses": ("POST", "/v1/responses", {"input": "hello", "max_output_tokens": 8, "temperature": 0}),
    "messages": ("POST", "/v1/messages", {"messages": MESSAGES[1:], "max_tokens": 8, "temperature": 0}),
}


@pytest.mark.parametrize("case", CHAT)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_chat_answers_equal_those_of_a_bare_vllm(servers: tuple[Stack, str], case: str, stream: bool) -> None:
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 12} | CHAT[case]
    compare(servers, "POST", "/v1/chat/completions", body, stream)


@pytest.mark.parametrize("case", COMPLETIONS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_completions_equal_those_of_a_bare_vllm(servers: tuple[Stack, str], case: str, stream: bool) -> None:
    body = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 12} | COMPLETIONS[case]
    compare(servers, "POST", "/v1/completions", body, stream)


@pytest.mark.parametrize("case", OTHER)
def test_other_endpoints_answer_as_a_bare_vllm_does(servers: tuple[Stack, str], case: str) -> None:
    method, path, body = OTHER[case]
    compare(servers, method, path, body, stream=False)


def test_embeddings_of_a_generative_model_fail_with_the_status_of_a_bare_vllm(servers: tuple[Stack, str]) -> None:
    stack, bare = servers
    body = {"model": MODEL, "input": "hello"}
    ours, theirs = (httpx.post(f"{url}/v1/embeddings", json=body, timeout=DEADLINE_S) for url in (stack.http, bare))
    assert (ours.status_code, theirs.status_code) == (404, 404)
    assert ours.json()["error"]["type"] == "NotFoundError"  # a bare vLLM has no such path, and says so in another shape


def compare(servers: tuple[Stack, str], method: str, path: str, body: dict[str, Any], stream: bool) -> None:
    stack, bare = servers
    body = {"model": MODEL} | body
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    ours, theirs = (httpx.request(method, url + path, json=body, timeout=DEADLINE_S) for url in (stack.http, bare))
    assert ours.status_code == theirs.status_code, (ours.text, theirs.text)
    assert ours.headers["content-type"] == theirs.headers["content-type"]
    assert parsed(ours) == parsed(theirs)
    assert ours.headers["x-kvlane-route"].startswith("replica=")


def parsed(response: httpx.Response) -> Any:
    """The answer without what differs between two calls: ids, times, and how many tokens share an event."""
    if not response.headers["content-type"].startswith("text/event-stream"):
        return stable(response.json())
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    events = [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        for choice in event.get("choices", ()):
            merge(choices.setdefault(choice["index"], {}), choice)
    return {
        "choices": choices,
        "shapes": {shape(event) for event in events},
        "others": [stable(event) for event in events if not event.get("choices")],
    }


def merge(whole: dict[str, Any], part: dict[str, Any]) -> None:
    """Joins what a choice's events add up to: texts and lists grow, the rest is the last that was said."""
    for key, value in part.items():
        if isinstance(value, dict):
            if not isinstance(whole.get(key), dict):
                whole[key] = {}
            merge(whole[key], value)
        elif isinstance(value, str | list) and isinstance(whole.get(key), str | list):
            whole[key] = whole[key] + value
        elif value is not None or key not in whole:
            whole[key] = stable(value)


def shape(event: dict[str, Any]) -> str:
    """The fields of an event and its choices, in their order."""
    return json.dumps(
        [list(event), [[list(choice), list(choice.get("delta", ()))] for choice in event.get("choices", ())]]
    )


def stable(value: Any) -> Any:
    if isinstance(value, dict):
        volatile = {"id", "created", "created_at", "completed_at", "request_id", "item_id", "system_fingerprint"}
        return {key: stable(item) for key, item in value.items() if key not in volatile}
    if isinstance(value, list):
        return [stable(item) for item in value]
    return value
