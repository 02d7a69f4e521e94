"""API keys: how they look, how they are kept, and how one is found again in a request.

Sans-IO but for reading the file. Rule: a key itself is kept nowhere. It names its entry by a public id, and the entry
holds a salted SHA-256 of it. A slow hash (bcrypt, scrypt) makes guessing words that people choose expensive; these keys
are 256 random bits, which nobody guesses, and the check is on the path of every request.
"""

from __future__ import annotations

import datetime
import hashlib
import math
import secrets
import tomllib
from collections.abc import Iterable, Mapping
from hmac import compare_digest
from typing import Any, Final

import msgspec
import tomli_w

from router.errors import ConfigError

_PREFIX: Final = "kvl-"
_ID_BYTES: Final = 6
_SALT_BYTES: Final = 16
_SECRET_BYTES: Final = 32
_ID_END: Final = len(_PREFIX) + 2 * _ID_BYTES
_KEY_CHARS: Final = _ID_END + 1 + math.ceil(_SECRET_BYTES * 4 / 3)
_SHA256_BYTES: Final = hashlib.sha256().digest_size
_MAX_NAME_CHARS: Final = 64


class Key(msgspec.Struct, frozen=True):
    """What is known of one API key."""

    id: str
    """Public: it may stand in logs."""
    tenant: str
    """Whose it is; several keys may be of one."""
    salt: bytes
    digest: bytes
    models: frozenset[str] | None = None
    """Those that it is for, by the names that clients ask for; None for all."""
    expires_at: float = math.inf
    """In seconds since 1970."""

    def allows(self, model: str) -> bool:
        return self.models is None or model in self.models


Keys = Mapping[str, Key]
"""By id."""
_NOBODY: Final = Key("", "", bytes(_SALT_BYTES), bytes(_SHA256_BYTES))
"""Is compared with where an id is of no key, which takes as long."""


def is_well_formed(text: str) -> bool:
    """Whether this could be a key."""
    return len(text) == _KEY_CHARS and text.startswith(_PREFIX)


def find(keys: Keys, text: str) -> Key | None:
    """The entry of a well-formed key. Takes the same time whatever is wrong, however many keys there are."""
    key = keys.get(text[len(_PREFIX) : _ID_END], _NOBODY)
    right = compare_digest(_digest(key.salt, text), key.digest)
    return key if right and key is not _NOBODY else None


def _digest(salt: bytes, text: str) -> bytes:
    return hashlib.sha256(salt + text.encode(errors="replace")).digest()


# The file


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One key as the file has it."""

    name: str
    hash: str
    models: tuple[str, ...] | None = None
    expires: Any = None
    """A TOML date or date-time; UTC where it names no zone. A date is its beginning."""


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: tuple[_Entry, ...]


def new(name: str, models: Iterable[str] = (), expires: datetime.date | None = None) -> tuple[str, str]:
    """A new key, and the TOML that stands for it in the file. Raises `ConfigError` for a name that cannot be used."""
    _check_name(name, "--name")
    key_id, salt = secrets.token_hex(_ID_BYTES), secrets.token_bytes(_SALT_BYTES)
    text = f"{_PREFIX}{key_id}-{secrets.token_urlsafe(_SECRET_BYTES)}"
    hashed = f"sha256:{key_id}:{salt.hex()}:{_digest(salt, text).hex()}"
    entry = _Entry(name, hashed, tuple(models) or None, expires)
    dates = (datetime.datetime, datetime.date)
    return text, "[[keys]]\n" + tomli_w.dumps(msgspec.to_builtins(entry, builtin_types=dates))


def read(path: str) -> dict[str, Key]:
    """The keys of the file. Raises `ConfigError`, which quotes nothing of a hash."""
    try:
        with open(path, "rb") as file:
            tree = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"auth.keys_file: cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # Neither TOML nor UTF-8.
        raise ConfigError(f"auth.keys_file: {path} is no TOML: {error}") from error
    try:
        entries = msgspec.convert(tree, _File).keys
    except msgspec.ValidationError as error:
        raise ConfigError(f"auth.keys_file: {path}: {error}") from error
    found: dict[str, Key] = {}
    for index, entry in enumerate(entries):
        try:
            key = _key(entry)
            if key.id in found:
                raise ConfigError("hash: its id is that of an earlier key; was one line pasted twice?")
        except ConfigError as error:
            raise ConfigError(f"auth.keys_file: {path}: keys.{index}.{error.message}") from error
        found[key.id] = key
    return found


def _key(entry: _Entry) -> Key:
    _check_name(entry.name, "name")
    try:
        scheme, key_id, salt, digest = entry.hash.split(":")
        made = Key(
            key_id,
            entry.name,
            bytes.fromhex(salt),
            bytes.fromhex(digest),
            None if entry.models is None else frozenset(entry.models),
            _expires_at(entry.expires),
        )
    except ValueError:  # Without its cause, which may quote it.
        raise ConfigError("hash: not what `kvlane key new` printed") from None
    sizes = len(bytes.fromhex(key_id) if len(key_id) % 2 == 0 else b""), len(made.salt), len(made.digest)
    if scheme != "sha256" or sizes != (_ID_BYTES, _SALT_BYTES, _SHA256_BYTES):
        raise ConfigError("hash: not what `kvlane key new` printed")
    return made


def _check_name(name: str, field: str) -> None:
    """It stands in logs and metrics."""
    if not (0 < len(name) <= _MAX_NAME_CHARS and name.isascii() and name.isprintable()):
        raise ConfigError(f"{field}: expected 1 to {_MAX_NAME_CHARS} printable ASCII characters")


def _expires_at(expires: Any) -> float:
    if expires is None:
        return math.inf
    if not isinstance(expires, datetime.date):
        raise ConfigError("expires: expected a date or date-time, without quotes")
    if not isinstance(expires, datetime.datetime):
        expires = datetime.datetime.combine(expires, datetime.time())
    moment = expires if expires.tzinfo else expires.replace(tzinfo=datetime.UTC)
    return float(moment.timestamp())
