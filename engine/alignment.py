"""Where a prompt's canonical bytes lie among its tokens.

Sans-IO. The router hashes canonical bytes, the engine caches tokens of a rendered prompt; in between are a chat
template and a tokenizer. Nothing of either is rebuilt here: the tokens' own bytes, joined, are the rendered prompt, and
the prompt's texts are found in it one after the other. Rule: an alignment that is not exact says so.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Final, TypeAlias

import msgspec
import numpy as np

from router.prefix.canonical import Piece, PieceKind

Places: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"

_PROBES: Final = (
    "Hello, world! It's 12:30, isn't it?",
    "  two  spaces\n\n\ttabs and\r\nlines  ",
    "naïve Straße 東京は夜 мир 🙂👩‍👩‍👧",
    'def f(x):\n    return {"a": [1, 2.5e-3]}  # done',
)
_LEAD_BYTES: Final = 64
_LEAST_LEAD: Final = 4
_MAX_LEADS: Final = 256
_SURE_BYTES: Final = 16
"""A text this long is hardly met by chance before its place."""
_EDGE_BYTES: Final = 32
_NEAR_BYTES: Final = 544
"""How far behind the piece before a text's beginning is looked for, unless it is sure to be met nowhere else."""
_PROBE_BYTES: Final = 128
_PROBES_TRIED: Final = 16
"""A text is looked for by its first bytes and compared where they are met: a search for all of a long text takes time
by its length too where it repeats itself."""
_PASSES: Final = 4
_LEAST_SEARCHED: Final = 65_536
_MAX_CHANGED: Final = 256
"""Bytes searched and texts found otherwise than written per prompt, before the rest is an estimate. A prompt whose
texts are copied takes one pass."""
_TAIL_TOKENS: Final = 16
_SAME_TOKENS: Final = 2


class TokenBytes:
    """The bytes that each token of a tokenizer stands for, where joining them gives back the text."""

    def __init__(self, table: list[bytes], special: frozenset[int]) -> None:
        self.table = table
        self._bytes = np.array([*table, None], dtype=object)[:-1]  # The None keeps numpy from making strings of them.
        self._lengths = np.fromiter(map(len, table), dtype=np.int64, count=len(table))
        self.special = special
        """Tokens at which every tokenizer cuts a text; templates put them between messages."""
        names = sorted((table[token] for token in special if token < len(table) and table[token]), key=len)
        self._special = re.compile(b"|".join(map(re.escape, reversed(names))) or b"(?!)")

    @classmethod
    def of(cls, tokenizer: Any) -> TokenBytes | None:
        """The table of a tokenizer as vLLM has it; None where it is neither byte-level nor SentencePiece-like.

        Joined tokens are held against a few texts and the tokenizer's own decoding of them; where they differ, there is
        no table. Takes 0.3 s for 128,000 tokens.
        """
        vocabulary = tokenizer.get_vocab()
        added = tokenizer.get_added_vocab()
        special = frozenset({*tokenizer.all_special_ids, *added.values()})
        for kind in (_byte_level, _sentence_piece):
            table = kind(vocabulary, added)
            if table and (made := cls(table, special))._holds(tokenizer):
                return made
        return None

    def join_and_ends(self, token_ids: Sequence[int]) -> tuple[bytes, Places] | None:
        """The text that the tokens stand for, and where in it each token's bytes end; None where the tokenizer does not
        have one of them.
        """
        # By way of an array: numpy takes three times as long to read a list.
        ids = np.frombuffer(array("I", token_ids), dtype=np.uint32)
        if len(ids) and ids.max() >= len(self.table):
            return None
        return b"".join(self._bytes[ids].tolist()), np.cumsum(self._lengths[ids])

    def lead(self, gap: bytes) -> bytes:
        """The end of `gap` from its last special token on; all of it where it has none."""
        start = 0
        for match in self._special.finditer(gap):
            start = match.start()
        return gap[start:]

    def _holds(self, tokenizer: Any) -> bool:
        for probe in _PROBES:
            ids = tokenizer.encode(probe, add_special_tokens=False)
            known = self.join_and_ends(ids)
            if not known:
                return False
            joined = known[0].decode("utf-8", "replace")
            # SentencePiece puts a space before the first word, and its decoder takes it off again.
            texts = (joined, joined.removeprefix(" "))
            if probe not in texts and tokenizer.decode(ids, skip_special_tokens=False) not in texts:
                return False
        return True


def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(0x100)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_LETTERS: Final = _byte_letters()


def _byte_level(vocabulary: dict[str, int], added: dict[str, int]) -> list[bytes] | None:
    """Each of a token's letters is a byte, but for added tokens, which stand for themselves."""
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for name, token in vocabulary.items():
        if name in added:
            table[token] = name.encode("utf-8", "surrogatepass")
            continue
        try:
            table[token] = bytes(map(_LETTERS.__getitem__, name))
        except KeyError:
            return None
    return table


