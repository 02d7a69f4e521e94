"""Reads prompts from the bodies of vLLM's HTTP endpoints. Pure; `canonical` owns the form."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import msgspec
from msgspec import Raw, Struct

from router.prefix.draft import (
    ASSISTANT,
    HEADS,
    MAX_PARTS,
    PART,
    SYSTEM,
    TOOL,
    USER,
    Draft,
    Unread,
    call_id,
    head,
    is_mark,
    name,
    utf8,
)
from router.prefix.grpc_prompts import token_bytes
from router.prefix.http_parts import (
    NONE,
    NULLS,
    Add,
    Content,
    Message,
    Part,
    Shape,
    add_call,
    add_content,
    add_parts,
    content_of,
    shape_of,
    string,
    text_of,
)
from router.prefix.window import decode

T = TypeVar("T")

CHAT_PATH: Final = "/v1/chat/completions"
TEXT_PATH: Final = "/v1/completions"
_BILLING: Final = "x-anthropic-billing-header"
"""Changes with each request; vLLM takes such texts out."""


def read(path: str, body: bytes, limit: int) -> Draft | None:
    """The prompt of a POST to `path`; None where it has none. Raises `msgspec.MsgspecError` and `ValueError`."""
    reader = READERS.get(path) or READERS.get(path.partition("?")[0])
    return None if reader is None else reader(body, limit)


def read_on(draft: Draft, write: Callable[[Sequence[T], Draft], None], items: Sequence[T]) -> None:
    """Writes `items` as far as they are understood."""
    try:
        write(items, draft)
    except Unread:
        draft.unread_bytes = draft.unread_bytes or 1


def _read_rest(
    draft: Draft, write: Callable[[Sequence[T], Draft], None], items: Sequence[T], unread_bytes: int
) -> None:
    """The same behind what is written already, where all of that was understood."""
    understood = not draft.unread_bytes
    draft.unread_bytes = unread_bytes
    if understood:
        read_on(draft, write, items)
    else:
        draft.unread_bytes = unread_bytes or 1


# -- chat


class _ChatBody(Shape, gc=False):
    messages: list[Message] | None = None
    continue_final_message: Raw = NONE


chat_body: Final = msgspec.json.Decoder(_ChatBody)
BARE_CHAT: Final = _ChatBody()
CHAT_ENDS: Final = (b'"}]}', b'"}]}]}')


def _chat(body: bytes, limit: int) -> Draft | None:
    return chat_draft(Draft("chat", ASSISTANT), *decode(chat_body, body, limit, CHAT_ENDS))


def chat_draft(draft: Draft, found: _ChatBody, unread_bytes: int) -> Draft | None:
    """`draft` has the parts of earlier messages."""
    messages, found.messages = found.messages, None
    if not messages and not draft.parts:
        return None
    _read_rest(draft, add_messages, messages or [], unread_bytes)
    if found != BARE_CHAT:  # As it is for most; comparing all fields at once takes a quarter of looking at each.
        draft.shape = shape_of(found)
        if messages and bytes(found.continue_final_message) == b"true":
            draft.answer = _continued(draft, messages[-1])
    return draft


def add_messages(messages: Sequence[Message], draft: Draft) -> None:
    add = draft.parts.append
    head_of = HEADS.get
    for message in messages:
        content = message.content
        add(head_of(message.role) or head(message.role))
        if type(content) is str:
            if content:
                add(content if content.isascii() else utf8(content))
        elif content is not None:
            add_parts(content, add)
        if message.tool_calls is not None or message.name is not None or message.tool_call_id is not None:
            _add_extras(message, add)
        if len(draft.parts) > MAX_PARTS:
            raise Unread


def _add_extras(message: Message, add: Add) -> None:
    for made in (message.tool_calls or ())[:MAX_PARTS]:
        add_call(made.function.name, made.function.arguments, made.id, add)
    if message.name:
        add(name(message.name))
    if message.tool_call_id:
        add(call_id(message.tool_call_id))


def _continued(draft: Draft, last: Message) -> str | None:
    """What comes before the answer's text where it goes on with the last message."""
    part = draft.parts[-1]
    return "" if part == head(last.role) or not (is_mark(part) or last.tool_calls) else None


