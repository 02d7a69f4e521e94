"""Prefix blocks among the tokens of rendered prompts."""

from __future__ import annotations

import struct
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine.alignment import Aligned, Aligner, TokenBytes, agreeing_tokens
from router.prefix.canonical import Piece, PieceKind

tokenizers = pytest.importorskip("tokenizers")

Messages = list[tuple[str, str]]
Render = Callable[[Messages], str]

TEXT = (
    "The old harbour town wakes before the sun. Boats come back with their nets full, and the people on the quay call "
    "out the prices of the morning. A router sends each request to the server that will answer it first: user, system, "
    "assistant. 0 1 2 3 4 5 6 7 8 9 Straße мир 東京",
)
SPECIAL = ["<|im_start|>", "<|im_end|>"]
LONG: Messages = [
    ("system", "You answer briefly, as the people on the quay do."),
    ("user", "Tell me where the boats come back to, please."),
    ("assistant", "They come back to the old harbour, with their nets full."),
    ("user", "And when does the old harbour town wake up?"),
]


class Tokenizer:
    """What vLLM's tokenizers have in common, around one of the `tokenizers` library."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.all_special_ids = [inner.token_to_id(name) for name in SPECIAL]

    def get_vocab(self) -> dict[str, int]:
        return dict(self.inner.get_vocab())

    def get_added_vocab(self) -> dict[str, int]:
        return {name: self.inner.token_to_id(name) for name in SPECIAL}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self.inner.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return str(self.inner.decode(ids, skip_special_tokens=skip_special_tokens))


def byte_level() -> Tokenizer:
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(TEXT, trainer)
    return Tokenizer(inner)


def sentence_piece() -> Tokenizer:
    """As Llama 2 has it: a space before the first word, spaces as U+2581, unknown letters byte by byte."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, normalizers, trainers

    inner = Inner(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=560, special_tokens=["<unk>", *SPECIAL, *names], show_progress=False, max_token_length=8
    )
    # Words one by one, so that no token reaches over a space.
    inner.train_from_iterator((word for text in TEXT for word in text.split()), trainer)
    return Tokenizer(inner)


KINDS = {"byte level": byte_level, "sentence piece": sentence_piece}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]()


@pytest.fixture(scope="module")
def tokens(tokenizer: Tokenizer) -> TokenBytes:
    tokens = TokenBytes.of(tokenizer)
    assert tokens is not None
    return tokens


def canonical(messages: Messages) -> tuple[bytes, list[Piece]]:
    data, pieces = b"", list[Piece]()
    for role, content in messages:
        for part, kind in ((b"\xf5" + role.encode() + b"\xf6", PieceKind.MARK), (content.encode(), PieceKind.TEXT)):
            if part:
                pieces.append(Piece(len(data), len(part), kind))
                data += part
    return data, pieces


def chatml(messages: Messages) -> str:
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in messages) + "<|im_start|>assistant\n"


def trimming(messages: Messages) -> str:
    return chatml([(role, text.strip()) for role, text in messages])


def places(messages: Messages, spaced: bool) -> list[tuple[int, int, int]]:
    """Where each text stands in the canonical bytes and among the tokens' bytes: both starts and the length.

    `spaced`: a space comes behind each special token, and before the first word.
    """
    found, x, y = [], 0, 0
    for role, text in messages:
        x += len(role.encode()) + 2
        y += len(f"<|im_start|>{' ' if spaced else ''}{role}\n".encode())
        size = len(text.encode())
        found.append((x, y, size))
        x += size
        y += size + len(f"<|im_end|>{' ' if spaced else ''}\n")
    return found


def covering(tokens: TokenBytes, ids: Sequence[int], place: int) -> int:
    """How many tokens cover the first `place` bytes."""
    end = 0
    for count, token in enumerate(ids, 1):
        end += len(tokens.table[token])
        if end >= place:
            return count
    raise AssertionError