def _sentence_piece(vocabulary: dict[str, int], added: dict[str, int]) -> list[bytes]:
    """Text in which U+2581 is a space, or one byte by its number."""
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for name, token in vocabulary.items():
        byte = _NUMBERED.fullmatch(name)
        if byte:
            table[token] = bytes.fromhex(byte[1])
        else:
            table[token] = name.replace("\u2581", " ").encode("utf-8", "surrogatepass")
    return table


_NUMBERED: Final = re.compile("<0x([0-9A-Fa-f]{2})>")


class Aligned(msgspec.Struct, frozen=True):
    """Where a prompt's prefix blocks end."""

    ends: tuple[int, ...]
    """For each block how many of the prompt's tokens cover it and all before it. May be shorter than asked for, where
    the prompt's tokens are not those of its canonical bytes."""
    exact: bool
    """Every text was found in the rendered prompt as it was written; otherwise some ends are estimates."""


class Aligner:
    """Aligns the prompts of one model. Remembers how its template leads to each role's text, nothing else."""

    def __init__(self, tokens: TokenBytes | None) -> None:
        self.tokens = tokens
        self.exact = 0
        """Prompts whose texts were all found."""
        self.estimated = 0
        """The others; all of them where there is no table of the tokens' bytes."""
        self.searched = 0
        """Bytes of rendered prompts that texts were looked for in; up to four times the prompt where texts changed."""
        self._leads: dict[bytes, bytes] = {}
        self._trims: bool | None = None

    def ends(
        self, data: bytes, pieces: Sequence[Piece], token_ids: Sequence[int], block_bytes: int, blocks: int
    ) -> Aligned:
        """Where the first `blocks` prefix blocks of a prompt end, in tokens.

        `data` and `pieces` are its canonical form, `token_ids` those that the engine computes, special ones included.
        Never raises on what clients send. 170 to 300 µs for 2,000 tokens.
        """
        if blocks <= 0 or not len(token_ids):
            return Aligned((), True)
        if pieces and pieces[0].kind == PieceKind.TOKENS:
            aligned = _tokens_as_given(data, token_ids, block_bytes, blocks)
        else:
            aligned = self._by_text(data, pieces, token_ids, block_bytes, blocks)
        self.exact += aligned.exact
        self.estimated += not aligned.exact
        return aligned

    def answer_ends(
        self, first: int, block_bytes: int, blocks: int, text_start: int, prompt_tokens: int, generated: Sequence[int]
    ) -> tuple[int, ...]:
        """Where prefix blocks over generated text end, counted in tokens from the prompt's first one.

        The blocks are those numbered from `first` (0 is the chain's first) to `blocks`; `text_start` is where in the
        canonical bytes the generated text begins, `generated` the tokens that are expected to come again
        (`agreeing_tokens`). Stops at the first block that they do not cover; blocks that end before the text take the
        whole prompt.
        """
        if self.tokens is None:
            return ()
        covered = list(accumulate(len(self.tokens.table[token]) for token in generated))
        ends = list[int]()
        for block in range(first, blocks):
            length = (block + 1) * block_bytes - text_start
            count = bisect_left(covered, length) + 1 if length > 0 else 0
            if count > len(covered):
                break
            ends.append(prompt_tokens + count)
        return tuple(ends)

    @property
    def keeps_edges(self) -> bool:
        """Whether the template is known to leave white space around texts as it is."""
        return self._trims is False

    def _by_text(
        self, data: bytes, pieces: Sequence[Piece], token_ids: Sequence[int], block_bytes: int, blocks: int
    ) -> Aligned:
        joined = None if self.tokens is None else self.tokens.join_and_ends(token_ids)
        if self.tokens is None or joined is None:
            return _in_proportion(len(data), len(token_ids), block_bytes, blocks)
        rendered, token_ends = joined
        search = _Search(data, rendered, self._leads, self.tokens)
        texts, media = 0, False
        for piece in pieces:
            media = media or piece.kind == PieceKind.MEDIA
            if piece.kind == PieceKind.TEXT and piece.length:
                search.text(piece.start, piece.start + piece.length, media)
                texts, media = texts + piece.length, False
        self.searched += search.searched
        if search.headless and len(rendered) < texts:
            return Aligned((), False)  # Truncated: nothing says how much of the beginning is missing.
        self._learn(search)
        edges = np.arange(1, blocks + 1, dtype=np.float64) * block_bytes
        places = np.ceil(np.interp(edges, [*search.xs, len(data)], [*search.ys, search.last(len(data))]) - 1e-6)
        ends = np.searchsorted(token_ends, places, side="left") + 1
        return Aligned(tuple(np.minimum(ends, len(token_ids)).tolist()), search.exact and bool(pieces))

    def _learn(self, search: _Search) -> None:
        if len(self._leads) >= _MAX_LEADS:
            self._leads.clear()  # Roles are free text: what is in use comes back with its next prompt.
        for mark, lead in search.leads.items():
            shared = _common_end(self._leads.get(mark, lead), lead)
            self._leads[mark] = shared if len(shared) >= _LEAST_LEAD else lead
        if search.trimmed:
            self._trims = True
        elif search.edges and self._trims is None:
            self._trims = False