# -- completions, token ids, embeddings, scores


class _PromptBody(Shape, gc=False):
    prompt: Raw = NONE
    token_ids: Raw = NONE
    input: Raw = NONE
    texts: Raw = NONE
    messages: list[Message] | None = None


class _TextBody(Shape, gc=False, kw_only=True):
    prompt: str


class _PairBody(Struct, gc=False):
    text_1: Raw = NONE
    text_2: Raw = NONE
    data_1: Raw = NONE
    data_2: Raw = NONE
    queries: Raw = NONE
    query: Raw = NONE
    documents: Raw = NONE


class _First(Struct, array_like=True, gc=False):
    """The first item of a list; the others are only skipped."""

    first: Raw = NONE


prompt_body: Final = msgspec.json.Decoder(_PromptBody)
text_body: Final = msgspec.json.Decoder(_TextBody)
BARE_TEXT: Final = _TextBody(prompt="")
_pair_body: Final = msgspec.json.Decoder(_PairBody)
one_text: Final = msgspec.json.Decoder(str)
_first: Final = msgspec.json.Decoder(_First)
token_ids: Final = msgspec.json.Decoder(list[int])
_NUMBERS: Final = re.compile(rb"\[\s{0,64}\d")
_TEXT_ENDS: Final = (b'"}',)
PROMPT_ENDS: Final = (b'"}', b"]}", b'"]}', b"]]}", *CHAT_ENDS)


def _completion(body: bytes, limit: int) -> Draft | None:
    try:  # A single text is most common, and then decoded in one pass.
        text, unread_bytes = decode(text_body, body, limit, _TEXT_ENDS)
    except msgspec.DecodeError:
        found, unread_bytes = decode(prompt_body, body, limit, PROMPT_ENDS)
        return _prompt(Draft("completion", ""), found.prompt, found, unread_bytes, limit)
    draft = Draft("completion", "", [utf8(text.prompt)])
    draft.unread_bytes = unread_bytes
    draft.shape = shape_of(text)
    return draft


def _generate(body: bytes, limit: int) -> Draft | None:
    found, unread_bytes = decode(prompt_body, body, limit, PROMPT_ENDS)
    return _prompt(Draft("completion", ""), found.token_ids, found, unread_bytes, limit)


def _embedding(body: bytes, limit: int) -> Draft | None:
    found, unread_bytes = decode(prompt_body, body, limit, PROMPT_ENDS)
    value = found.texts if found.input is NONE else found.input
    return _prompt_or_chat("embedding", value, found, unread_bytes, limit)


def _tokenize(body: bytes, limit: int) -> Draft | None:
    found, unread_bytes = decode(prompt_body, body, limit, PROMPT_ENDS)
    return _prompt_or_chat("tokenize", found.prompt, found, unread_bytes, limit)


def _prompt(draft: Draft, value: Raw, found: _PromptBody, unread_bytes: int, limit: int) -> Draft | None:
    if not _add_prompt(draft, value, limit):
        return None
    draft.unread_bytes += unread_bytes
    draft.shape = shape_of(found)
    return draft


def _prompt_or_chat(kind: str, value: Raw, found: _PromptBody, unread_bytes: int, limit: int) -> Draft | None:
    if not found.messages:
        return _prompt(Draft(kind), value, found, unread_bytes, limit)
    draft = Draft(f"{kind}-chat")
    draft.unread_bytes = unread_bytes
    draft.shape = shape_of(found)
    read_on(draft, add_messages, found.messages)
    return draft


