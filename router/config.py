"""Reads the configuration: defaults, under a TOML file, under environment variables, under flags.

The rule: a configuration is right as a whole or refused as a whole, and a refusal lists every problem it found, each by
its field's dotted name. The tree itself, its defaults and its limits stand in `router.options`.
"""

from __future__ import annotations

import copy
import datetime
import os
import re
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
import tomli_w

from router import compiled, schedule
from router.errors import ConfigError
from router.fields import Path, dotted, fields, from_text, item_type, nearest, problems, table_type, value_type
from router.options import LANE_PORTS, AutoscalingOptions, Config
from router.policies import registry

PREFIX = "KVLANE_"
_LAST_PORT = 65535
INDEX = "N"
"""Stands for any index in the path of a field inside an array of tables."""

_INDEX = re.compile("0|[1-9][0-9]{0,3}")
_NO_FLAGS: Mapping[str, Any] = {}
_TOML_PLACE = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")
_HOST_PORT = re.compile(r"[^\s/]+:[0-9]{1,5}")
# What Kubernetes sets in each container for a Service whose name starts with "kvlane".
_SERVICE_LINK = re.compile(r"_SERVICE_HOST$|_SERVICE_PORT(_|$)|_PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?$")


class Leaf(NamedTuple):
    """A field that holds a value, not a table of fields."""

    path: Path
    """`INDEX` where a number goes."""
    kind: Any
    """Its annotated type."""
    owner: type[msgspec.Struct]
    info: msgspec.structs.FieldInfo

    @property
    def env(self) -> str:
        """Name of its environment variable, with `INDEX` where a number goes."""
        return PREFIX + "_".join(name if name == INDEX else name.upper() for name in self.path)


def leaves(struct: type[msgspec.Struct] = Config, path: Path = ()) -> Iterator[Leaf]:
    """All fields that hold values, tables and arrays of tables gone through, in the order of their definition."""
    for name, info in fields(struct).items():
        here = (*path, name)
        item = item_type(info.type)
        if table := table_type(info.type):
            yield from leaves(table, here)
        elif item is not None and (row := table_type(item)):
            yield from leaves(row, (*here, INDEX))
        else:
            yield Leaf(here, info.type, struct, info)


def load(
    path: str | None,
    *,
    env: Mapping[str, str] = os.environ,
    flags: Mapping[str, Any] = _NO_FLAGS,
    other_env: Collection[str] = (compiled.VARIABLE,),
) -> Config:
    """The configuration in the TOML file at `path` (None: defaults alone), under `env`, under `flags`.

    `flags` maps dotted names such as ``http.port`` or ``policy.options.choices`` to values; None means not given.
    `other_env` names variables that start with ``KVLANE_`` and are no fields; all other unknown ones are refused.
    Raises `ConfigError`.
    """
    tree = {} if path is None else _read(path)
    _refuse(f"{problem} (in {path})" for problem in problems(tree, Config, (), whole=False))
    for name, value, origin in (*_from_env(env, other_env), *_from_flags(flags)):
        _set(tree, name, value, origin)
    _refuse(problems(tree, Config, ()))
    config = msgspec.convert(tree, Config)
    _refuse(_conflicts(config))
    return config


def dump(config: Config) -> str:
    """The configuration as TOML, every field written out. `load` makes an equal one of it."""
    tree = msgspec.to_builtins(config, builtin_types=(datetime.datetime, datetime.date, datetime.time))
    return tomli_w.dumps(_present(tree))


def _present(tree: Any) -> Any:
    """The tree without tables that are left out, for which TOML has no word."""
    if isinstance(tree, dict):
        return {name: _present(value) for name, value in tree.items() if value is not None}
    return [_present(item) for item in tree] if isinstance(tree, list | tuple) else tree


def _refuse(found: Iterable[str]) -> None:
    if lines := list(found):
        raise ConfigError("\n".join(lines))


# The file


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            raw = file.read()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path.
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{path}: the configuration file cannot be read: {reason}") from error
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        place = _place(raw[: error.start].decode())
        raise ConfigError(f"{path}:{place}: broken TOML: not UTF-8 text") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        at = _TOML_PLACE.search(str(error))
        place = f"{at[1]}:{at[2]}" if at and at[1] else _place(text)
        raise ConfigError(f"{path}:{place}: broken TOML: {_TOML_PLACE.sub('', str(error))}") from error
    except (ValueError, RecursionError) as error:  # An integer of thousands of digits; very deep nesting.
        raise ConfigError(f"{path}: broken TOML: {error}") from error


def _place(before: str) -> str:
    """Line and column, both from 1, of what comes after that text."""
    return f"{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"


# What goes over the file


def _from_env(env: Mapping[str, str], other_env: Collection[str]) -> list[tuple[Path, Any, str]]:
    names = sorted(name for name in env if name.startswith(PREFIX) and name not in other_env)
    known = list(leaves()) if names else []
    found, refused = [], []
    for name in names:
        match = next(((leaf, path) for leaf in known if (path := _env_path(leaf, name)) is not None), None)
        if match is None:
            refused.append(_unknown_env(name, known, other_env))
            continue
        leaf, path = match
        value, hint = from_text(env[name], leaf.kind), _link_hint(env[name])
        refused += [f"{problem} (from {name}{hint})" for problem in problems(value, leaf.kind, path)]
        found.append((path, value, f"from {name}"))
    _refuse(refused)
    return sorted(found, key=_by_place)


