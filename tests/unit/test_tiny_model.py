"""The tiny model that is made on the spot."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from engine.tiny_model import CONTEXT_TOKENS, VERSION, make_tiny_model

pytestmark = [pytest.mark.slow]  # transformers takes seconds to import.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def test_the_folder_names_the_version_and_holds_all_that_an_engine_reads(model: Path) -> None:
    assert model.name.endswith(f"-{VERSION}")
    names = {path.name for path in model.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names


def test_everybody_may_read_the_folder(model: Path) -> None:
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o644 for path in model.iterdir())


def test_a_second_call_leaves_the_folder_as_it_is(model: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in model.iterdir()}
    assert make_tiny_model(model.parent) == model
    assert {path: path.stat().st_mtime_ns for path in model.iterdir()} == before


def test_nothing_but_the_model_is_left_beside_it(model: Path) -> None:
    assert os.listdir(model.parent) == [model.name]


def test_two_copies_hold_the_same_bytes(model: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path)
    assert {path.name: path.read_bytes() for path in other.iterdir()} == {
        path.name: path.read_bytes() for path in model.iterdir()
    }


def test_whoever_finishes_second_takes_the_first_ones_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine import tiny_model

    def write_while_another_finishes(draft: Path) -> None:
        (draft / "config.json").write_text("late")
        first = tmp_path / model.name
        first.mkdir()
        (first / "config.json").write_text("first")

    monkeypatch.setattr(tiny_model, "_write", write_while_another_finishes)
    assert (make_tiny_model(tmp_path) / "config.json").read_text() == "first"
    assert os.listdir(tmp_path) == [model.name]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine import tiny_model

    def fail(draft: Path) -> None:
        (draft / "config.json").write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(tiny_model, "_write", fail)
    with pytest.raises(OSError, match="disk full"):
        make_tiny_model(tmp_path)
    assert os.listdir(tmp_path) == []


def test_the_weights_are_float32_and_the_context_is_long_enough(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert config["max_position_embeddings"] == CONTEXT_TOKENS >= 2048
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (2, 128, 512)


@pytest.mark.parametrize("text", ["Hello there", "é, 漢 and 🙂", "\x00\x01 tab\t and\nlines"])
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def render(tokenizer: Any, messages: list[dict[str, Any]], **more: Any) -> str:
    rendered: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **more)
    return rendered


def test_the_chat_template_renders_system_and_user(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert render(tokenizer, messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_chat_template_renders_tools_calls_and_results(tokenizer: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Berlin"}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    rendered = render(tokenizer, messages, tools=[{"type": "function", "function": {"name": "weather"}}])
    assert rendered == (
        '<|im_start|>system\n\nTools:\n{"name": "weather"}\n<|im_end|>\n'
        "<|im_start|>user\nhi<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>{"name": "weather", "arguments": {"city": "Berlin"}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\nsunny<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