def _add_prompt(draft: Draft, value: Raw, limit: int) -> bool:
    """Writes a text or token ids, of several the first; False where it is neither."""
    raw = bytes(value)
    if raw[:1] == b"[" and not _NUMBERS.match(raw):
        raw = bytes(_first.decode(raw).first)
    if raw[:1] == b'"':
        draft.parts.append(utf8(string(raw)))
        return True
    if raw[:1] == b"[":
        _add_tokens(draft, raw, limit)
        return True
    return False


def _add_tokens(draft: Draft, raw: bytes, limit: int) -> None:
    if len(raw) > limit:
        comma = max(raw.rfind(b",", 0, limit), 0)
        draft.unread_bytes += len(raw) - comma
        raw = raw[:comma] + b"]"
    draft.tokens = token_bytes(token_ids.decode(raw))


def _pair(body: bytes, limit: int) -> Draft | None:
    """A score of two texts, or a ranking of documents for a query: the first pair."""
    found, unread_bytes = decode(_pair_body, body, limit, PROMPT_ENDS)
    draft = Draft("pair")
    for value in (
        _one_of(found.text_1, found.data_1, found.queries, found.query),
        _one_of(found.text_2, found.data_2, found.documents),
    ):
        if not _add_prompt(draft, value, limit) or draft.tokens is not None:
            return None
    draft.parts.insert(1, PART)
    draft.unread_bytes = unread_bytes
    return draft


def _one_of(*values: Raw) -> Raw:
    return next((value for value in values if value is not NONE), NONE)


# -- the Responses API


class Item(Struct, gc=False):
    type: str | None = None
    role: str | None = None
    content: Content = None
    name: str | None = None
    arguments: Raw = NONE
    input: Raw = NONE
    output: Raw = NONE
    call_id: str | None = None
    status: str | None = None


class _ResponsesBody(Shape, gc=False):
    input: str | list[Item] | None = None
    instructions: str | None = None
    previous_response_id: Raw = NONE
    previous_input_messages: Raw = NONE


responses_body: Final = msgspec.json.Decoder(_ResponsesBody)
RESPONSES_ENDS: Final = (*CHAT_ENDS, b'"}')
_CALLS: Final = frozenset({"function_call", "custom_tool_call"})
_RESULTS: Final = frozenset({"function_call_output", "custom_tool_call_output"})
_UNFINISHED: Final = frozenset({"in_progress", "incomplete"})


def _responses(body: bytes, limit: int) -> Draft | None:
    return responses_draft(Draft("chat", ASSISTANT), *decode(responses_body, body, limit, RESPONSES_ENDS))


def responses_draft(draft: Draft, found: _ResponsesBody, unread_bytes: int) -> Draft | None:
    """`draft` has the parts of earlier items."""
    earlier = (found.previous_response_id, found.previous_input_messages)
    if not (found.input or draft.parts) or any(bytes(value) not in NULLS for value in earlier):
        return None  # Or the prompt begins with what only a replica knows.
    draft.shape = shape_of(found)
    _begin(draft, found.instructions)
    if isinstance(found.input, str):
        draft.unread_bytes = unread_bytes
        draft.parts += (USER, utf8(found.input))
        return draft
    _read_rest(draft, add_items, found.input or [], unread_bytes)
    if found.input and found.input[-1].status in _UNFINISHED:
        draft.answer = None
    return draft


def add_items(items: Sequence[Item], draft: Draft) -> None:
    add = draft.parts.append
    assistant = draft.assistant
    for item in items:
        kind = item.type or "message"
        if kind in _CALLS:
            if not assistant:
                add(ASSISTANT)
            add_call(item.name or "", item.arguments if item.input is NONE else item.input, item.call_id, add)
            assistant = True
        elif kind in _RESULTS:
            add(TOOL)
            add_content(content_of(item.output), add)
            add(call_id(item.call_id or ""))
            assistant = False
        elif kind == "message" and item.role is not None:
            add(head(item.role))
            add_content(item.content, add)
            assistant = item.role == "assistant"
        elif kind != "reasoning":
            raise Unread
        if len(draft.parts) > MAX_PARTS:
            raise Unread
    draft.assistant = assistant


