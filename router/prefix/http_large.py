"""Reads prompts from large bodies of HTTP requests, in slices between which the event loop runs.

Pure: generators that yield after each slice. Rule: the prompt is what `http_prompts` reads of the same body; lists and
texts are taken out of it slice by slice (see `lists`), and what is left is read at once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, Final, TypeAlias

import msgspec

from router.prefix import http_prompts as prompts
from router.prefix import lists, window
from router.prefix.draft import ASSISTANT, Draft, utf8
from router.prefix.grpc_prompts import token_bytes
from router.prefix.http_parts import Message, shape_of

LARGE_BYTES: Final = window.LARGE_BYTES + 1
"""From which on a body is read so."""

Slices: TypeAlias = Generator[None, None, Draft | None]


class _Conversation(msgspec.Struct):
    """How a conversation's bodies are read."""

    field: str
    items: msgspec.json.Decoder[Any]
    write: Callable[[Sequence[Any], Draft], None]
    body: msgspec.json.Decoder[Any]
    ends: tuple[bytes, ...]
    finish: Callable[[Draft, Any, int], Draft | None]


def read(path: str, body: bytes, limit: int) -> Slices:
    """The prompt of a POST to `path`; None where it has none. Raises `msgspec.MsgspecError` and `ValueError`."""
    yield  # The caller's own work is a slice of its own.
    path = path if path in prompts.READERS else path.partition("?")[0]
    if path not in prompts.READERS:
        return None
    body = yield from window.media_cut_out(body)
    yield
    if path in _CONVERSATIONS:
        return (yield from _conversation(_CONVERSATIONS[path], body, limit))
    if path in _PROMPTS:
        draft = yield from _prompt(*_PROMPTS[path], body, limit)
        if draft is not None:
            return draft
    return prompts.READERS[path](body, limit)


def _conversation(kind: _Conversation, body: bytes, limit: int) -> Slices:
    draft = Draft("chat", ASSISTANT)
    place = yield from lists.find(body, kind.field, kind.body, limit)
    if place is None or place.opening != b"[":
        found, unread_bytes = yield from window.decode_plain(kind.body, body, limit, kind.ends)
        yield
        return kind.finish(draft, found, unread_bytes)
    stop = len(body) if len(body) <= limit else limit - window.STRIDE  # Where it is cut is to be seen in what is left.
    taken = lists.Taken(body, place.at, stop, limit)
    while (items := (yield from taken.items(kind.items))) is not None:
        if not draft.unread_bytes:
            prompts.read_on(draft, kind.write, items)
        yield
    rest, left, lacking = taken.left()
    found, unread_bytes = yield from window.decode_plain(kind.body, rest, left, kind.ends)
    yield
    return kind.finish(draft, found, unread_bytes + lacking)


def _prompt(kind: str, answer: str | None, field: str, body: bytes, limit: int) -> Slices:
    """A text, or token ids, of several the first; None where it is neither."""
    place = yield from lists.find(body, field, prompts.prompt_body, limit)
    if place is None or not place.opening:
        return None
    draft, taken = Draft(kind, answer), lists.Taken(body, place.at, len(body), limit)
    if place.opening.endswith(b'"'):
        texts = []
        while (text := (yield from taken.text(prompts.one_text))) is not None:
            texts.append(utf8(text))
        draft.parts.append("".join(texts))
    elif body[place.at : place.at + 1].isdigit():
        tokens = []
        while (ids := (yield from taken.numbers(prompts.token_ids))) is not None:
            tokens.append(token_bytes(ids))
        draft.tokens = b"".join(tokens)
    else:
        return None
    yield
    if not taken.ended:
        head = taken.at - (draft.tokens is not None) + len(place.closing)  # Without the last comma.
        draft.unread_bytes = len(body) - head
        draft.shape = shape_of(place.before)
        return draft
    found = yield from _behind(taken, place, draft)
    return None if found.messages else draft


def _behind(taken: lists.Taken, place: lists.Place, draft: Draft) -> Generator[None, None, Any]:
    """What the body says but for the first prompt."""
    rest, left, lacking = taken.left()
    if place.opening == b"[[" and rest.startswith(b"],", place.at):
        others = lists.Taken(rest, place.at + 2, left - window.STRIDE, left)
        yield from others.skip_lists()
        rest, left, more = others.left()
        lacking += more
    found, unread_bytes = yield from window.decode_plain(prompts.prompt_body, rest, left, prompts.PROMPT_ENDS)
    draft.unread_bytes = unread_bytes + lacking
    draft.shape = shape_of(found)
    return found


_messages: Final = msgspec.json.Decoder(list[Message])
_CONVERSATIONS: Final = {
    "/v1/chat/completions": _Conversation(
        "messages", _messages, prompts.add_messages, prompts.chat_body, prompts.CHAT_ENDS, prompts.chat_draft
    ),
    "/v1/responses": _Conversation(
        "input",
        msgspec.json.Decoder(list[prompts.Item]),
        prompts.add_items,
        prompts.responses_body,
        prompts.RESPONSES_ENDS,
        prompts.responses_draft,
    ),
    "/v1/messages": _Conversation(
        "messages", _messages, prompts.add_turns, prompts.messages_body, prompts.CHAT_ENDS, prompts.messages_draft
    ),
}
_PROMPTS: Final[dict[str, tuple[str, str | None, str]]] = {
    "/v1/completions": ("completion", "", "prompt"),
    "/inference/v1/generate": ("completion", "", "token_ids"),
    "/v1/embeddings": ("embedding", None, "input"),
    "/tokenize": ("tokenize", None, "prompt"),
}