def check_exact(aligner: Aligner, tokenizer: Tokenizer, messages: Messages, block_bytes: int) -> None:
    assert aligner.tokens is not None
    data, pieces = canonical(messages)
    ids = tokenizer.encode(chatml(messages), add_special_tokens=False)
    spaced = b" " in aligner.tokens.table[tokenizer.encode("<|im_end|>.")[1]]
    aligned = aligner.ends(data, pieces, ids, block_bytes, len(data) // block_bytes)
    assert aligned.exact
    assert len(aligned.ends) == len(data) // block_bytes
    assert list(aligned.ends) == sorted(aligned.ends)
    for block, end in enumerate(aligned.ends, 1):
        for x, y, length in places(messages, spaced):
            if x < block * block_bytes <= x + length:
                assert end == covering(aligner.tokens, ids, y + block * block_bytes - x)


def test_joined_tokens_are_the_text(tokenizer: Tokenizer, tokens: TokenBytes) -> None:
    text = "  A naïve\n\n text, 東京 🙂"
    known = tokens.join_and_ends(tokenizer.encode(text, add_special_tokens=False))
    assert known is not None
    joined, ends = known
    assert text in (joined.decode(), joined[1:].decode())
    assert ends[-1] == len(joined)
    assert tokens.join_and_ends([len(tokens.table)]) is None


def test_a_tokenizer_that_does_not_give_texts_back_has_no_table() -> None:
    class WordPiece(Tokenizer):
        def get_vocab(self) -> dict[str, int]:
            return {f"##{name}": token for name, token in super().get_vocab().items()}

    assert TokenBytes.of(WordPiece(byte_level().inner)) is None


def test_blocks_end_where_their_bytes_do(tokenizer: Tokenizer, tokens: TokenBytes) -> None:
    check_exact(Aligner(tokens), tokenizer, LONG, 7)


CONTENT = st.one_of(
    st.text("aeu s\n", min_size=1, max_size=6),
    st.sampled_from(["user", "user\n", "assistant\n", "<|im_end|>\n", "<|im_start|>user\n", " \n", "🙂 мир", "same"]),
    st.text(min_size=1, max_size=30).filter(lambda text: text.isprintable()),
)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), CONTENT), min_size=1, max_size=6), st.integers(1, 20))
@pytest.mark.parametrize("kind", KINDS)
def test_ends_are_exact_where_the_template_copies_texts(kind: str, messages: Messages, block_bytes: int) -> None:
    tokenizer, tokens = _made(kind)
    # SentencePiece does not give these back as they were.
    assume(kind == "byte level" or not any("<|" in text or "\u2581" in text for _, text in messages))
    aligner = Aligner(tokens)
    check_exact(aligner, tokenizer, LONG, 16)  # It has met each role before.
    check_exact(aligner, tokenizer, messages, block_bytes)


_MADE: dict[str, tuple[Tokenizer, TokenBytes]] = {}


def _made(kind: str) -> tuple[Tokenizer, TokenBytes]:
    if kind not in _MADE:
        tokenizer = KINDS[kind]()
        tokens = TokenBytes.of(tokenizer)
        assert tokens is not None
        _MADE[kind] = tokenizer, tokens
    return _MADE[kind]