def _common_end(one: bytes, other: bytes) -> bytes:
    """The longest end of both."""
    length = min(len(one), len(other))
    while length and one[-length:] != other[-length:]:
        length -= 1
    return one[-length:] if length else b""


class _Search:
    """Finds a prompt's texts in the rendered prompt, in their order.

    `xs` and `ys` are corresponding places in the canonical bytes and the rendered prompt; between them it is linear.
    """

    def __init__(self, data: bytes, rendered: bytes, leads: dict[bytes, bytes], tokens: TokenBytes) -> None:
        self.data = data
        self.rendered = rendered
        self.xs: list[int] = [0]
        self.ys: list[int] = [0]
        self.exact = True
        self.trimmed = False
        self.edges = False
        """A text with white space around it was found whole."""
        self.headless = False
        """The first text was not found, nor its beginning."""
        self.leads: dict[bytes, bytes] = {}
        self.searched = 0
        self._most = _PASSES * len(rendered) + _LEAST_SEARCHED
        self._changes = 0
        self._known = leads
        self._tokens = tokens
        self._mark = b""
        """What is before the text in the canonical bytes."""
        self._end = 0

    def text(self, start: int, end: int, media: bool) -> None:
        """The next text: canonical bytes `start` to `end`. `media`: there are placeholders of any length before it."""
        self._mark = self.data[self._end : start][-_LEAD_BYTES:]
        self._end = end
        if self._changes >= _MAX_CHANGED or self.searched >= self._most:
            self.exact = False
        elif not self._whole(self.data[start:end], start, media):
            self.exact = False
            self._changes += 1

    def _whole(self, text: bytes, start: int, media: bool) -> bool:
        """Finds the text as it was written; failing that, its edges."""
        lead = self._known.get(self._mark)
        near, anywhere = self._near(start), len(self.rendered)
        sure = len(text) >= _SURE_BYTES
        if lead is not None:
            if self._written(lead, text, start, near):
                return True
            # The lead makes a short text sure; by itself it would be met somewhere before its place.
            if not sure and len(lead) + len(text) >= _SURE_BYTES and self._written(lead, text, start, anywhere):
                return True
        if self._written(b"", text, start, near):
            return True
        if self._edges(text, start, near):
            return False
        if (sure or media) and self._written(b"", text, start, anywhere):
            return True
        self.headless = self.headless or len(self.xs) == 1
        return False

    def last(self, end: int) -> int:
        """The rendered place of the canonical end."""
        return self.ys[-1] if self.xs[-1] == end else len(self.rendered)

    def _near(self, start: int) -> int:
        """Where the text at `start` begins at the latest, if nothing but marks and changed texts is before it."""
        return self.ys[-1] + 2 * (start - self.xs[-1]) + _NEAR_BYTES

    def _written(self, lead: bytes, text: bytes, start: int, end: int) -> bool:
        """Finds the text behind `lead`, as it is or without the white space around it, beginning before `end`."""
        after, inner = self.ys[-1], text.strip()
        edges = len(inner) < len(text)
        if (place := self._seek(lead + text, end)) >= 0:
            if lead:
                self.edges = self.edges or edges
            elif len(text) >= _SURE_BYTES and self.exact:
                self.leads[self._mark] = self._tokens.lead(self.rendered[after:place][-_LEAD_BYTES:])
            self._found(text, start, place + len(lead))
        elif inner and edges and (place := self._seek(lead + inner, end)) >= 0:
            self.trimmed = True
            self._found(inner, start + text.index(inner), place + len(lead))
        return place >= 0

    def _seek(self, needle: bytes, end: int) -> int:
        """The first place of `needle` behind what was found last and before `end`; -1 where it is not to be had."""
        rendered, after = self.rendered, self.ys[-1]
        probe = needle[:_PROBE_BYTES]
        end = min(end + len(probe), len(rendered), after + self._most - self.searched)
        place = rendered.find(probe, after, end)
        for _ in range(_PROBES_TRIED):
            if place < 0 or rendered.startswith(needle, place):
                break
            place = rendered.find(probe, place + 1, end)
        else:
            self.searched += end - after
            return -1
        self.searched += max((place + len(probe) if place >= 0 else end) - after, 0)
        return place

    def _found(self, text: bytes, start: int, place: int) -> None:
        self._anchor(start, place)
        self._anchor(start + len(text), place + len(text))

    def _edges(self, text: bytes, start: int, near: int) -> bool:
        """Finds the first and last bytes of a text that the template or the tokenizer wrote otherwise."""
        inner = text.strip()
        if len(inner) < 2 * _EDGE_BYTES:
            return False
        head, tail = inner[:_EDGE_BYTES], inner[-_EDGE_BYTES:]
        headless = self.headless or len(self.xs) == 1
        first, end = self._seek(head, near), min(near + len(text), len(self.rendered))
        if first >= 0:
            headless = False
            self._anchor(start + text.index(head), first)
        after = self.ys[-1]
        last = self.rendered.rfind(tail, after, end)
        self.searched += max(end - max(last, after), 0)
        if last >= 0:
            self._anchor(start + text.rindex(tail) + len(tail), last + len(tail))
        if first < 0 and last < 0:
            return False
        self.headless = headless
        return True

    def _anchor(self, x: int, y: int) -> None:
        if x > self.xs[-1]:
            self.xs.append(x)
            self.ys.append(y)
        elif x == self.xs[-1] == 0:
            self.ys[-1] = y


