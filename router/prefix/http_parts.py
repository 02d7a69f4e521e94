"""What the bodies of several HTTP APIs are made of: contents of parts, media, tool calls, and what shapes a prompt.

Bodies are decoded into types that hold what is needed and skip the rest: what is not as expected ends the decoding at
once, so that megabytes of nested lists cost no more than a glance. Media stay raw and are hashed where they lie. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import msgspec
from msgspec import Raw, Struct

from router.prefix.draft import MAX_PARTS, PART, Unread, call, call_id, compact, media, utf8

NONE: Final = Raw()
"""A field that is not there."""
NULLS: Final = (b"", b"null", b"[]", b"{}")
_QUOTE, _BRACE = b'"{'

Add: TypeAlias = Callable[[str], None]


class Part(Struct, gc=False):
    """A part of a content, of any API."""

    type: str | None = None
    text: str | None = None
    refusal: str | None = None
    thinking: str | None = None
    uuid: str | None = None
    image_url: Raw = NONE
    video_url: Raw = NONE
    audio_url: Raw = NONE
    input_audio: Raw = NONE
    image_embeds: Raw = NONE
    audio_embeds: Raw = NONE
    video_embeds: Raw = NONE
    source: Raw = NONE
    # Anthropic's tool use and its result.
    id: str | None = None
    name: str | None = None
    input: Raw = NONE
    tool_use_id: str | None = None
    content: Raw = NONE


Content: TypeAlias = str | list[Part | str] | None


class Function(Struct, gc=False):
    name: str
    arguments: Raw = NONE


class ToolCall(Struct, gc=False):
    function: Function
    id: str | None = None


class Message(Struct, gc=False):
    role: str  # Demanded, so that a million empty objects are refused at the first one.
    content: Content = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[ToolCall] | None = None


class _Source(Struct, gc=False):
    """Where media come from: a URL, or base64 text."""

    url: Raw = NONE
    data: Raw = NONE


_TEXTS: Final = frozenset({"text", "input_text", "output_text"})
_MEDIA_FIELDS: Final = (
    "image_url", "video_url", "audio_url", "input_audio", "image_embeds", "audio_embeds", "video_embeds", "source",
)  # fmt: skip
_string: Final = msgspec.json.Decoder(str)
_source: Final = msgspec.json.Decoder(_Source)
_content: Final[msgspec.json.Decoder[str | list[Part | str] | None]] = msgspec.json.Decoder(Content)


def string(raw: bytes) -> str:
    """A JSON string's text. Raises `msgspec.DecodeError`."""
    return _string.decode(raw)


def content_of(raw: Raw) -> Content:
    """A content that was left raw. Raises `msgspec.DecodeError`."""
    return _content.decode(bytes(raw) or b"null")


def text_of(part: Part | str) -> str | None:
    """A part's text; empty where it says nothing, None where it is no text."""
    if isinstance(part, str):
        return part
    kind = part.type
    if kind in _TEXTS:
        return part.text or ""
    if kind == "refusal":
        return part.refusal or ""
    if kind == "thinking":
        return part.thinking or ""
    return None


def add_content(content: Content, add: Add) -> None:
    """A message's content. Raises `Unread`."""
    if isinstance(content, str):
        if content:
            add(utf8(content))
    elif content is not None:
        add_parts(content, add)


def add_parts(parts: Sequence[Part | str], add: Add) -> None:
    """A content of several parts; one text alone is the same as the text without parts. Raises `Unread`."""
    after_text = False
    for part in parts[:MAX_PARTS]:
        text = text_of(part)
        if text is None:
            add(_media(part))
            after_text = False
        elif text:
            if after_text:
                add(PART)
            add(utf8(text))
            after_text = True


def _media(part: Part | str) -> str:
    if isinstance(part, str):
        raise Unread
    if part.uuid is not None:
        return media(b"uuid:" + part.uuid.encode())
    for field in _MEDIA_FIELDS:
        raw = bytes(getattr(part, field))
        if raw not in NULLS:
            return media(_media_content(raw))
    raise Unread


def _media_content(raw: bytes) -> bytes | memoryview:
    """What stands for the media in JSON of some form: a URL, base64 text, or the JSON itself."""
    if raw[0] == _QUOTE:
        return memoryview(raw)[1:-1] if b"\\" not in raw else string(raw).encode()
    if raw[0] == _BRACE:
        found = _source.decode(raw)
        inner = bytes(found.url) or bytes(found.data)
        if inner[:1] == b'"':
            return _media_content(inner)
    return compact(raw)


def add_call(function: str, arguments: Raw, number: str | None, add: Add) -> None:
    """A tool call; its arguments are a string of JSON, or JSON."""
    raw = bytes(arguments) or b"{}"
    add(call(function))
    add(utf8(string(raw)) if raw[0] == _QUOTE else compact(raw).decode("latin-1"))
    add(call_id(number or ""))


class Shape(Struct, gc=False):
    """What is rendered before the messages, or changes how they are."""

    tools: Raw = NONE
    documents: Raw = NONE
    chat_template: Raw = NONE
    chat_template_kwargs: Raw = NONE
    reasoning_effort: Raw = NONE
    reasoning: Raw = NONE
    """Responses API."""
    thinking: Raw = NONE
    """Messages API."""
    output_config: Raw = NONE
    """Messages API."""
    mm_processor_kwargs: Raw = NONE
    truncate_prompt_tokens: Raw = NONE
    add_special_tokens: Raw = NONE


_SHAPE_FIELDS: Final = Shape.__struct_fields__


def shape_of(body: Shape) -> list[tuple[str, bytes]]:
    """The fields that are there, as JSON."""
    values = [(field, getattr(body, field)) for field in _SHAPE_FIELDS]
    return [(field, text) for field, value in values if value is not NONE and (text := bytes(value)) not in NULLS]
