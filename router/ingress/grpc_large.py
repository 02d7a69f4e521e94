"""Large gRPC requests, read in slices between which the event loop runs.

Sans-IO: a generator that yields after each slice. Rule: facts and errors are those of `grpc_requests`, except that what
stands in long lists of numbers is left to the engine to judge, and that a model or a routing of kilobytes, groups
(which proto3 does not have) and more than `MAX_FIELDS` fields are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from operator import attrgetter
from typing import Any, Final, Protocol

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from kvlane.v1 import inference_pb2 as pb

from router import protobuf
from router.errors import InvalidRequest
from router.ingress import grpc_requests as requests
from router.ingress.grpc_requests import AnyRequest, Caller
from router.types import Request

LARGE_BYTES: Final = protobuf.LARGE_BYTES
"""From which on a request is read so."""
MAX_FIELDS: Final = 1 << 18
"""Of a large request, without what stands in fields of up to 16 KiB. Routing takes one to two microseconds for each:
10 MB of the tiniest took 8 s. Token ids are one field, unless a client does not pack them."""

_roles: Final = attrgetter("role")


def read(method: str, body: bytes, caller: Caller, new_id: Callable[[], str]) -> Generator[None, None, Request]:
    """The request of a call to `Generate`, `Chat` or `Embed`. Raises `InvalidRequest`."""
    return _READERS[method](method, body, caller, new_id)


class _Prompt(Protocol):
    """What must be seen of a request's prompt."""

    def see(self, found: Any) -> None:
        """A slice of the request. Raises `InvalidRequest`."""

    def see_long(self, field: str, *, named: bool) -> None:
        """A field that is longer than a slice; `named`: the first field in it is not empty. Raises `InvalidRequest`."""

    def check(self) -> None:
        """There is no more. Raises `InvalidRequest` where there is no prompt."""


class _Completion:
    def __init__(self) -> None:
        self._kind: str | None = None
        self._some = False

    def see(self, found: pb.GenerateRequest) -> None:
        kind = found.WhichOneof("prompt")
        if kind is not None:
            self._last(kind, some=bool(found.text if kind == "text" else found.token_ids.ids))

    def see_long(self, field: str, *, named: bool) -> None:
        if field in ("text", "token_ids"):
            self._last(field, some=True)

    def check(self) -> None:
        if not self._some:
            raise requests.no_prompt(self._kind)

    def _last(self, kind: str, *, some: bool) -> None:
        """The last prompt counts; lists of ids are joined."""
        self._some = some or (self._some and kind == self._kind == "token_ids")
        self._kind = kind


class _Conversation:
    def __init__(self) -> None:
        self._turns = 0

    def see(self, found: pb.ChatRequest) -> None:
        self._turns += _count(map(_roles, found.messages), self._turns, requests.no_role)

    def see_long(self, field: str, *, named: bool) -> None:
        if field == "messages":
            self._turns += _count((named,), self._turns, requests.no_role)

    def check(self) -> None:
        if not self._turns:
            raise requests.no_turns()


class _Texts:
    def __init__(self) -> None:
        self._texts = 0

    def see(self, found: pb.EmbedRequest) -> None:
        self._texts += _count(found.texts, self._texts, requests.empty_text)

    def see_long(self, field: str, *, named: bool) -> None:
        self._texts += field == "texts"

    def check(self) -> None:
        if not self._texts:
            raise requests.no_texts()


class _Seen:
    """Keeps what is wrong with a prompt until it is known that nothing else is."""

    def __init__(self, prompt: _Prompt) -> None:
        self._prompt = prompt
        self._fault: InvalidRequest | None = None

    def see(self, found: Any) -> None:
        if self._fault is None:
            try:
                self._prompt.see(found)
            except InvalidRequest as error:
                self._fault = error

    def see_long(self, field: str, *, named: bool) -> None:
        if self._fault is None:
            try:
                self._prompt.see_long(field, named=named)
            except InvalidRequest as error:
                self._fault = error

    def check(self) -> None:
        if self._fault is not None:
            raise self._fault
        self._prompt.check()


def _count(said: Iterable[object], before: int, error: Callable[[int], InvalidRequest]) -> int:
    """How many there are. Raises `error` of the first that is empty."""
    told = list(said)
    if not all(told):
        raise error(before + next(place for place, each in enumerate(told) if not each))
    return len(told)


def _reader(
    kind: type[AnyRequest], prompt: Callable[[], _Prompt]
) -> Callable[[str, bytes, Caller, Callable[[], str]], Generator[None, None, Request]]:
    def read(method: str, body: bytes, caller: Caller, new_id: Callable[[], str]) -> Generator[None, None, Request]:
        known, seen, fields = kind(), _Seen(prompt()), kind.DESCRIPTOR.fields_by_number
        allowance = protobuf.Allowance(MAX_FIELDS)
        try:
            for number, at, end in protobuf.slices(body, 0, len(body), allowance):
                if not number:
                    found = kind.FromString(body[at:end])
                    _learn(known, found)
                    seen.see(found)
                elif number in fields:
                    field = fields[number]
                    _refuse_long(field)
                    seen.see_long(field.name, named=(yield from _check_field(field, body, at, end, allowance)))
                yield
        except protobuf.TooManyFields as error:
            raise InvalidRequest(f"the request has more than {MAX_FIELDS} fields") from error
        except requests.NOT_READABLE as error:
            raise requests.not_valid(kind) from error
        requests.check_model(known.model)
        seen.check()
        return requests.routed(method, known, body, caller, new_id)

    return read


def _learn(known: Any, found: Any) -> None:
    known.model = found.model or known.model
    if found.HasField("routing"):
        known.routing.MergeFrom(found.routing)


def _refuse_long(field: Any) -> None:
    if field.name in ("model", "routing"):
        raise InvalidRequest(f"{field.name} is too long", param=field.name)


def _check(
    kind: type[Message], body: bytes, at: int, end: int, allowance: protobuf.Allowance
) -> Generator[None, None, bool]:
    """Whether the first field of the message there says something. Raises `TooManyFields` and one of `NOT_READABLE`."""
    fields: Any = kind.DESCRIPTOR.fields_by_number
    first, named = fields[min(fields)], False
    for number, start, stop in protobuf.slices(body, at, end, allowance):
        if not number:
            named = bool(getattr(kind.FromString(body[start:stop]), first.name)) or named
        elif number in fields:
            yield from _check_field(fields[number], body, start, stop, allowance)
            named = named or number == first.number
        yield
    return named


def _check_field(
    field: Any, body: bytes, at: int, end: int, allowance: protobuf.Allowance
) -> Generator[None, None, bool]:
    if field.type == FieldDescriptor.TYPE_STRING:
        yield from protobuf.check_text(body, at, end)
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        return (yield from _check(GetMessageClass(field.message_type), body, at, end, allowance))
    return False


_READERS: Final = {
    "Generate": _reader(pb.GenerateRequest, _Completion),
    "Chat": _reader(pb.ChatRequest, _Conversation),
    "Embed": _reader(pb.EmbedRequest, _Texts),
}