def _tokens_as_given(data: bytes, token_ids: Sequence[int], block_bytes: int, blocks: int) -> Aligned:
    """A prompt of token ids, four bytes each; the engine computes these unless it was told to truncate."""
    given = np.frombuffer(data, dtype="<u4", count=len(data) // 4)
    taken = np.asarray(token_ids, dtype=np.int64)
    length = min(len(given), len(taken))
    differing = np.flatnonzero(given[:length] != taken[:length])
    same = int(differing[0]) if len(differing) else length
    ends = ((block_bytes * block + 3) // 4 for block in range(1, blocks + 1))
    return Aligned(tuple(end for end in ends if end <= same), same == len(given))


def _in_proportion(size: int, tokens: int, block_bytes: int, blocks: int) -> Aligned:
    """Every byte is as much of a token as any other."""
    ends = (-(-(block * block_bytes * tokens) // max(size, 1)) for block in range(1, blocks + 1))
    return Aligned(tuple(min(end, tokens) for end in ends), False)


def agreeing_tokens(
    tokenizer: Any,
    tokens: TokenBytes,
    prompt: Sequence[int],
    generated: Sequence[int],
    text: str,
    *,
    keeps_edges: bool = False,
) -> int:
    """How many of the generated tokens will come again when the next prompt holds `text` in their place.

    Tokenizes the prompt's last few tokens with `text` behind them, as the next prompt will be, and counts as far as
    that gives the generated tokens. One fewer where it comes to the end of the text, since the last token may merge
    with what follows. `keeps_edges` says that the template leaves white space around texts; otherwise text that begins
    with it counts none, and white space at the end is left out. About 1 ms for 1,000 tokens.
    """
    body = text if keeps_edges else text.strip()
    if not body or not generated:
        return 0
    tail = _tail(prompt, tokens.special)
    context = b"".join(tokens.table[token] for token in tail).decode("utf-8", "ignore")
    again = tokenizer.encode(context + body, add_special_tokens=False)
    behind = _behind(tokens, again, tail, len(context.encode()), body)
    count = 0
    for ours, theirs in zip(generated, behind, strict=False):
        if ours != theirs:
            break
        count += 1
    return max(count - 1, 0) if count == len(behind) else count


def _behind(
    tokens: TokenBytes, again: Sequence[int], tail: Sequence[int], context_bytes: int, body: str
) -> Sequence[int]:
    """The tokens of `again` behind the context; none where the context ends within one of them or reads otherwise."""
    known = tokens.join_and_ends(again)
    if not known or not again:
        return ()
    ends = known[1].tolist()
    extra = ends[-1] - context_bytes - len(body.encode("utf-8", "surrogatepass"))
    if extra not in (0, 1):  # One: SentencePiece's space before the first word.
        return ()
    if not tail:
        return again
    at = bisect_left(ends, context_bytes + extra) + 1
    same = min(at, len(tail), _SAME_TOKENS)
    if ends[at - 1] != context_bytes + extra or list(again[at - same : at]) != list(tail[-same:]):
        return ()
    return again[at:]


def _tail(prompt: Sequence[int], special: frozenset[int]) -> list[int]:
    """The prompt's end from its last special token on, where the tokenizer starts afresh."""
    tail = list(prompt[-_TAIL_TOKENS:])
    for i in range(len(tail) - 1, -1, -1):
        if tail[i] in special:
            return tail[i:]
    return tail
