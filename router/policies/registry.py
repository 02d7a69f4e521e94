"""Which policies are installed, and making one of them from its name and options.

The rule: built-ins and plugins come the same way, as entry points of the group ``kvlane.policies``, and a plugin that
cannot be used harms nobody who does not name it. Holds no state; the environment's package metadata is the registry.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import msgspec

from router.errors import ConfigError
from router.fields import nearest, problems, reworded
from router.policies.base import Policy, PolicyClass

GROUP = "kvlane.policies"

_OPTIONS = ("policy", "options")


class PolicySpec(msgspec.Struct, frozen=True):
    """A policy that can be created."""

    name: str
    policy: PolicyClass
    options: type[msgspec.Struct]
    dist: str
    """The distribution it comes from, with its version: ``kvlane 0.1.0``."""


class BrokenPolicy(msgspec.Struct, frozen=True):
    """A name that is registered but cannot be used."""

    name: str
    dist: str
    cause: str


def installed() -> list[PolicySpec]:
    """The policies that can be created, by name."""
    return [spec for spec in _scan() if isinstance(spec, PolicySpec)]


def broken() -> list[BrokenPolicy]:
    """The registered policies that cannot be used, each with the cause, by name."""
    return [spec for spec in _scan() if isinstance(spec, BrokenPolicy)]


def check(name: str, options: Mapping[str, Any]) -> None:
    """Raises `ConfigError` where `create` would refuse the name or the options."""
    _converted(_find(name), options)


def create(name: str, options: Mapping[str, Any], random: random.Random) -> Policy:
    """A policy of that name with its options from plain values. Raises `ConfigError`."""
    spec = _find(name)
    try:
        return spec.policy(_converted(spec, options), random)
    except ValueError as error:
        raise ConfigError(f"policy.options: policy '{name}' refuses its options: {error}") from error


def _find(name: str) -> PolicySpec:
    registered = _registered()
    if name not in registered:
        names = ", ".join(registered) or "none"
        hint = nearest(name, registered)
        meant = hint if "did you mean" in hint else ";"
        raise ConfigError(f"policy.name: unknown policy {name!r}{meant} installed: {names}")
    spec = _load(name, registered[name])
    if isinstance(spec, BrokenPolicy):
        raise ConfigError(f"policy.name: policy {name!r} of {spec.dist} cannot be used: {spec.cause}")
    return spec


def _converted(spec: PolicySpec, options: Mapping[str, Any]) -> msgspec.Struct:
    plain = dict(options)
    if lines := list(problems(plain, spec.options, _OPTIONS)):
        raise ConfigError("\n".join(f"{line} (policy '{spec.name}')" for line in lines))
    try:
        return msgspec.convert(plain, spec.options)
    except msgspec.ValidationError as error:  # What an Options class checks in its own `__post_init__`.
        raise ConfigError(f"policy.options: {reworded(error)} (policy '{spec.name}')") from error


def _registered() -> dict[str, list[EntryPoint]]:
    """Entry points by name, sorted; more than one where several distributions use a name for different classes."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        same = found.setdefault(point.name, [])
        if all(point.value != other.value for other in same):
            same.append(point)
    return dict(sorted(found.items()))


def _scan() -> Iterable[PolicySpec | BrokenPolicy]:
    return [_load(name, points) for name, points in _registered().items()]


def _load(name: str, points: list[EntryPoint]) -> PolicySpec | BrokenPolicy:
    dists = " and ".join(_dist(point) for point in points)
    if len(points) > 1:
        return BrokenPolicy(name, dists, "several installed packages use this name; uninstall all but one")
    try:
        policy = points[0].load()
    except Exception as error:  # Whatever a plugin's import may raise: reported here, and again where it is named.
        return BrokenPolicy(name, dists, f"{points[0].value} fails to import: {type(error).__name__}: {error}")
    fault = _fault(policy)
    if fault:
        return BrokenPolicy(name, dists, f"{points[0].value} {fault}")
    return PolicySpec(name, policy, policy.Options, dists)


def _fault(policy: Any) -> str:
    """What keeps an object from being a policy class; empty where nothing does."""
    options = getattr(policy, "Options", None)
    if not callable(policy):
        return "is not a class"
    if not (isinstance(options, type) and issubclass(options, msgspec.Struct)):
        return "has no class attribute Options that is a msgspec.Struct"
    if not callable(getattr(policy, "choose", None)):
        return "has no method choose"
    if inspect.iscoroutinefunction(policy.choose):
        return "has an async choose; it must be a plain function"
    return ""


def _dist(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"
