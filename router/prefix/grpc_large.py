"""Reads prompts from large gRPC requests, in slices between which the event loop runs.

Pure: generators that yield after each slice. Rule: the canonical bytes are those that `grpc_prompts` makes of the same
request, up to `limit` of them; what comes behind them is only looked at for what shapes the prompt.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Generator
from typing import Any, Final, TypeAlias

import msgspec
import xxhash
from google.protobuf.message import Message
from kvlane.v1 import inference_pb2 as pb

from router import protobuf
from router.prefix.draft import ASSISTANT, MAX_PARTS, MAX_SHAPE_BYTES, Digest, Draft, call, call_id, head, name, utf8
from router.prefix.grpc_prompts import token_bytes, tool_of

LARGE_BYTES: Final = protobuf.LARGE_BYTES
"""From which on a request is read so."""
_AT_ONCE: Final = 128
"""Messages, tool calls or tools of one slice."""
_PIECE_BYTES: Final = 128 << 10
"""Of what is hashed or copied in one slice."""
_HIGH: Final = bytes(range(0x80, 0x100))

Slices: TypeAlias = Generator[None, None, Draft | None]


def read(path: str, body: bytes, limit: int) -> Slices:
    """The prompt of a call to `path`; None where it has none. Raises protobuf's `DecodeError` and `ValueError`."""
    yield  # The caller's own work is a slice of its own.
    reader = _READERS.get(path)
    return None if reader is None else (yield from reader(body, limit))


def _generate(body: bytes, limit: int) -> Slices:
    prompt = _Completion(limit)
    for number, at, end in protobuf.slices(body, 0, len(body)):
        if not number:
            prompt.see(pb.GenerateRequest.FromString(body[at:end]))
        elif number == pb.GenerateRequest.TEXT_FIELD_NUMBER:
            cut = yield from _cut(body, at, end, limit)
            prompt.text(body[at:cut].decode("latin-1"), end - at)
        elif number == pb.GenerateRequest.TOKEN_IDS_FIELD_NUMBER:
            yield from prompt.long_ids(body, at, end)
        elif number == pb.GenerateRequest.SAMPLING_FIELD_NUMBER:
            prompt.truncation = yield from _long_sampling(body, at, end, prompt.truncation)
        yield
    return prompt.draft()


class _Completion:
    """A completion's prompt, of which the last one counts."""

    def __init__(self, limit: int) -> None:
        self.truncation: int | None = None
        self._limit = limit
        self._text = ""
        self._ids: list[bytes] | None = None
        """Token ids as they are hashed, up to the limit."""
        self._held = 0
        """Bytes of them."""
        self._bytes = 0
        """Of the whole prompt."""

    def see(self, found: pb.GenerateRequest) -> None:
        """A slice of the request."""
        kind = found.WhichOneof("prompt")
        if kind == "text":
            text = utf8(found.text)
            self.text(text, len(text))
        elif kind == "token_ids":
            self._add_ids(found.token_ids.ids)
        self.truncation = _truncation(found.sampling, self.truncation)

    def text(self, beginning: str, size: int) -> None:
        """A text of `size` bytes, of which the beginning is given."""
        self._text, self._ids, self._held, self._bytes = beginning, None, 0, size

    def long_ids(self, body: bytes, at: int, end: int) -> Generator[None, None, None]:
        for number, start, stop in protobuf.slices(body, at, end):
            if not number:
                self._add_ids(pb.TokenIds.FromString(body[start:stop]).ids)
            elif number == pb.TokenIds.IDS_FIELD_NUMBER:
                for piece in protobuf.packed(body, start, stop):
                    self._add_packed(piece)
                    yield
            yield

    def draft(self) -> Draft:
        draft = Draft("completion", "")
        if self._ids is None:
            draft.parts.append(self._text)
            draft.unread_bytes = self._bytes - len(self._text)
        else:
            draft.tokens = b"".join(self._ids)
            draft.unread_bytes = self._bytes - len(draft.tokens)
        _add_truncation(draft, self.truncation)
        return draft

    def _add_packed(self, piece: bytes) -> None:
        if self._held < self._limit - 3:
            field = protobuf.sized(pb.TokenIds.IDS_FIELD_NUMBER, piece)
            self._add_ids(pb.TokenIds.FromString(field).ids)
        else:
            self._bytes += 4 * len(piece.translate(None, _HIGH))  # Each number ends with a byte below 0x80.

    def _add_ids(self, ids: Any) -> None:
        if self._ids is None:
            self._text, self._ids, self._held, self._bytes = "", [], 0, 0
        room = (self._limit - self._held) // 4
        self._bytes += 4 * len(ids)
        if room > 0 and ids:
            self._ids.append(token_bytes(ids[:room]))
            self._held += len(self._ids[-1])