# -- the Messages API


class _MessagesBody(Shape, gc=False):
    messages: list[Message] | None = None
    system: str | list[Part | str] | None = None


messages_body: Final = msgspec.json.Decoder(_MessagesBody)


def _messages(body: bytes, limit: int) -> Draft | None:
    return messages_draft(Draft("chat", ASSISTANT), *decode(messages_body, body, limit, CHAT_ENDS))


def messages_draft(draft: Draft, found: _MessagesBody, unread_bytes: int) -> Draft | None:
    """`draft` has the parts of earlier messages."""
    messages = found.messages or []
    if not messages and not draft.parts:
        return None
    draft.shape = shape_of(found)
    _begin(draft, found.system)
    _read_rest(draft, add_turns, messages, unread_bytes)
    if messages and messages[-1].role == "assistant":
        draft.answer = None
    return draft


def _begin(draft: Draft, system: Content) -> None:
    """Puts a system message before all others."""
    parts, draft.parts = draft.parts, []
    _add_system(system, draft.parts.append)
    draft.parts += parts


def _add_system(system: Content, add: Add) -> None:
    """A system message, or none where it says nothing; its texts run into each other, as vLLM joins them."""
    if not system:
        return
    if isinstance(system, str):
        text = system
    else:
        texts = [text_of(part) or "" for part in system[:MAX_PARTS]]
        text = "".join(text for text in texts if not text.startswith(_BILLING))
    if text:
        add(SYSTEM)
        add(utf8(text))


def add_turns(messages: Sequence[Message], draft: Draft) -> None:
    add = draft.parts.append
    for message in messages:
        content = message.content
        if message.role == "system":
            if not (isinstance(content, str) and content.startswith(_BILLING)):
                _add_system(content, add)
        elif isinstance(content, str):
            add(head(message.role))
            add_content(content, add)
        elif content is not None:
            _add_blocks(message.role, content, add)
        if len(draft.parts) > MAX_PARTS:
            raise Unread


def _add_blocks(role: str, blocks: Sequence[Part | str], add: Add) -> None:
    """A turn of several blocks: tool results are messages of their own before it, tool calls come after its texts."""
    said: list[Part | str] = []
    calls: list[Part] = []
    for block in blocks[:MAX_PARTS]:
        if isinstance(block, str) or block.type in ("text", "image"):
            said.append(block)
        elif block.type == "tool_use":
            calls.append(block)
        elif block.type == "tool_result" and role == "user":
            _add_result(block, add)
        elif block.type not in ("thinking", "redacted_thinking", "tool_reference"):
            raise Unread
    if said or calls or role != "user":
        add(head(role))
        add_parts(said, add)
        for used in calls:
            add_call(used.name or "", used.input, used.id, add)


def _add_result(block: Part, add: Add) -> None:
    """A tool's answer: its texts by lines, then its pictures as a message of the user's."""
    content = content_of(block.content)
    said = [content] if isinstance(content, str) else (content or [])[:MAX_PARTS]
    texts = [text for part in said if (text := text_of(part)) is not None]
    add(TOOL)
    add_content("\n".join(texts), add)
    add(call_id(block.tool_use_id or ""))
    pictures = [part for part in said if not isinstance(part, str) and part.type == "image"]
    if pictures:
        add(USER)
        add_parts(pictures, add)


READERS: Final[dict[str, Callable[[bytes, int], Draft | None]]] = {
    CHAT_PATH: _chat,
    TEXT_PATH: _completion,
    "/inference/v1/generate": _generate,
    "/v1/responses": _responses,
    "/v1/messages": _messages,
    "/v1/embeddings": _embedding,
    "/v2/embed": _embedding,
    "/pooling": _embedding,
    "/classify": _embedding,
    "/score": _pair,
    "/v1/score": _pair,
    "/rerank": _pair,
    "/v1/rerank": _pair,
    "/v2/rerank": _pair,
    "/tokenize": _tokenize,
}
