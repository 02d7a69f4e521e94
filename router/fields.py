"""Fields that users write: which ones a struct has, and whether plain values fit them.

Configuration files, environment variables, flags and policy options are all checked here, so that all of them are
refused in the same words: the dotted name of the field first, then what was expected. Pure; holds no state.
"""

from __future__ import annotations

import datetime
import difflib
import functools
import json
import math
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import msgspec
from msgspec import inspect

Path = tuple[str, ...]
"""Names from the root to a field; an item of an array is its index in decimal."""

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SHOWN = 60
_TOML_SCALARS = (str, bool, int, float, datetime.datetime, datetime.date, datetime.time)


def dotted(path: Path) -> str:
    """The path as TOML writes it, odd names quoted."""
    return ".".join(name if _BARE_KEY.fullmatch(name) else json.dumps(name) for name in path)


def nearest(name: str, names: Collection[str]) -> str:
    """How a refusal of `name` ends: with the valid name most like it, or with all of them."""
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; valid here: {', '.join(sorted(names))}" if names else "; there are none"


@functools.lru_cache(256)  # msgspec evaluates the annotations anew each time, which costs a millisecond.
def fields(struct: type[msgspec.Struct]) -> Mapping[str, msgspec.structs.FieldInfo]:
    """The struct's fields by the names that users write."""
    return {field.encode_name: field for field in msgspec.structs.fields(struct)}


@functools.lru_cache(256)
def _cached_type_info(kind: Any) -> inspect.Type:
    return inspect.type_info(kind)


def _type_info(kind: Any) -> inspect.Type:
    kind = _present(kind)
    try:
        hash(kind)
    except TypeError:  # Annotated with something that cannot be a key.
        return inspect.type_info(kind)
    return _cached_type_info(kind)


def _present(kind: Any) -> Any:
    """What a field takes that may be left out: ``kind`` without ``None``."""
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return kind
    others = [each for each in typing.get_args(kind) if each is not types.NoneType]
    return others[0] if len(others) == 1 else kind


def table_type(kind: Any) -> type[msgspec.Struct] | None:
    """The struct that `kind` is, or None where it is no table of named fields."""
    info = _type_info(kind)
    return info.cls if isinstance(info, inspect.StructType) else None


def item_type(kind: Any) -> Any:
    """The type of an array's items; None where `kind` is no array."""
    info = _type_info(kind)
    if isinstance(info, inspect.VarTupleType | inspect.ListType):
        return typing.get_args(_plain(kind))[0]
    return None


def value_type(kind: Any) -> Any:
    """The type of the values in a table with free keys; None where `kind` is no such table."""
    info = _type_info(kind)
    return typing.get_args(_plain(kind))[1] if isinstance(info, inspect.DictType) else None


def problems(value: Any, kind: Any, path: Path, *, whole: bool = True) -> Iterator[str]:
    """One line for each thing in the plain `value` that does not fit the type `kind`; nothing where all fits.

    `whole` also demands the fields that have no default.
    """
    if value is None and _present(kind) is not kind:
        return
    match _type_info(kind):
        case inspect.StructType(cls=struct):
            yield from _table_problems(value, struct, path, whole)
        case inspect.VarTupleType() | inspect.ListType():
            if not isinstance(value, list):
                yield _unfit(value, kind, path)
                return
            for index, each in enumerate(value):
                yield from problems(each, item_type(kind), (*path, str(index)), whole=whole)
        case inspect.DictType():
            if not isinstance(value, dict):
                yield _unfit(value, kind, path)
                return
            for name, each in value.items():
                if not isinstance(name, str):
                    yield f"{dotted(path)}: expected names that are strings, got {_got(name)}"
                else:
                    yield from _text_problems(name, path)
                    yield from problems(each, value_type(kind), (*path, name), whole=whole)
        case inspect.AnyType():
            yield from _free_problems(value, path)
        case _:
            yield from _scalar_problems(value, kind, path)


def expected(kind: Any) -> str:
    """What a field of that type takes, in words: ``an integer from 0 to 65535``; empty where there are no words."""
    info = _type_info(kind)
    match info:
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType():
            return "an integer" + _range(info)
        case inspect.FloatType():
            return "a number" + _range(info)
        case inspect.StrType(pattern=None):
            return "a string that is not empty" if info.min_length else "a string"
        case inspect.LiteralType():
            # In the order written; msgspec sorts them.
            return " or ".join(repr(choice) for choice in typing.get_args(_plain(kind)))
        case inspect.StructType() | inspect.DictType():
            return "a table"
        case inspect.VarTupleType() | inspect.ListType():
            return f"an array, each item {expected(item_type(kind))}"
        case inspect.AnyType():
            return "any value"
    return ""


