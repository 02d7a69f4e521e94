"""The canonical form while it is written: its marks, and what a reader of requests hands over.

A prompt is a run of parts. The bytes 0xF5 to 0xFF never occur in UTF-8, so they are the marks: nothing that a client
writes can look like one. Nothing is counted and nothing is closed, so a conversation's parts begin those of the same
conversation continued. Pure; holds no state.

Parts are kept as `str` in which each character stands for one byte: ASCII text, which is most of all text, then needs
no copy of its own, which saves a tenth of the time.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
import xxhash

MESSAGE: Final = "\xf5"
"""A message begins; its role follows."""
CONTENT: Final = "\xf6"
"""A message's content follows."""
NAME: Final = "\xf7"
"""Who speaks, beyond the role."""
CALL_ID: Final = "\xf8"
"""Id of the tool call before it, or of the one that this message answers."""
CALL: Final = "\xf9"
"""A tool call begins; the function's name follows."""
ARGUMENTS: Final = "\xfa"
"""The call's arguments follow."""
MEDIA: Final = "\xfb"
"""An image, a sound or a video: 16 bytes of its hash follow."""
PART: Final = "\xfc"
"""Parts two texts that do not run into each other."""
FIRST_MARK: Final = MESSAGE

MAX_PARTS: Final = 1 << 14
"""A prompt's rest is left out after so many parts: only a client that wants to keep the router busy sends more in
`MAX_PROMPT_BYTES`."""
MAX_SHAPE_BYTES: Final = 64 << 10
"""JSON up to this size is brought into one form before it is hashed; longer JSON is hashed as it came."""
MEDIA_STAND_IN: Final = b"kvlane-media:"
"""With 32 hexadecimal digits: what `window` puts in the place of long media."""

_MAX_URL_HEAD: Final = 256


class Unread(Exception):
    """Something that readers do not understand; the prompt's rest is left out."""


class Digest(bytes):
    """The hash of a value that is too long to be kept, in the place of the value."""


class Draft(msgspec.Struct, gc=False):
    """What a reader found; one reader writes it."""

    kind: str
    """Requests of different kinds share no prefixes."""
    answer: str | None = None
    """What comes before the answer's text in the next turn; None: nobody knows."""
    parts: list[str] = []
    """Each one mark with what belongs to it, or a text; a character per byte."""
    tokens: bytes | None = None
    """Token ids in the place of parts."""
    shape: list[tuple[str, bytes]] = []
    """What is rendered before the prompt, or changes how it is: names and values, as JSON."""
    unread_bytes: int = 0
    """How much of the request is in none of the parts; 1 where that is not known."""
    assistant: bool = False
    """The last part belongs to a message of the assistant's, and so do tool calls behind it (Responses API)."""


def utf8(text: str) -> str:
    """The UTF-8 form of `text`, a character per byte."""
    return text if text.isascii() else text.encode().decode("latin-1")


def _head(role: str) -> str:
    return f"{MESSAGE}{utf8(role)}{CONTENT}"


HEADS: Final = {role: _head(role) for role in ("system", "developer", "user", "assistant", "tool", "function")}
SYSTEM: Final = HEADS["system"]
USER: Final = HEADS["user"]
ASSISTANT: Final = HEADS["assistant"]
TOOL: Final = HEADS["tool"]


def head(role: str) -> str:
    """How a message begins; its content follows."""
    return HEADS.get(role) or _head(role)


def name(value: str) -> str:
    return NAME + utf8(value)


def call_id(value: str) -> str:
    return CALL_ID + utf8(value)


def call(function: str) -> str:
    """How a tool call begins; its arguments follow."""
    return f"{CALL}{utf8(function)}{ARGUMENTS}"


def media(content: bytes | memoryview) -> str:
    """The part for media; `content` is a URL, a data URL or base64 text, without escapes.

    Data URLs count by their payload alone, so that the same picture is the same in every API.
    """
    return MEDIA + media_hash(content).decode("latin-1")


def media_hash(content: bytes | memoryview) -> bytes:
    """16 bytes that stand for `content`."""
    start = bytes(content[:_MAX_URL_HEAD])
    if start.startswith(MEDIA_STAND_IN) and (known := _stood_in(start[len(MEDIA_STAND_IN) :])):
        return known
    return xxhash.xxh3_128_digest(content[_payload(start) :])


def media_start(content: memoryview) -> int:
    """Where in long media what counts begins; negative where they are a stand-in."""
    start = bytes(content[:_MAX_URL_HEAD])
    return -1 if start.startswith(MEDIA_STAND_IN) else _payload(start)


def _payload(start: bytes) -> int:
    return start.find(b",") + 1 if start.startswith(b"data:") else 0


def _stood_in(digits: bytes) -> bytes:
    """The hash that stands for media; empty where these are no such digits."""
    return bytes.fromhex(digits.decode()) if len(digits) == 32 and not digits.strip(b"0123456789abcdef") else b""


_reader: Final = msgspec.json.Decoder()
_writer: Final = msgspec.json.Encoder()


def compact(text: bytes) -> bytes:
    """JSON without optional white space and escapes. Raises `msgspec.DecodeError`."""
    return text if len(text) > MAX_SHAPE_BYTES else _writer.encode(_reader.decode(text))


def compact_tools(text: bytes) -> bytes:
    """A list of tools, which each API writes in a way of its own, in one form. Raises `msgspec.DecodeError`."""
    if len(text) > MAX_SHAPE_BYTES:
        return text
    tools = _reader.decode(text)
    return _writer.encode(list(map(_plain, tools)) if isinstance(tools, list) else tools)


def _plain(tool: Any) -> Any:
    """A tool's name, description and parameters, which is what templates show; a tool of another form as it is."""
    if not isinstance(tool, dict):
        return tool
    inner = tool.get("function")
    function = inner if isinstance(inner, dict) else tool
    if "name" not in function:
        return tool
    parameters = function.get("parameters") or function.get("input_schema")
    return function["name"], function.get("description") or None, parameters or None


def is_mark(part: str) -> bool:
    """Whether a part that is not empty begins with a mark."""
    return part[0] >= FIRST_MARK