def _chat(body: bytes, limit: int) -> Slices:
    prompt = _Conversation(limit)
    for number, at, end in protobuf.slices(body, 0, len(body)):
        if not number:
            yield from prompt.see(pb.ChatRequest.FromString(body[at:end]))
        elif number == pb.ChatRequest.MESSAGES_FIELD_NUMBER:
            yield from prompt.long_message(body, at, end)
        elif number == pb.ChatRequest.TOOLS_FIELD_NUMBER:
            yield from prompt.long_tool(body, at, end)
        elif number == pb.ChatRequest.CHAT_TEMPLATE_KWARGS_JSON_FIELD_NUMBER:
            prompt.arguments = _Shape()
            yield from prompt.arguments.add_long(body, at, end)
        elif number == pb.ChatRequest.SAMPLING_FIELD_NUMBER:
            prompt.truncation = yield from _long_sampling(body, at, end, prompt.truncation)
        yield
    return prompt.draft(len(body))


class _Shape:
    """JSON that shapes a prompt; of long JSON only the hash is kept."""

    def __init__(self, first: bytes = b"") -> None:
        self._hash = xxhash.xxh3_128()
        self._pieces: list[bytes] = []
        self.size = 0
        self.add(first)

    def add(self, piece: bytes) -> None:
        self._hash.update(piece)
        self.size += len(piece)
        if self.size <= MAX_SHAPE_BYTES:
            self._pieces.append(piece)
        else:
            self._pieces.clear()

    def add_long(self, body: bytes, at: int, end: int) -> Generator[None, None, None]:
        for start in range(at, end, _PIECE_BYTES):
            self.add(body[start : min(end, start + _PIECE_BYTES)])
            yield

    def add_string(self, body: bytes, at: int, end: int) -> Generator[None, None, None]:
        """A text, as JSON."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        self.add(b'"')
        for start in range(at, end, _PIECE_BYTES):
            stop = min(end, start + _PIECE_BYTES)
            self.add(_encoder.encode(decoder.decode(body[start:stop], final=stop == end))[1:-1])
            yield
        self.add(b'"')

    def value(self) -> bytes:
        if self.size <= MAX_SHAPE_BYTES:
            return b"".join(self._pieces)
        return Digest(self._hash.hexdigest().encode())


class _Conversation:
    """A conversation's parts, up to `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.truncation: int | None = None
        self.arguments = _Shape()
        """Of the chat template."""
        self._tools = _Shape(b"[")
        self._limit = limit
        self._parts: list[str] = []
        self._size = 0
        self._full = False

    def see(self, found: pb.ChatRequest) -> Generator[None, None, None]:
        """A slice of the request."""
        for count, message in enumerate(found.messages, 1):
            if self._full:
                break
            yield from self._add(message)
            if count % _AT_ONCE == 0:
                yield
        tools = found.tools
        for at in range(0, len(tools), _AT_ONCE):
            self._add_tools(_encoder.encode([tool_of(each) for each in tools[at : at + _AT_ONCE]])[1:-1])
            yield
        if found.chat_template_kwargs_json:
            self.arguments = _Shape(found.chat_template_kwargs_json.encode())
        self.truncation = _truncation(found.sampling, self.truncation)

    def long_message(self, body: bytes, at: int, end: int) -> Generator[None, None, None]:
        if self._full:
            return
        message = _Message()
        for number, start, stop in protobuf.slices(body, at, end):
            if not number:
                _take(message, pb.ChatMessage.FromString(body[start:stop]))
            elif number == pb.ChatMessage.TOOL_CALLS_FIELD_NUMBER:
                message.tool_calls.append((yield from self._long_call(body, start, stop)))
            elif field := pb.ChatMessage.DESCRIPTOR.fields_by_number.get(number):
                setattr(message, field.name, (yield from _text(body, start, stop, self._limit)))
            yield
        yield from self._add(message)
        yield

    def long_tool(self, body: bytes, at: int, end: int) -> Generator[None, None, None]:
        tool, places = pb.Tool(), {}
        for number, start, stop in protobuf.slices(body, at, end):
            if number:
                places[number] = start, stop
            else:
                tool.MergeFromString(body[start:stop])
            yield
        self._add_tools(b"")
        for number, key in _TOOL_FIELDS.items():
            self._tools.add(key)
            if number not in places:
                self._tools.add(_encoder.encode(tool_of(tool)[key[2:-2].decode()]))
            elif number == pb.Tool.PARAMETERS_JSON_FIELD_NUMBER:
                yield from self._tools.add_long(body, *places[number])
            else:
                yield from self._tools.add_string(body, *places[number])
        self._tools.add(b"}")

    def draft(self, body_bytes: int) -> Draft:
        draft = Draft("chat", ASSISTANT, self._parts)
        if self._full:
            draft.unread_bytes = max(1, body_bytes - self._size)
        if self._tools.size > 1:
            self._tools.add(b"]")
            draft.shape.append(("tools", self._tools.value()))
        if self.arguments.size:
            draft.shape.append(("chat_template_kwargs", self.arguments.value()))
        _add_truncation(draft, self.truncation)
        return draft

    def _add_tools(self, tools: bytes) -> None:
        if self._tools.size > 1:
            self._tools.add(b",")
        self._tools.add(tools)

    def _long_call(self, body: bytes, at: int, end: int) -> Generator[None, None, _Call]:
        made = _Call()
        for number, start, stop in protobuf.slices(body, at, end):
            if not number:
                _take(made, pb.ToolCall.FromString(body[start:stop]))
            elif field := pb.ToolCall.DESCRIPTOR.fields_by_number.get(number):
                setattr(made, field.name, (yield from _text(body, start, stop, self._limit)))
            yield
        return made

    def _add(self, message: pb.ChatMessage | _Message) -> Generator[None, None, None]:
        parts, before = self._parts, len(self._parts)
        parts.append(head(message.role))
        if content := message.content:
            parts.append(utf8(content))
        calls = message.tool_calls
        for at in range(0, len(calls), _AT_ONCE):
            if len(parts) > MAX_PARTS:
                break
            for made in calls[at : at + _AT_ONCE]:
                parts += (call(made.name), utf8(made.arguments_json or "{}"), call_id(made.id))
            yield
        if message.name:
            parts.append(name(message.name))
        if message.tool_call_id:
            parts.append(call_id(message.tool_call_id))
        for place in range(before, len(parts)):
            if len(parts[place]) >= self._limit:
                del parts[place + 1 :]  # This may be the beginning of a text only.
                break
        self._size += sum(map(len, parts[before:]))
        self._full = len(parts) > MAX_PARTS or self._size >= self._limit