def align(
    aligner: Aligner, tokenizer: Tokenizer, messages: Messages, render: Render, block_bytes: int = 8
) -> tuple[Aligned, list[int], bytes]:
    data, pieces = canonical(messages)
    ids = tokenizer.encode(render(messages), add_special_tokens=False)
    return aligner.ends(data, pieces, ids, block_bytes, len(data) // block_bytes), ids, data


def end_after(aligner: Aligner, ids: Sequence[int], ending: bytes) -> int:
    assert aligner.tokens is not None
    known = aligner.tokens.join_and_ends(ids)
    assert known is not None
    return covering(aligner.tokens, ids, known[0].index(ending) + len(ending))


def test_trimmed_texts_are_found_and_remembered(tokenizer: Tokenizer, tokens: TokenBytes) -> None:
    aligner = Aligner(tokens)
    messages = [("user", "  where do the boats come back to?\n\n"), ("assistant", "To the old harbour town"), *LONG[3:]]
    aligned, ids, data = align(aligner, tokenizer, messages, trimming, block_bytes=1)
    assert aligned.exact
    assert not aligner.keeps_edges
    end = data.index(b"harbour town") + len(b"harbour town")
    assert aligned.ends[end - 1] == end_after(aligner, ids, b"To the old harbour town")


def test_white_space_that_the_template_keeps_is_noticed(tokenizer: Tokenizer, tokens: TokenBytes) -> None:
    aligner = Aligner(tokens)
    assert not aligner.keeps_edges
    align(aligner, tokenizer, LONG, chatml)
    align(aligner, tokenizer, [("user", "\n  where do the boats come back to?")], chatml)
    assert aligner.keeps_edges


def test_a_text_that_the_template_changes_does_not_spoil_those_behind_it(
    tokenizer: Tokenizer, tokens: TokenBytes
) -> None:
    def thoughtless(messages: Messages) -> str:
        return chatml([(role, text.split("</think>")[-1].strip()) for role, text in messages])

    aligner = Aligner(tokens)
    thought = "<think>" + "the harbour, the boats, the quay, " * 8 + "</think>\n\n"
    answer = "They wake before the sun, all the people on the quay and in the old harbour."
    messages = [*LONG, ("assistant", thought + answer), ("user", "And the boats, when do they come back to the town?")]
    aligned, ids, data = align(aligner, tokenizer, messages, thoughtless, block_bytes=1)
    assert not aligned.exact
    assert (aligner.exact, aligner.estimated) == (0, 1)
    for ending in (b"harbour town wake up?", b"in the old harbour.", b"come back to the town?"):
        end = data.rindex(ending) + len(ending)
        assert abs(aligned.ends[end - 1] - end_after(aligner, ids, ending)) <= 1
    assert list(aligned.ends) == sorted(aligned.ends)


def test_text_that_the_template_adds_before_a_message_is_passed_over(tokenizer: Tokenizer, tokens: TokenBytes) -> None:
    def with_tools(messages: Messages) -> str:
        return chatml([("system", "Tools: " + "get_weather(city) " * 90), *messages])

    aligner = Aligner(tokens)
    aligned, ids, data = align(aligner, tokenizer, LONG[1:], with_tools, block_bytes=1)
    assert aligned.exact
    end = data.index(b"please.") + len(b"please.")
    assert aligned.ends[end - 1] == end_after(aligner, ids, b"please.")


def test_a_prompt_whose_beginning_is_cut_off_is_not_tied(tokenizer: Tokenizer, tokens: TokenBytes) -> None:
    text = TEXT[0]
    ids = tokenizer.encode(text, add_special_tokens=False)[50:]
    aligner = Aligner(tokens)
    aligned = aligner.ends(text.encode(), [Piece(0, len(text.encode()), PieceKind.TEXT)], ids, 8, 40)
    assert aligned == Aligned((), False)


def test_placeholders_of_media_lie_between_the_texts(tokenizer: Tokenizer, tokens: TokenBytes) -> None:
    first, second = b"What do you see in this picture?", b"And what is the weather there?"
    data = b"\xf5user\xf6" + first + b"\xf7" + bytes(16) + second
    edges = [0, 6, 6 + len(first), len(data) - len(second), len(data)]
    kinds = [PieceKind.MARK, PieceKind.TEXT, PieceKind.MEDIA, PieceKind.TEXT]
    pieces = [Piece(x, y - x, kind) for x, y, kind in zip(edges, edges[1:], kinds, strict=False)]
    head = tokenizer.encode("<|im_start|>user\n" + first.decode(), add_special_tokens=False)
    ids = head + tokenizer.encode("<|im_start|>", add_special_tokens=False)[-1:] * 500
    ids += tokenizer.encode(second.decode() + "<|im_end|>", add_special_tokens=False)
    aligned = Aligner(tokens).ends(data, pieces, ids, 1, len(data))
    assert aligned.exact
    assert aligned.ends[edges[2] - 1] == len(head)
    assert len(head) < aligned.ends[edges[2] + 5] < aligned.ends[edges[3] - 1] <= len(head) + 501


def test_token_prompts_take_four_bytes_a_token() -> None:
    given_ids = [7, 8, 9, 1, 2, 3]
    data = struct.pack("<6I", *given_ids)
    pieces = [Piece(0, len(data), PieceKind.TOKENS)]
    aligner = Aligner(None)
    assert aligner.ends(data, pieces, given_ids, 6, 4) == Aligned((2, 3, 5, 6), True)
    assert aligner.ends(data, pieces, [7, 8, 9, 5, 5, 5], 6, 4) == Aligned((2, 3), False)
    assert aligner.ends(data, pieces, [9, 1, 2, 3], 6, 4) == Aligned((), False)


def test_without_a_table_ends_are_in_proportion_and_said_to_be_estimates() -> None:
    aligner = Aligner(None)
    data = b"x" * 100
    aligned = aligner.ends(data, [Piece(0, 100, PieceKind.TEXT)], list(range(25)), 16, 6)
    assert aligned == Aligned((4, 8, 12, 16, 20, 24), False)
    assert (aligner.exact, aligner.estimated) == (0, 1)


def test_tokens_beyond_the_table_are_aligned_in_proportion(tokens: TokenBytes) -> None:
    aligned = Aligner(tokens).ends(b"x" * 8, [Piece(0, 8, PieceKind.TEXT)], [len(tokens.table)] * 4, 4, 2)
    assert aligned == Aligned((2, 4), False)


def test_nothing_to_align_is_nothing(tokens: TokenBytes) -> None:
    aligner = Aligner(tokens)
    assert aligner.ends(b"", [], [1, 2], 16, 0) == Aligned((), True)
    assert aligner.ends(b"x", [Piece(0, 1, PieceKind.TEXT)], [], 1, 1) == Aligned((), True)


PROMPT = chatml([("user", "When do the boats come back?")])


def answered(tokenizer: Tokenizer, tokens: TokenBytes, text: str, ids: list[int] | None = None, **how: bool) -> int:
    prompt = tokenizer.encode(PROMPT, add_special_tokens=False)
    if ids is None:
        ids = tokenizer.encode(PROMPT + text, add_special_tokens=False)[len(prompt) :]
    return agreeing_tokens(tokenizer, tokens, prompt, ids, text, **how)


def test_an_answer_tokenized_as_its_text_agrees_but_for_its_last_token(
    tokenizer: Tokenizer, tokens: TokenBytes
) -> None:
    text = "They come back in the morning, with their nets full."
    prompt = tokenizer.encode(PROMPT, add_special_tokens=False)
    ids = tokenizer.encode(PROMPT + text, add_special_tokens=False)[len(prompt) :]
    assert answered(tokenizer, tokens, text) == len(ids) - 1
    assert answered(tokenizer, tokens, text, [*ids, *tokenizer.all_special_ids[1:]]) == len(ids) - 1


def test_what_agrees_does_come_again_in_the_next_prompt(tokenizer: Tokenizer, tokens: TokenBytes) -> None:
    prompt = tokenizer.encode(PROMPT, add_special_tokens=False)
    for text in ("In the morning.", "no", "0 1 2 3", "東京 🙂", "the the the\n", "<|im_end|>\n"):
        ids = tokenizer.encode(PROMPT + text, add_special_tokens=False)[len(prompt) :]
        agreeing = answered(tokenizer, tokens, text, ids)
        again = tokenizer.encode(PROMPT + text.strip() + "<|im_end|>\n<|im_start|>user\nmore", add_special_tokens=False)
        assert again[: len(prompt) + agreeing] == prompt + ids[:agreeing]


def test_an_answer_generated_in_other_tokens_agrees_up_to_there(tokenizer: Tokenizer, tokens: TokenBytes) -> None:
    head = tokenizer.encode(PROMPT + "They come back", add_special_tokens=False)
    prompt = tokenizer.encode(PROMPT, add_special_tokens=False)
    letters = tokenizer.encode(PROMPT + "They come back in", add_special_tokens=False)[len(head) :]
    slow = [token for token in range(len(tokens.table)) if tokens.table[token] in (b"m", b"o", b"r", b"n")]
    assert answered(tokenizer, tokens, "They come back in morn", head[len(prompt) :] + letters + slow) == len(
        head
    ) - len(prompt) + len(letters)


def test_white_space_at_the_edges_counts_only_where_the_template_keeps_it(
    tokenizer: Tokenizer, tokens: TokenBytes
) -> None:
    text = "\n\nThey come back in the morning"
    assert answered(tokenizer, tokens, text) == 0
    assert answered(tokenizer, tokens, text, keeps_edges=True) > 3
    assert answered(tokenizer, tokens, "") == answered(tokenizer, tokens, "x", []) == 0


def test_a_prompt_that_ends_within_a_word_agrees_only_if_the_word_is_cut_there_again(
    tokenizer: Tokenizer, tokens: TokenBytes
) -> None:
    prompt = tokenizer.encode("the old harb", add_special_tokens=False)
    whole = tokenizer.encode("the old harbour", add_special_tokens=False)
    generated = tokenizer.encode("our", add_special_tokens=False)
    agreeing = agreeing_tokens(tokenizer, tokens, prompt, generated, "our")
    assert (prompt + generated)[: len(prompt) + agreeing] == whole[: len(prompt) + agreeing] or agreeing == 0


def test_blocks_over_an_answer_end_within_the_tokens_that_agree(tokenizer: Tokenizer, tokens: TokenBytes) -> None:
    text = "They come back in the morning, with their nets full."
    prompt = tokenizer.encode(PROMPT, add_special_tokens=False)
    ids = tokenizer.encode(PROMPT + text, add_special_tokens=False)[len(prompt) :]
    aligner = Aligner(tokens)
    # The text begins at canonical byte 50; blocks 4 and up are asked for.
    ends = aligner.answer_ends(4, 10, 20, 50, 100, ids[:6])
    assert ends[0] == 100
    covered = sum(len(tokens.table[token]) for token in ids[:6])
    assert len(ends) == 1 + covered // 10
    for block, end in enumerate(ends[1:], 1):
        assert end == 100 + covering(tokens, ids, block * 10)
    assert Aligner(None).answer_ends(4, 10, 20, 50, 100, ids) == ()


def composed(messages: Messages) -> str:
    """As a tokenizer that normalizes writes texts."""
    return chatml([(role, unicodedata.normalize("NFC", text)) for role, text in messages])


@pytest.mark.parametrize(
    "text",
    ["cafe\u0301 {}", "When do the people in the cafe\u0301 {} wake up?", "a" * 300 + "e\u0301" + "a" * 300 + "{}"],
)
def test_the_search_for_texts_that_a_tokenizer_changed_is_bounded_by_the_prompt(tokens: TokenBytes, text: str) -> None:
    aligner = Aligner(tokens)
    messages = [("user", text.format(number)) for number in range(600)]
    data, pieces = canonical(messages)
    rendered = composed(messages).encode()
    letters = {table: token for token, table in enumerate(tokens.table) if len(table) == 1}
    ids = [letters[bytes([byte])] for byte in rendered]
    aligned = aligner.ends(data, pieces, ids, 256, len(data) // 256)
    assert not aligned.exact
    assert aligner.searched <= 5 * len(rendered) + 100_000
    assert list(aligned.ends) == sorted(aligned.ends)
    # What was not looked for any more lies about where it would in proportion.
    half = len(aligned.ends) // 2
    assert abs(aligned.ends[half] - len(ids) / 2) < len(ids) / 20


def test_a_prompt_whose_texts_are_copied_is_searched_once() -> None:
    tokenizer, tokens = _made("byte level")
    aligner = Aligner(tokens)
    messages = [*LONG, *((role, f"{text} {turn}") for turn in range(50) for role, text in LONG)]
    aligned, ids, _ = align(aligner, tokenizer, messages, chatml)
    assert aligned.exact
    known = tokens.join_and_ends(ids)
    assert known is not None
    assert aligner.searched <= len(known[0])


def test_a_short_text_behind_media_is_found_however_long_the_placeholders_are() -> None:
    tokenizer, tokens = _made("byte level")
    text = b"Why so?"
    data = b"\xf5user\xf6\xf7" + bytes(16) + text
    pieces = [Piece(0, 6, PieceKind.MARK), Piece(6, 17, PieceKind.MEDIA), Piece(23, len(text), PieceKind.TEXT)]
    head = tokenizer.encode("<|im_start|>user\n", add_special_tokens=False)
    ids = head + head[:1] * 4000 + tokenizer.encode("Why so?<|im_end|>", add_special_tokens=False)
    aligned = Aligner(tokens).ends(data, pieces, ids, 1, len(data))
    assert aligned.exact
    assert aligned.ends[23] == len(head) + 4001


@pytest.mark.slow  # transformers takes seconds to import.
def test_the_tiny_models_prompts_are_aligned_exactly(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from engine.tiny_model import make_tiny_model

    tokenizer = AutoTokenizer.from_pretrained(make_tiny_model(tmp_path))
    tokens = TokenBytes.of(tokenizer)
    assert tokens is not None
    aligner = Aligner(tokens)
    check_exact(aligner, tokenizer, LONG, 9)
    chat = [{"role": role, "content": text} for role, text in LONG]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    data, pieces = canonical(LONG)
    aligned = aligner.ends(data, pieces, ids, 9, len(data) // 9)
    assert aligned.exact
    end = data.index(b"please.") + len(b"please.")
    assert aligner.ends(data, pieces, ids, end, 1).ends == (end_after(aligner, ids, b"please."),)
