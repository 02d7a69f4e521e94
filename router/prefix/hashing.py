"""Chains: a prompt's canonical bytes as chained hashes of its prefix blocks.

Pure. The rule: h_0 is the hash of the namespace and h_i that of block i seeded with h_(i-1), all xxh3 with 64 bits; so
one hash stands for its block and all before it, and router and replica agree on every one. No block has the hash 0,
which the index uses for what is not there: 1 stands in for it.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterable
from functools import lru_cache
from itertools import chain as joined
from struct import Struct
from typing import TYPE_CHECKING, Final

from xxhash import xxh3_64_intdigest

from router.compiled import part
from router.prefix.canonical import Canonical, data_of, namespace_of, read, read_in_slices
from router.prefix.draft import Draft
from router.prefix.http_prompts import CHAT_PATH, TEXT_PATH
from router.prefix.window import LARGE_BYTES
from router.types import Chain, Request, Rpc

if TYPE_CHECKING:
    from router.prefix._chats import Chats

_AT_ONCE: Final = 64
_SEEDS: Final = 1024


class Hasher:
    """Makes the chains of requests.

    `block_bytes` is the size of a prefix block; bytes of the prompt past `max_prompt_bytes` are in none.
    """

    def __init__(self, block_bytes: int, max_prompt_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._max_bytes = max_prompt_bytes
        self._shapes: dict[bytes, bytes] = {}
        """What is known of tools and the like."""
        self._seeds: dict[tuple[str, str, str, str], int] = {}
        """Of namespaces without any."""
        compiled = part("router.prefix._chats")
        self._chats: Chats | None = None
        if compiled is not None:
            most = min(max_prompt_bytes, sys.maxsize)
            self._chats = compiled.Chats(self._hashed, self._chained, self._seeds, block_bytes, most)

    def chain(self, request: Request) -> Chain | None:
        """The chain of a request's prompt; None where it has none. Never raises, whatever the body."""
        if self._chats is not None and _is_short_post(request):
            if request.path == CHAT_PATH:
                return self._chats.chain(request)
            if request.path == TEXT_PATH:
                return self._chats.text_chain(request)
        return self._chained(request)

    def _chained(self, request: Request) -> Chain | None:
        draft = self._read(request)
        return None if draft is None else self._hashed(draft, request)

    def chain_in_slices(self, request: Request) -> Generator[None, None, Chain | None]:
        """The same of a large request; yields where others may run."""
        if request.method != "POST":
            return None
        draft = yield from read_in_slices(request.rpc, request.path, request.body, self._max_bytes)
        yield
        if draft is None or (seed := self._seed(draft, request)) is None:
            return None
        data = data_of(draft)
        prompt_bytes = len(data) + draft.unread_bytes
        del draft
        yield
        return _chain(seed, data, self._block_bytes, self._max_bytes, prompt_bytes)

    def _read(self, request: Request) -> Draft | None:
        if request.method != "POST":
            return None
        return read(request.rpc, request.path, request.body, self._max_bytes)

    def _hashed(self, draft: Draft, request: Request) -> Chain | None:
        seed = self._seed(draft, request)
        if seed is None:
            return None
        data = data_of(draft)
        return _chain(seed, data, self._block_bytes, self._max_bytes, len(data) + draft.unread_bytes)

    def _seed(self, draft: Draft, request: Request) -> int | None:
        if draft.shape or draft.tokens is not None:
            return self._new_seed(draft, request)
        key = (draft.kind, request.model, request.lora, request.cache_salt)
        seed = self._seeds.get(key)
        if seed is None and (seed := self._new_seed(draft, request)) is not None:
            if len(self._seeds) >= _SEEDS:
                self._seeds.clear()
            self._seeds[key] = seed
        return seed

    def _new_seed(self, draft: Draft, request: Request) -> int | None:
        model = request.lora or request.model
        namespace = namespace_of(draft, model, request.cache_salt, memo=self._shapes)
        return None if namespace is None else xxh3_64_intdigest(namespace)


def _is_short_post(request: Request) -> bool:
    return request.rpc is Rpc.HTTP and request.method == "POST" and len(request.body) <= LARGE_BYTES


def chain_of(prompt: Canonical, block_bytes: int, max_bytes: int) -> Chain:
    """The chain of a canonical prompt; its bytes past `max_bytes` are in no block."""
    return _chain(xxh3_64_intdigest(prompt.namespace), prompt.data, block_bytes, max_bytes, prompt.prompt_bytes)


def _chain(seed: int, data: bytes, block_bytes: int, max_bytes: int, prompt_bytes: int) -> Chain:
    count = min(len(data), max_bytes) // block_bytes
    return Chain(block_bytes, seed, tuple(_hashes(seed, data, block_bytes, count)), prompt_bytes)


def extend(last_hash: int, rest: bytes, more: bytes, block_bytes: int) -> tuple[list[int], bytes]:
    """The blocks that `more` completes, and the bytes that are in none yet.

    `last_hash` is that of the last full block (the seed where there is none), `rest` the bytes after it.
    """
    data = rest + more
    count = len(data) // block_bytes
    return _hashes(last_hash, data, block_bytes, count), data[count * block_bytes :]


def _hashes(last: int, data: bytes, block_bytes: int, count: int) -> list[int]:
    if not count:
        return []
    hashes = [last]
    # The list is its own source of seeds: `map` takes each hash right after it was appended. All of it runs in C, which
    # saves a seventh of the time of a loop.
    hashes += map(xxh3_64_intdigest, _blocks(data, block_bytes, count), hashes)
    del hashes[0]
    return hashes if all(hashes) else _without_zero(last, data, block_bytes, count)


def _without_zero(last: int, data: bytes, block_bytes: int, count: int) -> list[int]:
    """The same where a 0 is among them; what follows it is seeded with its stand-in."""
    hashes = []
    for block in _blocks(data, block_bytes, count):
        last = xxh3_64_intdigest(block, last) or 1
        hashes.append(last)
    return hashes


def _blocks(data: bytes, block_bytes: int, count: int) -> Iterable[bytes]:
    """The first `count` blocks of `data`; cutting with `struct` takes half the time of slicing."""
    cutters = _cutters(block_bytes)
    runs, rest = divmod(count, _AT_ONCE)
    if not runs:
        return cutters[rest].unpack_from(data)
    cut = runs * _AT_ONCE * block_bytes
    blocks = joined.from_iterable(cutters[_AT_ONCE].iter_unpack(memoryview(data)[:cut]))
    return joined(blocks, cutters[rest].unpack_from(data, cut)) if rest else blocks


@lru_cache(maxsize=8)
def _cutters(block_bytes: int) -> tuple[Struct, ...]:
    """Cut 0 to `_AT_ONCE` blocks."""
    return tuple(Struct(f"{block_bytes}s" * count) for count in range(_AT_ONCE + 1))
