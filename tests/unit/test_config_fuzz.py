"""The configuration under random input: nothing but `ConfigError` comes out, and what is dumped loads back."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import tomli_w
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import inspect

from router.config import INDEX, Leaf, dump, leaves, load
from router.errors import ConfigError
from router.fields import value_type
from router.options import Config

fixed = settings(derandomize=True, deadline=None, max_examples=60)

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
times = st.times() | st.dates() | st.datetimes()
free: st.SearchStrategy[Any] = st.recursive(
    st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | text | times,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
LEAVES = list(leaves())


def loaded(content: bytes | str, **layers: Any) -> Config | None:
    """What `load` makes of a file with that content; None where it refuses, in words without msgspec's notation."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kvlane.toml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        try:
            return load(str(path), **{"env": {}, **layers})
        except ConfigError as error:
            message = error.message
    assert message
    assert "Expected `" not in message
    assert "at `$" not in message
    return None


def fitting(leaf: Leaf) -> st.SearchStrategy[Any]:
    """Values that the field takes."""
    info = inspect.type_info(leaf.kind)
    match info:
        case inspect.BoolType():
            return st.booleans()
        case inspect.IntType():
            return st.integers(info.ge, info.le)
        case inspect.FloatType():
            return st.floats(info.ge or 0, 1e300, exclude_min=info.gt is not None) | st.integers(1, 2**60)
        case inspect.StrType():
            return text.filter(len) if info.min_length else text
        case inspect.LiteralType():
            return st.sampled_from(info.values)
        case inspect.DictType():
            return st.dictionaries(text, text if value_type(leaf.kind) is str else free, max_size=3)
    return st.lists(text, max_size=3)


changes = st.dictionaries(
    st.sampled_from([leaf for leaf in LEAVES if leaf.path[0] not in ("policy", "membership")]).map(LEAVES.index),
    st.integers(0, 2),
    max_size=4,
)


@fixed
@given(changes, st.data())
def test_a_dumped_config_loads_back_equal(chosen: dict[int, int], data: st.DataObject) -> None:
    flags = {}
    for place, index in chosen.items():
        leaf = LEAVES[place]
        for each in range(index + 1) if INDEX in leaf.path else [0]:
            path = ".".join(str(each) if name == INDEX else name for name in leaf.path)
            flags[path] = data.draw(fitting(leaf), label=path)
    for each in range(4):
        if any(name.startswith(f"engines.{each}.") for name in flags):
            flags.setdefault(f"engines.{each}.name", f"engine-{each}")
    try:
        config = load(None, env={}, flags=flags)
    except ConfigError:
        return  # Values that fit one by one and contradict each other.
    assert loaded(dump(config)) == config


@fixed
@given(st.dictionaries(text, free, max_size=3))
def test_free_tables_survive_a_dump(args: dict[str, Any]) -> None:
    config = load(None, env={}, flags={"engines.0.args": args})
    assert config.engines[0].args == args
    assert loaded(dump(config)) == config


@fixed
@given(st.binary(max_size=200))
@example(b"\xff")
@example(b"[http]\r\nport=\r\n")
def test_random_bytes_load_or_are_refused(content: bytes) -> None:
    loaded(content)


@fixed
@given(
    st.lists(st.sampled_from(["[", "]", "http", "port", "=", "1", "'", '"', "\n", ".", "{", "}", "#", ",", "engines"]))
)
def test_random_toml_tokens_load_or_are_refused(tokens: list[str]) -> None:
    loaded("".join(tokens))


names = st.sampled_from(sorted({name for leaf in LEAVES for name in leaf.path})) | text


@fixed
@given(st.dictionaries(names, st.dictionaries(names, free, max_size=4) | free | st.lists(free), max_size=4))
def test_random_trees_load_or_are_refused(tree: dict[str, Any]) -> None:
    loaded(tomli_w.dumps(tree))


variables = st.sampled_from([leaf.env.replace(INDEX, "0") for leaf in LEAVES]) | st.text(
    "ABHTPORN_019", max_size=9
).map("KVLANE_".__add__)
texts = st.text(max_size=12) | free.map(lambda value: json.dumps(value, default=str)) | st.just("[" * 5000)


@fixed
@given(st.dictionaries(variables, texts, max_size=4))
def test_random_variables_load_or_are_refused(env: dict[str, str]) -> None:
    loaded("", env=env)


parts = st.lists(names | st.sampled_from(["0", "1", "9" * 5000]), min_size=1, max_size=4).map(".".join)
anything = free | st.none() | st.binary() | st.tuples(free) | st.dictionaries(st.integers(), free) | st.floats()


@fixed
@given(st.dictionaries(parts, anything, max_size=4))
def test_random_flags_load_or_are_refused(flags: dict[str, Any]) -> None:
    loaded("[policy.options]\n[[engines]]", flags=flags)
