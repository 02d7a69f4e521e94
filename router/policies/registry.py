"""Which policies and scorers are installed, and making one of them from its name and options.

The rule: built-ins and plugins come the same way, as entry points of the groups ``kvlane.policies`` and
``kvlane.scorers``, and a plugin that cannot be used harms nobody who does not name it. Holds no state; the
environment's package metadata is the registry.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, Generic, NamedTuple, TypeVar

import msgspec

from router.errors import ConfigError
from router.fields import Path, dotted, nearest, problems, reworded
from router.policies.base import Policy
from router.policies.scorers import Scorer

Plugin = TypeVar("Plugin")


class Place(NamedTuple):
    """Where users write a name and its options; refusals begin with it."""

    name: str
    """Dotted."""
    options: Path


ROUTING: Final = Place("policy.name", ("policy", "options"))
SHADOW: Final = Place("policy.shadow", ("policy", "shadow_options"))


class Spec(msgspec.Struct, frozen=True):
    """A plugin that can be created."""

    name: str
    plugin: Callable[..., Any]
    """Its class; takes the options, converted, and the random source."""
    options: type[msgspec.Struct]
    dist: str
    """The distribution it comes from, with its version: ``kvlane 0.1.0``."""


class Broken(msgspec.Struct, frozen=True):
    """A name that is registered but cannot be used."""

    name: str
    dist: str
    cause: str


class Registry(Generic[Plugin]):
    """The plugins of one kind: classes with `Options` and one method, behind one entry-point group."""

    def __init__(self, kind: str, group: str, method: str) -> None:
        self._kind = kind
        self._group = group
        self._method = method

    def installed(self) -> list[Spec]:
        """The plugins that can be created, by name."""
        return [spec for spec in self._scan() if isinstance(spec, Spec)]

    def broken(self) -> list[Broken]:
        """The registered plugins that cannot be used, each with the cause, by name."""
        return [spec for spec in self._scan() if isinstance(spec, Broken)]

    def check(self, name: str, options: Mapping[str, Any], place: Place = ROUTING) -> None:
        """Raises `ConfigError` where `create` would refuse the name or the options."""
        self.check_all({name: options}, lambda _: place)

    def check_all(self, wanted: Mapping[str, Mapping[str, Any]], place: Callable[[str], Place]) -> None:
        """`check` for several names with their options, each written at its `place`."""
        registered = self._registered()  # Once: it reads the metadata of all that is installed.
        for name, options in wanted.items():
            self._converted(self._find(registered, name, place(name)), options, place(name))

    def create(self, name: str, options: Mapping[str, Any], random: random.Random, place: Place = ROUTING) -> Plugin:
        """A plugin of that name with its options from plain values. Raises `ConfigError`."""
        (made,) = self.create_all({name: options}, random, lambda _: place)
        return made

    def create_all(
        self, wanted: Mapping[str, Mapping[str, Any]], random: random.Random, place: Callable[[str], Place]
    ) -> list[Plugin]:
        """`create` for several names with their options, each written at its `place`."""
        registered = self._registered()
        return [
            self._made(self._find(registered, name, place(name)), options, random, place(name))
            for name, options in wanted.items()
        ]

    def _made(self, spec: Spec, options: Mapping[str, Any], random: random.Random, place: Place) -> Plugin:
        converted = self._converted(spec, options, place)
        try:
            made: Plugin = spec.plugin(converted, random)
        except ValueError as error:
            told = f"{dotted(place.options)}: {self._kind} '{spec.name}' refuses its options: {error}"
            raise ConfigError(told) from error
        return made

    def _find(self, registered: Mapping[str, list[EntryPoint]], name: str, place: Place) -> Spec:
        if name not in registered:
            names = ", ".join(registered) or "none"
            hint = nearest(name, registered.keys())
            meant = hint if "did you mean" in hint else ";"
            raise ConfigError(f"{place.name}: unknown {self._kind} {name!r}{meant} installed: {names}")
        spec = self._load(name, registered[name])
        if isinstance(spec, Broken):
            raise ConfigError(f"{place.name}: {self._kind} {name!r} of {spec.dist} cannot be used: {spec.cause}")
        return spec

    def _converted(self, spec: Spec, options: Mapping[str, Any], place: Place) -> msgspec.Struct:
        plain = dict(options)
        if lines := list(problems(plain, spec.options, place.options)):
            raise ConfigError("\n".join(f"{line} ({self._kind} '{spec.name}')" for line in lines))
        try:
            return msgspec.convert(plain, spec.options)
        except msgspec.ValidationError as error:  # What an Options class checks in its own `__post_init__`.
            told = f"{dotted(place.options)}: {reworded(error)} ({self._kind} '{spec.name}')"
            raise ConfigError(told) from error

    def _registered(self) -> dict[str, list[EntryPoint]]:
        """Entry points by name, sorted; more than one where several distributions use a name for different classes."""
        found: dict[str, list[EntryPoint]] = {}
        for point in entry_points(group=self._group):
            same = found.setdefault(point.name, [])
            if all(point.value != other.value for other in same):
                same.append(point)
        return dict(sorted(found.items()))

    def _scan(self) -> list[Spec | Broken]:
        return [self._load(name, points) for name, points in self._registered().items()]

    def _load(self, name: str, points: list[EntryPoint]) -> Spec | Broken:
        dists = " and ".join(_dist(point) for point in points)
        if len(points) > 1:
            return Broken(name, dists, "several installed packages use this name; uninstall all but one")
        try:
            plugin = points[0].load()
        except Exception as error:  # Whatever a plugin's import may raise: reported here, and again where it is named.
            return Broken(name, dists, f"{points[0].value} fails to import: {type(error).__name__}: {error}")
        fault = self._fault(plugin)
        if fault:
            return Broken(name, dists, f"{points[0].value} {fault}")
        return Spec(name, plugin, plugin.Options, dists)

    def _fault(self, plugin: Any) -> str:
        """What keeps an object from being a class of this kind; empty where nothing does."""
        options = getattr(plugin, "Options", None)
        if not callable(plugin):
            return "is not a class"
        if not (isinstance(options, type) and issubclass(options, msgspec.Struct)):
            return "has no class attribute Options that is a msgspec.Struct"
        method = getattr(plugin, self._method, None)
        if not callable(method):
            return f"has no method {self._method}"
        if inspect.iscoroutinefunction(method):
            return f"has an async {self._method}; it must be a plain function"
        return ""


def _dist(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"


policies: Final[Registry[Policy]] = Registry("policy", "kvlane.policies", "choose")
scorers: Final[Registry[Scorer]] = Registry("scorer", "kvlane.scorers", "score")

# Policies are what most callers mean.
installed = policies.installed
broken = policies.broken
check = policies.check
create = policies.create
