"""The events of vLLM's own KV cache manager, without a model."""

from __future__ import annotations

import random
from itertools import count
from typing import Any

import msgspec
import pytest

from engine.cache_ledger import CacheLedger
from engine.kv_events import KvEvents, KvIdentity, block_keys

pytestmark = [pytest.mark.vllm]

SIZE = 4
_ids = count()


def _request(tokens: list[int], hasher: Any, **names: Any) -> Any:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    params = SamplingParams(max_tokens=8)
    return Request(f"r{next(_ids)}", list(tokens), params, None, block_hasher=hasher, **names)


class Cache:
    """vLLM's manager with a few blocks of its own, and what follows its events."""

    def __init__(self, blocks: int, kind: str = "full") -> None:
        import torch
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import (
            FullAttentionSpec,
            KVCacheConfig,
            KVCacheGroupSpec,
            SlidingWindowSpec,
        )

        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(SIZE, sha256)
        shape: dict[str, Any] = {"block_size": SIZE, "num_kv_heads": 1, "head_size": 1, "dtype": torch.float32}
        spec = FullAttentionSpec(**shape) if kind == "full" else SlidingWindowSpec(sliding_window=8, **shape)
        config = KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)])
        self.manager = KVCacheManager(config, 4096, SIZE, SIZE, enable_caching=True, enable_kv_cache_events=True)
        self.ledger = CacheLedger(SIZE)
        self.events = KvEvents(KvIdentity(self.ledger), replays=False)
        self._seq = 0

    def request(self, tokens: list[int], **names: Any) -> Any:
        return _request(tokens, self._hasher, **names)

    def begin(self, request: Any, chunk: int) -> int:
        """Computes a prompt in chunks of tokens; gives how many tokens were cached, or -1 where there is no room."""
        blocks, cached, _ = self.manager.get_computed_blocks(request)
        done, total = cached, request.num_tokens
        while done < total:
            new = min(chunk, total - done)
            first = {"num_new_computed_tokens": cached, "new_computed_blocks": blocks} if done == cached else {}
            if self.manager.allocate_slots(request, new, **first) is None:
                self.end(request)
                return -1
            done += new
            request.num_computed_tokens = done
        return int(cached)

    def generate(self, request: Any, tokens: list[int]) -> None:
        for token in tokens:
            request.append_output_token_ids(token)
            if self.manager.allocate_slots(request, 1) is None:
                return
            request.num_computed_tokens += 1

    def end(self, request: Any) -> None:
        self.manager.free(request)

    def publish(self) -> None:
        from vllm.distributed.kv_events import KVEventBatch

        batch = KVEventBatch(ts=1.0, events=self.manager.take_events(), data_parallel_rank=0)
        self.events.receive(self._seq, msgspec.msgpack.encode(batch))
        self._seq += 1

    def found(self, request: Any) -> int:
        """Tokens that vLLM finds cached."""
        return int(self.manager.get_computed_blocks(request)[1])


