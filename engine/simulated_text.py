"""Tokens of the simulated engine: how text becomes tokens and block hashes, and which words it answers.

A token is four bytes of text, and each word of an answer is four bytes long. So the next turn of a conversation, which
holds the last answer, hashes to the very blocks that the engine made while it answered, as with a real tokenizer.
Pure functions and constants; no state.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from itertools import product
from typing import Final

import msgspec
import xxhash

TOKEN_BYTES: Final = 4


def _shuffled_words() -> list[bytes]:
    words = [f"{letter}{number:02d} ".encode() for letter, number in product("abcdefghijklmnopqrstuvwxyz", range(100))]
    random.Random(0).shuffle(words)
    return words


WORDS: Final = tuple(_shuffled_words())
"""The vocabulary, such as ``b"k42 "``; needs no escaping in JSON."""
WORD_IDS: Final = tuple(array("I", b"".join(WORDS)))
"""Token ids of `WORDS`: their four bytes read as one number."""
VOCABULARY: Final = len(WORDS)

_ALL: Final = b"".join(WORDS)


def word(key: int, index: int) -> int:
    """Position in `WORDS` of token `index` of the answer that `key` begins."""
    return (key + index) % VOCABULARY


def answer(key: int, start: int, stop: int) -> bytes:
    """The text of answer tokens `start` to `stop`, without `stop`."""
    first = (key + start) % VOCABULARY * TOKEN_BYTES
    length = (stop - start) * TOKEN_BYTES
    return (_ALL * ((first + length) // len(_ALL) + 1))[first : first + length]


class Prompt(msgspec.Struct, frozen=True):
    """What the engine knows of a prompt."""

    tokens: int
    """Length in tokens, at least 1."""
    hashes: tuple[int, ...] = ()
    """Chained hashes of the full KV blocks, first block first. May be shorter: the blocks after are nobody else's."""
    tail: bytes = b""
    """The bytes after the last full block; empty where only hashes are known."""
    key: int = 0
    """Where in the vocabulary the answer begins."""


def chain(parent: int, data: bytes) -> int:
    """The hash of a block behind `parent`; 0 stands before the first block."""
    return xxhash.xxh3_64_intdigest(data, parent)


def pad(text: bytes) -> bytes:
    """`text` filled up to whole tokens."""
    return text + bytes(-len(text) % TOKEN_BYTES)


def text_prompt(text: bytes, block_tokens: int, *, seed: int = 0, salt: str = "") -> Prompt:
    """The prompt that `text` makes: one token per started four bytes. `salt` keeps its blocks apart from others'."""
    data = pad(text)
    size = block_tokens * TOKEN_BYTES
    full = len(data) // size * size
    hashes = []
    parent = chain(0, salt.encode()) if salt else 0
    for start in range(0, full, size):
        parent = chain(parent, data[start : start + size])
        hashes.append(parent)
    return Prompt(len(data) // TOKEN_BYTES, tuple(hashes), data[full:], chain(seed, data) % VOCABULARY)


def token_text(ids: Sequence[int]) -> bytes:
    """What these token ids, each below 2**32, stand for."""
    return array("I", ids).tobytes()


def token_prompt(ids: Sequence[int], block_tokens: int, *, seed: int = 0, salt: str = "") -> Prompt:
    """The prompt of these token ids, each below 2**32."""
    return text_prompt(token_text(ids), block_tokens, seed=seed, salt=salt)


def hashed_prompt(hashes: Sequence[int], tokens: int, *, seed: int = 0) -> Prompt:
    """A prompt of which only its length and its full blocks' hashes are known, as in traces."""
    last = hashes[-1] if hashes else 0
    return Prompt(tokens, tuple(hashes), b"", chain(seed, last.to_bytes(8, "little")) % VOCABULARY)


_END: Final = b"<|e>"


def chat_text(messages: Sequence[tuple[str, str]]) -> bytes:
    """The text of a conversation of (role, content), ready for the assistant's answer."""
    parts = [
        pad(f"<|{role}|>".encode()) + pad(content.encode()) + _END
        for role, content in messages
    ]  # fmt: skip
    return b"".join(parts) + pad(b"<|assistant|>")