def from_text(text: str, kind: Any) -> Any:
    """The value that an environment variable's text stands for: as it is for strings, JSON for tables and arrays.

    Text that does not fit comes back as it is, for `problems` to refuse.
    """
    match _type_info(kind):
        case inspect.BoolType():
            return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
        case inspect.IntType():
            return _number(text, int)
        case inspect.FloatType():
            return _number(text, float)
        case inspect.LiteralType():
            return next((choice for choice in typing.get_args(_plain(kind)) if str(choice) == text), text)
        case inspect.StructType() | inspect.DictType() | inspect.VarTupleType() | inspect.ListType():
            try:
                return msgspec.json.decode(text.encode())
            except (ValueError, RecursionError):  # A broken text, or one nested too deeply.
                return text
    return text


def _number(text: str, kind: type[int] | type[float]) -> Any:
    try:
        return kind(text) if text.isascii() else text
    except ValueError:
        return text


def _table_problems(value: Any, struct: type[msgspec.Struct], path: Path, whole: bool) -> Iterator[str]:
    if not isinstance(value, dict):
        yield _unfit(value, struct, path)
        return
    known = fields(struct)
    for name, each in value.items():
        if name in known:
            yield from problems(each, known[name].type, (*path, name), whole=whole)
        else:
            yield f"{dotted((*path, str(name)))}: unknown field{nearest(str(name), known)}"
    if whole:
        for name, field in known.items():
            if field.required and name not in value:
                yield f"{dotted((*path, name))}: missing; expected {expected(field.type) or 'a value'}"


def _free_problems(value: Any, path: Path) -> Iterator[str]:
    """What TOML cannot hold, so that every configuration can be written down again."""
    if isinstance(value, dict):
        yield from problems(value, dict[str, Any], path)
    elif isinstance(value, list):
        yield from problems(value, list[Any], path)
    elif isinstance(value, str):
        yield from _text_problems(value, path)
    elif not isinstance(value, _TOML_SCALARS):
        yield f"{dotted(path)}: expected a value that TOML can hold, got {_got(value)}"


def _text_problems(text: str, path: Path) -> Iterator[str]:
    try:
        text.encode()
    except UnicodeEncodeError:
        yield f"{dotted(path)}: expected text in valid Unicode, got {_got(text)}"


def _scalar_problems(value: Any, kind: Any, path: Path) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield _unfit(value, kind, path)
        return
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        # Types that have no words here are a plugin's own; msgspec's words are then better than none.
        yield _unfit(value, kind, path) if expected(kind) else f"{dotted(path)}: {reworded(error)}"
        return
    if isinstance(value, str):
        yield from _text_problems(value, path)


def reworded(error: msgspec.ValidationError) -> str:
    """msgspec's message without its path notation."""
    text = re.sub(r" - at `.*`$", "", str(error)).replace("`", "")
    return text[:1].lower() + text[1:]


def _unfit(value: Any, kind: Any, path: Path) -> str:
    scalar = table_type(kind) is None and item_type(kind) is None and value_type(kind) is None
    # The text of a refused table may hold secrets, such as tokens in an engine's environment.
    got = "a string" if isinstance(value, str) and not scalar else _got(value)
    return f"{dotted(path) or 'the configuration'}: expected {expected(kind)}, got {got}"


def _got(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list | tuple):
        return "an array"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float | str):
        # Far more digits than anyone means would take Python quadratic time to print.
        text = "a huge integer" if isinstance(value, int) and value.bit_length() > 1000 else ascii(value)
        return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
    return f"a {type(value).__name__}"


def _range(info: inspect.IntType | inspect.FloatType) -> str:
    if info.ge is not None and info.le is not None:
        return f" from {_number_text(info.ge)} to {_number_text(info.le)}"
    parts = []
    if info.ge is not None:
        parts.append(f"at least {_number_text(info.ge)}")
    if info.gt is not None:
        parts.append(f"above {_number_text(info.gt)}")
    if info.le is not None:
        parts.append(f"at most {_number_text(info.le)}")
    if info.lt is not None:
        parts.append(f"below {_number_text(info.lt)}")
    return " " + " and ".join(parts) if parts else ""


def _number_text(number: float) -> str:
    return str(int(number)) if number == int(number) else str(number)


def _plain(kind: Any) -> Any:
    kind = _present(kind)
    return typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind
