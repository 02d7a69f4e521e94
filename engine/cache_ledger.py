"""Which prefix blocks a replica holds: the ties between the router's prefix blocks and the engine's KV blocks.

Sans-IO, one per replica, owned by its engine. Prompts tie prefix blocks to KV blocks, in whichever order prompts and
the engine's own news come; a prefix block is held while a KV block in which its last token lies is held. Rule: what is
said to be held follows from what the engine stored and evicted, never from what it was asked to compute.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Final, Protocol

from router.types import Chain

MAX_TIES: Final = 250_000
"""About 120 MB where all are used. A KV cache of 820,000 tokens needs 13,000 at 256 bytes a prefix block; the rest is
for prompts that wait, and for prefixes that are shared by prompts whose KV blocks differ."""
MAX_TIES_PER_KEY: Final = 64
"""Prompts with namespaces of their own and the same tokens each tie blocks of their own to the same KV blocks."""
_MAX_CLAIMS: Final = 65_536
_RETRY_PROMPTS: Final = 16
_FORGETTING: Final = 0.2
"""Share of each prompt in what is thought of answers: four in a row that come back otherwise end the trust."""


class Watcher(Protocol):
    """Who is told what becomes of prefix blocks; called within the ledger's own calls, so it only makes notes."""

    def changed(self, block: int) -> None:
        """The block is held now and was not, or the other way round, or its depth is another."""

    def voided(self) -> None:
        """No block is held any more."""


class CacheLedger:
    """The ties of one replica. KV blocks go by keys (see `engine.kv_events.block_keys`), prefix blocks by hashes.

    Several prompts may tie one prefix block to different KV blocks: where KV blocks reach past the end of a shared
    prefix, each prompt has its own. The prefix block is held while any of them is.
    """

    def __init__(self, block_tokens: int, max_ties: int = MAX_TIES, max_ties_per_key: int = MAX_TIES_PER_KEY) -> None:
        self.block_tokens = block_tokens
        """Tokens in a KV block."""
        self.dropped = 0
        """Ties given up though their KV block is held, or because that one KV block had too many: their prefix blocks
        are said to be evicted, or not said to be held."""
        self.confirmed = 0
        """Prefix blocks over generated text that a later prompt found in the KV block they were tied to."""
        self.refuted = 0
        """Those that it found elsewhere: the text was rendered or tokenized otherwise than it was generated."""
        self._max_ties = max_ties
        self._max_ties_per_key = max_ties_per_key
        self._held: set[int] = set()
        self._warm: OrderedDict[int, dict[int, int]] = OrderedDict()  # Held key -> hash -> depth, oldest first.
        self._cold: OrderedDict[int, dict[int, int]] = OrderedDict()  # The same of keys not held; least recent first.
        self._ties = 0
        self._holders: dict[int, int] = {}  # Hash -> how many held keys it is tied to; only held ones.
        self._depths: dict[int, int] = {}  # Of the same.
        self._claims: OrderedDict[int, int] = (
            OrderedDict()
        )  # Hash -> key, tied over generated text, not yet seen again.
        self._trust = 1.0
        self._untried = 0
        """Prompts since an answer was tied."""
        self._watchers: list[Watcher] = []

    def watch(self, watcher: Watcher) -> None:
        """Tells `watcher` of every change from now on."""
        self._watchers.append(watcher)

    def prompt(self, chain: Chain, keys: Sequence[int], ends: Sequence[int]) -> None:
        """Ties a prompt's prefix blocks.

        `keys` are those of its full KV blocks in order; `ends[j]` is how many of its tokens cover its first j + 1
        prefix blocks. Blocks without an end, or whose last token is in no full KV block, stay untied. What was claimed
        of a block over generated text is judged, and undone where this prompt has it in another KV block.
        """
        self._untried += 1
        self._judge(chain.blocks, keys, ends)
        self._tie(chain.blocks, keys, ends)

    def answer(self, blocks: Sequence[int], keys: Sequence[int], ends: Sequence[int]) -> None:
        """Ties prefix blocks over generated text, expecting the next turn's prompt to hold it as it was generated.

        `blocks` may start anywhere in the chain, `ends` belongs to them and counts from the prompt's first token, as do
        `keys`: all full KV blocks of the prompt and the generated tokens that are expected to come again. Begin with
        the prompt's own blocks that `prompt` could not tie because they end in its last KV block, which was not full:
        routers match without a gap.
        """
        self._untried = 0
        claims = self._claims
        for block, key in self._places(blocks, keys, ends):
            claims[block] = key
            claims.move_to_end(block)
        while len(claims) > _MAX_CLAIMS:
            claims.popitem(last=False)
        self._tie(blocks, keys, ends)

    @property
    def answers_return(self) -> bool:
        """Whether it is worth tying the answer that ends now: most of the last ones came back as they were generated.

        Where they did not, one answer in about 16 prompts is tried.
        """
        return self._trust >= 0.5 or self._untried >= _RETRY_PROMPTS

    def stored(self, key: int) -> None:
        """The engine holds a KV block; saying it again changes nothing."""
        if key in self._held:
            return
        self._held.add(key)
        ties = self._cold.pop(key, None)
        if ties is not None:
            self._warm[key] = ties
            for block, depth in ties.items():
                self._holders[block] = self._holders.get(block, 0) + 1
                self._deepen(block, depth)

    def evicted(self, key: int) -> None:
        """The engine holds a KV block no more; its ties stay for a while, since a waiting prompt may store it again."""
        if key not in self._held:
            return
        self._held.discard(key)
        ties = self._warm.pop(key, None)
        if ties is not None:
            self._cold[key] = ties
            for block in ties:
                self._release(block)

    def cleared(self) -> None:
        """The engine holds nothing."""
        self._held.clear()
        self._cold.update(self._warm)
        self._warm.clear()
        self._holders.clear()
        self._depths.clear()
        for watcher in self._watchers:
            watcher.voided()

    def held_blocks(self, keys: Iterable[int]) -> int:
        """How many of these KV blocks are held, from the first one on without a gap."""
        held = self._held
        count = 0
        for key in keys:
            if key not in held:
                break
            count += 1
        return count

    def depth(self, block: int) -> int | None:
        """Tokens of its prompt up to the end of a prefix block that is held; None for one that is not."""
        return self._depths.get(block)

    def blocks(self) -> list[int]:
        """All prefix blocks that are held."""
        return list(self._depths)

    def __len__(self) -> int:
        """Prefix blocks that are held."""
        return len(self._depths)

    @property
    def ties(self) -> int:
        """Ties remembered, of KV blocks held and not held."""
        return self._ties

    @property
    def held(self) -> int:
        """KV blocks that are held."""
        return len(self._held)

    def _places(self, blocks: Sequence[int], keys: Sequence[int], ends: Sequence[int]) -> Iterable[tuple[int, int]]:
        """Each block with the key of the KV block that has its last token."""
        size, count = self.block_tokens, len(keys)
        for block, end in zip(blocks, ends, strict=False):
            position = (end - 1) // size if end > 0 else 0
            if position >= count:
                break
            yield block, keys[position]

    def _tie(self, blocks: Sequence[int], keys: Sequence[int], ends: Sequence[int]) -> None:
        size, count = self.block_tokens, len(keys)
        position, new = -1, dict[int, int]()
        for block, end in zip(blocks, ends, strict=False):
            place = (end - 1) // size if end > 0 else 0
            if place >= count:
                break
            if place != position:
                if new:
                    self._add(keys[position], new)
                position, new = place, {}
            new[block] = end
        if new:
            self._add(keys[position], new)
        self._trim()

    def _add(self, key: int, new: dict[int, int]) -> None:
        """Adds ties to one key; `new` is hash -> depth."""
        held = key in self._held
        ties = self._warm if held else self._cold
        known = ties.setdefault(key, {})
        ties.move_to_end(key)
        for block, depth in new.items():
            before = known.pop(block, None)
            known[block] = depth
            if before is None:
                self._ties += 1
                if held:
                    self._holders[block] = self._holders.get(block, 0) + 1
            if held and before != depth:
                self._deepen(block, depth)
        # One prompt's own ties stay together: routers match without a gap.
        over = len(known) - max(self._max_ties_per_key, len(new))
        if over > 0:
            self._drop(known, over, held)

    def _drop(self, known: dict[int, int], over: int, held: bool) -> None:
        """Gives up the oldest ties of a key."""
        for block in list(islice(known, over)):
            del known[block]
            if held:
                self._release(block)
        self._ties -= over
        self.dropped += over

    def _trim(self) -> None:
        while self._ties > self._max_ties:
            if self._cold:
                self._ties -= len(self._cold.popitem(last=False)[1])
                continue
            ties = self._warm.popitem(last=False)[1]
            self._ties -= len(ties)
            self.dropped += len(ties)
            for block in ties:
                self._release(block)

    def _judge(self, blocks: Sequence[int], keys: Sequence[int], ends: Sequence[int]) -> None:
        claims = self._claims
        if not claims:
            return
        right = wrong = 0
        for block, key in self._places(blocks, keys, ends):
            claimed = claims.pop(block, None)
            if claimed is None:
                continue
            if claimed == key:
                right += 1
            else:
                wrong += 1
                self._untie(claimed, block)
        self.confirmed += right
        self.refuted += wrong
        if right or wrong:
            self._trust += (right / (right + wrong) - self._trust) * _FORGETTING

    def _untie(self, key: int, block: int) -> None:
        held = key in self._held
        ties = self._warm if held else self._cold
        known = ties.get(key)
        if known is None or known.pop(block, None) is None:
            return
        if not known:
            del ties[key]
        self._ties -= 1
        if held:
            self._release(block)

    def _deepen(self, block: int, depth: int) -> None:
        if self._depths.get(block) != depth:
            self._depths[block] = depth
            self._tell(block)

    def _release(self, block: int) -> None:
        left = self._holders[block] - 1
        if left:
            self._holders[block] = left
        else:
            del self._holders[block]
            del self._depths[block]
            self._tell(block)

    def _tell(self, block: int) -> None:
        for watcher in self._watchers:
            watcher.changed(block)