def _env_path(leaf: Leaf, name: str) -> Path | None:
    match = re.fullmatch(leaf.env.replace(f"_{INDEX}_", f"_({_INDEX.pattern})_"), name)
    if match is None:
        return None
    numbers = iter(match.groups())
    return tuple(next(numbers) if part == INDEX else part for part in leaf.path)


def _unknown_env(name: str, known: list[Leaf], other_env: Collection[str]) -> str:
    if _SERVICE_LINK.search(name):
        return f"{name}: unknown variable{_link_hint('tcp://')}"
    # Compared with an index of its own in the place of theirs, so that the suggestion can be used as it is.
    index = re.search(r"_(\d+)_", name)
    names = {leaf.env.replace(f"_{INDEX}_", f"_{index[1]}_" if index else "_0_") for leaf in known} | set(other_env)
    hint = nearest(name, names)
    return f"{name}: unknown variable{hint if 'did you mean' in hint else '; no field has a name like it'}"


def _link_hint(value: str) -> str:
    if not value.startswith(("tcp://", "udp://")):
        return ""
    return "; it looks like a Kubernetes service link: set enableServiceLinks to false in the pod"


def _from_flags(flags: Mapping[str, Any]) -> list[tuple[Path, Any, str]]:
    found, refused = [], []
    for name, value in flags.items():
        if value is None:
            continue
        path = tuple(name.split("."))
        kind, complaint = _kind_at(path)
        plain = list(value) if isinstance(value, tuple) else copy.deepcopy(value)
        lines = [complaint] if complaint else problems(plain, kind, path, whole=False)
        refused += [f"{line} (from a flag)" for line in lines]
        found.append((path, plain, "from a flag"))
    _refuse(refused)
    return sorted(found, key=_by_place)


def _by_place(item: tuple[Path, Any, str]) -> list[tuple[int, str]]:
    """Tables before what is in them, and indexes in the order of numbers: lists can then grow item by item."""
    return [(int(name) if _INDEX.fullmatch(name) else -1, name) for name in item[0]]


def _kind_at(path: Path) -> tuple[Any, str]:
    """The type of the field at that path, or why there is none."""
    kind: Any = Config
    for depth, name in enumerate(path):
        here = dotted(path[: depth + 1])
        if table := table_type(kind):
            known = fields(table)
            if name not in known:
                return None, f"{here}: unknown field{nearest(name, known)}"
            kind = known[name].type
        elif (entry := value_type(kind)) is not None:
            kind = entry
        elif (item := item_type(kind)) is not None:
            if not _INDEX.fullmatch(name):
                return None, f"{here}: expected an index, from 0"
            kind = item
        elif kind is not Any:
            return None, f"{here}: unknown field; {dotted(path[:depth])} is a value, not a table"
    return kind, ""


def _set(tree: dict[str, Any], path: Path, value: Any, origin: str) -> None:
    """Puts a value into the tree, which fits the configuration's types as far as it goes."""
    node: Any = tree
    for depth in range(1, len(path)):
        empty: Any = {} if item_type(_kind_at(path[:depth])[0]) is None else []
        key = _key(node, path[:depth], origin)
        if isinstance(key, int):
            if key == len(node):
                node.append(empty)
            node = node[key]
        else:
            node = node.setdefault(key, empty)
    key = _key(node, path, origin)
    if isinstance(key, int):
        node[key : key + 1] = [value]
    else:
        node[key] = value


def _key(node: Any, path: Path, origin: str) -> int | str:
    """What the path's last name is in `node`: an index of an array, one past its end at most, or a table's key."""
    if isinstance(node, dict):
        return path[-1]
    if not (isinstance(node, list) and _INDEX.fullmatch(path[-1])):
        raise ConfigError(f"{dotted(path)}: {dotted(path[:-1])} is not a table ({origin})")
    index = int(path[-1])
    if index > len(node):
        raise ConfigError(f"{dotted(path)}: there is no {dotted(path[:-1])}.{len(node)} before it ({origin})")
    return index


# What no single field can tell


def _conflicts(config: Config) -> Iterator[str]:
    yield from _ingress_conflicts(config)
    yield from _member_conflicts(config)
    if config.lane.reconnect_min_s > config.lane.reconnect_max_s:
        low, high = config.lane.reconnect_min_s, config.lane.reconnect_max_s
        yield f"lane.reconnect_min_s: {low:g} is above lane.reconnect_max_s, which is {high:g}"
    yield from _lane_tls_conflicts(config)
    yield from _repeated("engines", [engine.name for engine in config.engines])
    for index, engine in enumerate(config.engines):
        if engine.autoscaling is not None:
            yield from _autoscaling_conflicts(engine.autoscaling, f"engines.{index}.autoscaling")
    yield from _policy_conflicts(config)


