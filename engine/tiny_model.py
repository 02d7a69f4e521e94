"""Makes a tiny Llama with random weights on the spot, so that a real engine runs without any download.

Its words are noise. Rule: the same version string means the same bytes of weights and vocabulary, so that replicas that
make their own copy answer alike.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

VERSION: Final = "1"
CONTEXT_TOKENS: Final = 4096
"""Longest prompt plus answer, in tokens."""

_SEED: Final = 20_260
_VOCABULARY: Final = 512
_HIDDEN: Final = 128
_SPECIAL: Final = ("<|pad|>", "<|im_start|>", "<|im_end|>")

# Enough English for the 250 merges that 512 tokens leave beside the bytes.
_TEXT: Final = (
    "The old harbour town wakes before the sun. Boats come back with their nets full, and the people on the quay call "
    "out the prices of the morning. A baker opens his window; the smell of bread goes down the street and around the "
    "corner, where the children wait for the school to open. There is a question that every visitor asks: why does the "
    "lighthouse stand on the wrong side of the bay? The answer is older than the town itself.",
    "A router sends each request to the server that will answer it first. To know which one that is, it must know what "
    "every server is doing right now: how many requests are running, how many are waiting, and what each of them still "
    "remembers of the words that came before. When two servers are equal, it does not matter which one is chosen, so "
    "long as it is not always the same one.",
    "What is the capital of France? Paris is the capital of France. How far is the moon from the earth? It is about "
    "three hundred and eighty thousand kilometres away. Please write a short story about a cat, and tell me the "
    "weather in Berlin today. You are a helpful assistant. Answer with one word: yes or no.",
    "First, measure. Then change one thing, and measure again. If nothing became better, put it back as it was. Most "
    "of the work of making something fast is finding out where the time is going, and that is seldom where you thought "
    "it would be. The numbers 0, 1, 2, 3, 4, 5, 6, 7, 8 and 9 make all the others.",
    '{"name": "get_weather", "arguments": {"city": "Berlin", "unit": "celsius"}, "type": "function", "value": true}',
)

_CHAT_TEMPLATE: Final = """\
{%- set has_system = messages and messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] if has_system else '' -%}
{%- if system or tools -%}
{{ '<|im_start|>system\\n' + system }}
{%- if tools -%}
{{ '\\nTools:\\n' }}
{%- for tool in tools -%}{{ tool['function'] | tojson }}{{ '\\n' }}{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endif -%}
{%- for message in (messages[1:] if has_system else messages) -%}
{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') }}
{%- for call in message['tool_calls'] or [] -%}
{{ '<tool_call>' }}{{ {'name': call['function']['name'], 'arguments': call['function']['arguments']} | tojson }}
{{- '</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' + (prefill | default('')) }}{%- endif -%}
"""


def make_tiny_model(directory: Path) -> Path:
    """The folder of the tiny model under `directory`, made there unless it stands already.

    Takes about a second after the import of transformers; 1.7 MB. Several processes may call it at once: each builds
    beside the place and the first to finish moves its copy there. Raises `OSError` where `directory` cannot be written.
    """
    target = directory / f"kvlane-tiny-{VERSION}"
    if target.is_dir():
        return target
    directory.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".kvlane-tiny-", dir=directory))
    try:
        _write(draft)
        _move(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _move(draft: Path, target: Path) -> None:
    try:
        os.rename(draft, target)
    except OSError:
        # Another process was first: a rename never replaces a folder that holds something.
        if not target.is_dir():
            raise


def _write(directory: Path) -> None:
    from safetensors.torch import save_file

    tokenizer = _tokenizer()
    model = _model(tokenizer)
    tokenizer.save_pretrained(directory)
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    # Not the model's own save_pretrained, which draws a progress bar over the caller's terminal.
    save_file(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})
    for path in directory.iterdir():
        path.chmod(0o644)
    directory.chmod(0o755)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_SPECIAL[0],
        eos_token=_SPECIAL[2],
        additional_special_tokens=[_SPECIAL[1]],
        chat_template=_CHAT_TEMPLATE,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def _model(tokenizer: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=_HIDDEN,
        intermediate_size=2 * _HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        # Ten times the usual: the gaps between the likeliest tokens dwarf rounding, so greedy answers do not
        # depend on the batch.
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
        architectures=["LlamaForCausalLM"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = LlamaForCausalLM(config).to(torch.float32).eval()
    # Tokens that cannot be printed alone, and the end of text, stay unlikely: answers are readable noise that runs on.
    with torch.no_grad():
        model.lm_head.weight[_unprintable(tokenizer)] = 0.0
    return model


def _unprintable(tokenizer: Any) -> list[int]:
    texts = ((token, tokenizer.decode([token])) for token in range(_VOCABULARY))
    return [
        token
        for token, text in texts
        if token in tokenizer.all_special_ids or not (text.isascii() and (text.isprintable() or text == "\n"))
    ]