def test_the_ledger_foretells_what_vllm_finds_cached() -> None:
    cache, chance = Cache(24), random.Random(20_260)
    running: list[Any] = []
    foretold = 0
    for _ in range(1500):
        match chance.random():
            case draw if draw < 0.5:
                tokens = [chance.randrange(2) for _ in range(chance.randrange(1, 33))]
                salt = chance.choice([None, None, "pepper"])
                request = cache.request(tokens, cache_salt=salt)
                keys = block_keys(tokens, SIZE, cache_salt=salt)
                cache.publish()
                assert cache.events.cause == ""
                expected = min(cache.ledger.held_blocks(keys), (len(tokens) - 1) // SIZE) * SIZE
                assert cache.found(request) == expected
                foretold += expected > 0
                if cache.begin(request, chance.choice([4, 7, 64])) >= 0:
                    running.append(request)
            case draw if draw < 0.75 and running:
                request = chance.choice(running)
                cache.generate(request, [chance.randrange(2) for _ in range(chance.randrange(1, 9))])
            case draw if draw < 0.98 and running:
                cache.end(running.pop(chance.randrange(len(running))))
            case _:
                cache.manager.reset_prefix_cache()
    assert foretold > 100
    counts = cache.events.counts
    assert counts.removed > 100
    assert counts.cleared > 0
    assert counts.strangers == counts.orphans == counts.unknown == 0


def test_adapters_and_media_are_keyed_as_vllm_keys_them() -> None:
    from vllm.lora.request import LoRARequest
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    tokens = list(range(22))

    def media(name: str, offset: int, length: int) -> Any:
        place = PlaceholderRange(offset=offset, length=length)
        return MultiModalFeatureSpec(data=None, modality="image", identifier=name, mm_position=place)

    cache = Cache(64)
    adapter = LoRARequest("adapter", 1, "/adapters/one")
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"cache_salt": "pepper"}, {"cache_salt": "pepper"}),
        ({"lora_request": adapter}, {"lora_name": "adapter"}),
        (
            {"mm_features": [media("a", 3, 7), media("b", 11, 1), media("c", 18, 4)], "cache_salt": "pepper"},
            {"media": [("a", 3, 7), ("b", 11, 1), ("c", 18, 4)], "cache_salt": "pepper"},
        ),
        (
            {"mm_features": [media("b", 9, 3)], "lora_request": adapter, "cache_salt": "salt"},
            {"media": [("b", 9, 3)], "lora_name": "adapter", "cache_salt": "salt"},
        ),
    ]
    for before, (theirs, ours) in enumerate(cases):
        keys = block_keys(tokens, SIZE, **ours)
        # The fourth and fifth share what comes before their media with nobody: their first blocks are salted.
        assert cache.ledger.held_blocks(keys) == 0, before
        request = cache.request(tokens, **theirs)
        assert cache.begin(request, 8) == 0
        cache.publish()
        assert cache.ledger.held_blocks(keys) == len(keys) == 5
    assert cache.events.cause == ""


def test_extra_keys_are_those_of_vllms_own_walk_through_the_media() -> None:
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys, to_event_extra_keys

    chance = random.Random(20_261)
    for turn in range(300):
        tokens = [chance.randrange(3) for _ in range(chance.randrange(4, 60))]
        blocks = len(tokens) // SIZE
        # Some lie over each other, as sound and pictures of a video do.
        media = sorted(
            (
                (f"m{i}", chance.randrange(len(tokens)), chance.choice([1, 2, 5, 20]))
                for i in range(chance.randrange(6))
            ),
            key=lambda medium: medium[1],
        )
        salt = chance.choice([None, "pepper"])
        features = [
            MultiModalFeatureSpec(
                data=None, modality="image", identifier=name, mm_position=PlaceholderRange(offset=offset, length=length)
            )
            for name, offset, length in media
        ]
        request = _request(tokens, None, mm_features=features, cache_salt=salt)
        extras, at = list[Any](), 0
        for block in range(blocks):
            extra, at = generate_block_hash_extra_keys(request, block * SIZE, (block + 1) * SIZE, at)
            extras.append(extra)
        ledger = CacheLedger(SIZE)
        event = {
            "type": "BlockStored",
            "block_hashes": list(range(blocks)),
            "parent_block_hash": None,
            "token_ids": tokens[: blocks * SIZE],
            "block_size": SIZE,
            "extra_keys": to_event_extra_keys(extras),
        }
        events = KvEvents(KvIdentity(ledger), replays=False)
        events.receive(0, msgspec.msgpack.encode([1.0, [event], 0]))
        assert events.cause == ""
        assert ledger.held_blocks(block_keys(tokens, SIZE, cache_salt=salt, media=media)) == blocks, (turn, media)


def test_a_sliding_window_is_not_taken_for_full_attention() -> None:
    cache = Cache(24, kind="sliding window")
    request = cache.request(list(range(12)))
    assert cache.begin(request, 64) == 0
    cache.publish()
    assert cache.events.cause == "KV cache group 0 is sliding_window"