class _Call(msgspec.Struct):
    id: str = ""
    name: str = ""
    arguments_json: str = ""


class _Message(msgspec.Struct):
    """A long message, with the beginnings of its texts."""

    role: str = ""
    content: str = ""
    name: str = ""
    tool_call_id: str = ""
    tool_calls: list[pb.ToolCall | _Call] = []


def _take(into: _Message | _Call, found: Message) -> None:
    """The fields of a slice."""
    for field, value in found.ListFields():
        if isinstance(into, _Message) and field.name == "tool_calls":
            into.tool_calls += value[: max(0, MAX_PARTS // 3 - len(into.tool_calls))]
        else:
            setattr(into, field.name, value)


def _embed(body: bytes, limit: int) -> Slices:
    for number, at, end in protobuf.slices(body, 0, len(body)):
        if number == pb.EmbedRequest.TEXTS_FIELD_NUMBER:
            cut = yield from _cut(body, at, end, limit)
            return Draft("embedding", None, [body[at:cut].decode("latin-1")], unread_bytes=end - cut)
        texts = pb.EmbedRequest.FromString(body[at:end]).texts if not number else ()
        if texts:
            return Draft("embedding", None, [utf8(texts[0])])
        yield
    return None


def _text(body: bytes, at: int, end: int, limit: int) -> Generator[None, None, str]:
    """The beginning of a long text. Raises `protobuf.Malformed`."""
    cut = yield from _cut(body, at, end, limit)
    text = body[at:cut].decode()
    yield
    return text


def _cut(body: bytes, at: int, end: int, limit: int) -> Generator[None, None, int]:
    """Where the first character ends of a long text that reaches `limit` bytes. Raises `protobuf.Malformed`."""
    yield from protobuf.check_text(body, at, end)
    cut = min(end, at + limit)
    while cut < end and body[cut] & 0xC0 == 0x80:
        cut += 1
    return cut


def _long_sampling(body: bytes, at: int, end: int, before: int | None) -> Generator[None, None, int | None]:
    for number, start, stop in protobuf.slices(body, at, end):
        if not number:
            before = _truncation(pb.SamplingParams.FromString(body[start:stop]), before)
        yield
    return before


def _truncation(sampling: pb.SamplingParams, before: int | None) -> int | None:
    return sampling.truncate_prompt_tokens if sampling.HasField("truncate_prompt_tokens") else before


def _add_truncation(draft: Draft, tokens: int | None) -> None:
    if tokens is not None:
        draft.shape.append(("truncate_prompt_tokens", b"%d" % tokens))


_encoder: Final = msgspec.json.Encoder()
_TOOL_FIELDS: Final = {
    pb.Tool.NAME_FIELD_NUMBER: b'{"name":',
    pb.Tool.DESCRIPTION_FIELD_NUMBER: b',"description":',
    pb.Tool.PARAMETERS_JSON_FIELD_NUMBER: b',"parameters":',
}
_READERS: Final[dict[str, Callable[[bytes, int], Slices]]] = {
    "/kvlane.v1.Inference/Generate": _generate,
    "/kvlane.v1.Inference/Chat": _chat,
    "/kvlane.v1.Inference/Embed": _embed,
}
