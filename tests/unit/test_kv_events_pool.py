"""vLLM's KV events against a plain model of vLLM's block pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kv_events import block_keys
from tests.unit.kv_batches import SIZE, Event, Follower, as_array, as_map, encode, stored

Prompt = tuple[tuple[int, ...], str | None, str | None, tuple[tuple[str, int, int], ...]]
"""Tokens, LoRA adapter, cache salt, media."""


class Pool:
    """Physical KV blocks as vLLM's pool treats them: copies are not shared, the longest unused is evicted first."""

    def __init__(self, slots: int, wide: bool = False) -> None:
        self.events: list[Event] = []
        self._free = list(range(slots))
        self._refs = [0] * slots
        self._hash: list[int | bytes | None] = [None] * slots
        self._wide = wide

    def hashes(self, prompt: Prompt) -> list[int | bytes]:
        """vLLM's own hashes, as far as anyone outside can tell."""
        tokens, lora, salt, _ = prompt
        parent, hashes = 0, list[int | bytes]()
        for i in range(len(tokens) // SIZE):
            text = repr((parent, tokens[i * SIZE : (i + 1) * SIZE], self.extras(prompt, i), lora, salt if not i else 0))
            parent = xxhash.xxh64_intdigest(text.encode())
            hashes.append(parent.to_bytes(32, "big") if self._wide else parent)
        return hashes

    def extras(self, prompt: Prompt, i: int) -> list[Any] | None:
        _, lora, salt, media = prompt
        start, end = i * SIZE, (i + 1) * SIZE
        parts: list[Any] = [lora] if lora else []
        parts += [[name, at - start] for name, at, length in media if at < end and start < at + length]
        parts += [salt] if salt and i == 0 else []
        return parts or None

    def held(self, prompt: Prompt) -> int:
        held = set(self._hash) - {None}
        hashes = self.hashes(prompt)
        return next((i for i, block in enumerate(hashes) if block not in held), len(hashes))

    def begin(self, prompt: Prompt, chunk: int) -> list[int]:
        """Computes a prompt in chunks of `chunk` blocks; gives its slots, or none where they do not suffice."""
        hashes = self.hashes(prompt)
        hits = min(self.held(prompt), max(len(prompt[0]) - 1, 0) // SIZE)
        slots = [self._hash.index(block) for block in hashes[:hits]]
        if len(hashes) - hits > len([slot for slot in self._free if slot not in slots]):
            return []
        for slot in slots:
            self._take(slot)
        for start in range(hits, len(hashes), chunk):
            end = min(start + chunk, len(hashes))
            for block in hashes[start:end]:
                slot = self._free[0]
                self._take(slot)
                self._forget(slot)
                self._hash[slot] = block
                slots.append(slot)
            self._store(prompt, hashes, start, end)
        return slots

    def end(self, slots: list[int]) -> None:
        for slot in reversed(slots):
            self._refs[slot] -= 1
            if not self._refs[slot]:
                self._free.append(slot)

    def report(self, prompt: Prompt) -> None:
        """What vLLM says of the blocks that a prompt reuses, where it is asked to."""
        if hits := self.held(prompt):
            self._store(prompt, self.hashes(prompt), 0, hits)

    def clear(self) -> None:
        if not any(self._refs):
            self._hash = [None] * len(self._hash)
            self.events.append({"type": "AllBlocksCleared"})

    def take(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    def _take(self, slot: int) -> None:
        if not self._refs[slot]:
            self._free.remove(slot)
        self._refs[slot] += 1

    def _forget(self, slot: int) -> None:
        if (block := self._hash[slot]) is not None:
            self._hash[slot] = None
            self.events.append({"type": "BlockRemoved", "block_hashes": [block], "medium": "GPU", "group_idx": 0})

    def _store(self, prompt: Prompt, hashes: list[int | bytes], start: int, end: int) -> None:
        tokens, lora, _, _ = prompt
        self.events.append(
            stored(hashes[start:end], hashes[start - 1] if start else None, tokens[start * SIZE : end * SIZE])
            | {"lora_name": lora, "extra_keys": [self.extras(prompt, i) for i in range(start, end)]}
        )


PROMPTS = st.tuples(
    st.lists(st.integers(0, 1), max_size=9).map(tuple),
    st.sampled_from([None, None, "adapter"]),
    st.sampled_from([None, None, "salt"]),
    st.sampled_from([(), (), (("image", 1, 3),), (("image", 2, 3),), (("other", 1, 3), ("image", 6, 1))]),
)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("request"), PROMPTS, st.integers(1, 4)),
        st.tuples(st.just("begin"), PROMPTS, st.integers(1, 4)),
        st.tuples(st.just("end"), st.integers(0, 5)),
        st.tuples(st.sampled_from(["report"]), PROMPTS),
        st.tuples(st.sampled_from(["clear", "send", "send twice", "lose", "delay", "replay"])),
    ),
    max_size=30,
)
STYLES = st.sampled_from([as_map, as_array])


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    ACTIONS,
    st.integers(2, 8),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.lists(STYLES, min_size=1, max_size=4),
    PROMPTS,
)
def test_while_there_is_no_cause_the_ledger_holds_what_the_engine_holds(
    actions: list[tuple[Any, ...]],
    slots: int,
    wide: bool,
    replays: bool,
    reports: bool,
    styles: list[Callable[[Event], Any]],
    probe: Prompt,
) -> None:
    pool, follower = Pool(slots, wide), Follower(replays, reports)
    running: list[list[int]] = []
    probes = [probe]
    late: list[tuple[int, bytes]] = []
    seq = 0
    for action in [*actions, ("replay",), ("send",)]:
        match action:
            case ("request", prompt, chunk):
                pool.end(pool.begin(prompt, chunk))
                probes.append(prompt)
            case ("begin", prompt, chunk):
                running.append(pool.begin(prompt, chunk))
            case ("end", which) if running:
                pool.end(running.pop(which % len(running)))
            case ("report", prompt) if reports:
                pool.report(prompt)
            case ("clear",):
                pool.clear()
            case ("replay",):
                for number, payload in late:
                    follower.events.receive(number, payload)
                late.clear()
                follower.events.replay_ended()
            case ("send" | "send twice" | "lose" | "delay" as how,):
                payload = encode(pool.take(), styles[seq % len(styles)])
                if how == "delay":
                    late.append((seq, payload))
                for _ in range({"send": 1, "send twice": 2}.get(how, 0)):
                    follower.events.receive(seq, payload)
                seq += 1
            case _:
                pass
    # A batch that was lost last of all is noticed with the next one.
    follower.events.receive(seq, encode([]))
    if follower.events.cause:
        return
    for tokens, lora, salt, media in probes:
        ours = follower.ledger.held_blocks(block_keys(tokens, SIZE, lora_name=lora, cache_salt=salt, media=media))
        truth = pool.held((tokens, lora, salt, media))
        assert ours <= truth
        assert ours == truth or (reports and follower.events.counts.repeats)
