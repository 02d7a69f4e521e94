"""Large bodies read in slices: the facts and the errors of reading them at once, however they are made up."""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.errors import InvalidRequest
from router.ingress import large_json, openai
from router.ingress.openai import Facts

FIELDS = ["model", "user", "cache_salt", "priority", "stream", "messages", "x"]


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_json, "SLICE_BYTES", 24)
    monkeypatch.setattr(large_json, "_TEXT_SLICE_BYTES", 7)
    monkeypatch.setattr(large_json, "_FIRST_LOOK_BYTES", 2)
    monkeypatch.setattr(large_json, "_GAP_BYTES", 5)
    monkeypatch.setattr(large_json, "_STEPS", 2)
    monkeypatch.setattr(large_json, "_LONG", 9)
    monkeypatch.setattr(large_json, "_LONG_VALUE", 200)


def run(slices: Generator[None, None, Facts]) -> Facts:
    try:
        while True:
            next(slices)
    except StopIteration as end:
        facts: Facts = end.value
        return facts


def outcome(read: Any, body: bytes) -> Facts | str:
    try:
        return run(found) if isinstance(found := read(body), Generator) else found
    except InvalidRequest as error:
        return f"{error.message} {error.param}"


texts = st.text(st.sampled_from('a"\\,{}[]:é😀\n 1'), max_size=12) | st.text(max_size=6)
scalars = texts | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans() | st.none()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.sampled_from(FIELDS) | texts, inner, max_size=5),
    max_leaves=30,
)
members = st.lists(st.tuples(st.sampled_from(FIELDS) | texts, values), max_size=8)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Objects with members that may come more than once."""
    separators = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", " : ")]))
    plain = draw(st.booleans())

    def text(value: object) -> str:
        return json.dumps(value, ensure_ascii=plain, separators=separators)

    pairs = [f"{text(name)}{separators[1]}{text(value)}" for name, value in draw(members)]
    return ("{" + separators[0].join(pairs) + "}").encode("utf-8", "surrogatepass")


@settings(derandomize=True, max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(bodies())
def test_facts_are_those_of_reading_at_once(body: bytes) -> None:
    sliced, whole = outcome(large_json.read_json, body), outcome(openai.read_json, body)
    if sliced != whole:
        # A member that is wrong goes unnoticed where a later one of its name takes its place.
        names: list[str] = json.loads(body, object_pairs_hook=lambda pairs: [name for name, _ in pairs])
        assert isinstance(whole, str)
        assert len(set(names)) < len(names)


@settings(derandomize=True, max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(bodies(), st.data())
def test_so_are_errors_of_broken_bodies(body: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(body)))
    junk = data.draw(st.sampled_from([b"", b"]", b"}", b"{", b"[", b",", b":", b"0", b"x", b'"', b"\\", b"\xff"]))
    cut = data.draw(st.integers(0, 3))
    broken = body[:at] + junk + body[at + cut :]
    sliced, whole = outcome(large_json.read_json, broken), outcome(openai.read_json, broken)
    if sliced != whole:
        assert isinstance(whole, str)
        # Which of several errors is found first may differ; what is wrong in a long string is not looked for.
        assert isinstance(sliced, str) or any(word in whole for word in ("string", "escape", "surrogate"))


DENSE = {
    "strings": b'"a",',
    "spaced": b'"a" , ',
    "token ids": b"123,",
    "lists": b"[[],[1,2]],",
    "messages": b'{"role":"user","content":"say \\"hi\\", {or},"},\n',
    "brackets in strings": b'{"a":{"b":[1,2,"},"]}},',
    "long strings": b'"%b",' % (b"a" * 40_000),
}


@pytest.mark.parametrize("unit", DENSE.values(), ids=DENSE)
@pytest.mark.parametrize("ends", [(b"[", b"1]"), (b'{"x":[', b"1]}")], ids=["in an array", "in an object"])
def test_little_is_left_of_a_large_body_whatever_is_in_it(
    unit: bytes, ends: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    size = 1 << 20
    body = b'{"model":"m","x":%b%b%b,"user":"u"}' % (ends[0], unit * (size // len(unit)), ends[1])
    decoded: list[int] = []
    read_text = openai.read_text
    monkeypatch.setattr(openai, "read_text", lambda text, place: (decoded.append(len(text)), read_text(text, place))[1])
    slices = sum(1 for _ in large_json.read_json(body))
    assert decoded[0] < 150_000
    assert slices < size / 10_000
    assert run(large_json.read_json(body)) == Facts("m", "u")