def _policy_conflicts(config: Config) -> Iterator[str]:
    policy = config.policy
    named = [(policy.name, policy.options, registry.ROUTING)]
    if policy.shadow:
        named.append((policy.shadow, policy.shadow_options, registry.SHADOW))
    elif policy.shadow_options:
        yield "policy.shadow: missing; policy.shadow_options is set and needs it"
    for name, options, place in named:
        try:
            registry.check(name, options, place)
        except ConfigError as error:
            yield error.message


def _ingress_conflicts(config: Config) -> Iterator[str]:
    http, grpc = config.http, config.grpc
    if not http.enabled and not grpc.enabled:
        yield "http.enabled: both http.enabled and grpc.enabled are false, so that nobody could reach the router"
    if http.enabled and grpc.enabled and http.port == grpc.port != 0:
        yield f"grpc.port: {grpc.port} is http.port too; each needs its own (0 takes any free one)"
    for section, tls in (("http", http), ("grpc", grpc)):
        if bool(tls.tls_cert_file) != bool(tls.tls_key_file):
            given, absent = ("cert", "key") if tls.tls_cert_file else ("key", "cert")
            yield f"{section}.tls_{absent}_file: missing; {section}.tls_{given}_file is set and needs it"
        if tls.tls_client_ca_file and not tls.tls_cert_file:
            yield f"{section}.tls_cert_file: missing; {section}.tls_client_ca_file is set and needs it"


def _lane_tls_conflicts(config: Config) -> Iterator[str]:
    lane = config.lane
    yield from _pair("lane.tls", lane.tls_cert_file, lane.tls_key_file)
    if (lane.tls_cert_file or lane.tls_server_name) and not lane.tls_ca_file:
        given = "tls_cert_file" if lane.tls_cert_file else "tls_server_name"
        yield f"lane.tls_ca_file: missing; lane.{given} is set and needs it"
    if lane.tls_ca_file and lane.carrier == "actor":
        yield "lane.tls_ca_file: lane.carrier 'actor' goes through Ray, which has TLS of its own (RAY_USE_TLS)"
    for index, engine in enumerate(config.engines):
        at = f"engines.{index}.lane"
        yield from _pair(f"{at}_tls", engine.lane_tls_cert_file, engine.lane_tls_key_file)
        if engine.lane_tls_ca_file and not engine.lane_tls_cert_file:
            yield f"{at}_tls_cert_file: missing; {at}_tls_ca_file is set and needs it"
        if engine.lane_port > _LAST_PORT + 1 - LANE_PORTS:
            yield f"{at}_port: {engine.lane_port} and the {LANE_PORTS - 1} ports after it go beyond {_LAST_PORT}"


def _pair(prefix: str, cert: str, key: str) -> Iterator[str]:
    if bool(cert) != bool(key):
        given, absent = ("cert", "key") if cert else ("key", "cert")
        yield f"{prefix}_{absent}_file: missing; {prefix}_{given}_file is set and needs it"


def _member_conflicts(config: Config) -> Iterator[str]:
    membership = config.membership
    if membership.kind == "static":
        if not membership.replicas:
            yield "membership.replicas: missing; membership.kind 'static' needs at least one"
        if config.lane.carrier == "actor":
            yield "lane.carrier: 'actor' goes through Ray, which membership.kind 'static' leaves out; use 'socket'"
        if membership.join:
            yield "membership.join: there is no Ray cluster to join where membership.kind is 'static'"
    elif membership.replicas:
        yield f"membership.replicas: only used where membership.kind is 'static', and it is '{membership.kind}'"
    if membership.kind == "ray" and not _HOST_PORT.fullmatch(membership.ray_address):
        if membership.join:
            yield f"membership.ray_address: expected HOST:PORT of the head to join, got {membership.ray_address!r}"
        elif membership.ray_address not in ("auto", "local"):
            yield f"membership.ray_address: expected HOST:PORT, 'auto' or 'local', got {membership.ray_address!r}"
    yield from _repeated("membership.replicas", [replica.name for replica in membership.replicas])


def _autoscaling_conflicts(options: AutoscalingOptions, path: str) -> Iterator[str]:
    for name in ("min_replicas", "wake_replicas"):
        if (count := getattr(options, name)) > options.max_replicas:
            yield f"{path}.{name}: {count} is above {path}.max_replicas, which is {options.max_replicas}"
    for index, hours in enumerate(options.schedule):
        here = f"{path}.schedule.{index}"
        yield from (f"{here}.{problem}" for problem in schedule.problems(hours))
        if hours.min_replicas > options.max_replicas:
            most = options.max_replicas
            yield f"{here}.min_replicas: {hours.min_replicas} is above {path}.max_replicas, which is {most}"


def _repeated(array: str, names: list[str]) -> Iterator[str]:
    for index, name in enumerate(names):
        if name in names[:index]:
            yield f"{array}.{index}.name: {name!r} is the name of {array}.{names.index(name)} too"
