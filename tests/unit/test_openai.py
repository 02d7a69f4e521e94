"""What the router reads of bodies, and the error and model objects it writes itself."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.errors import InvalidRequest, KvlaneError, MethodNotAllowed, ReplicaLost
from router.ingress import openai
from router.ingress.base import ModelStatus
from router.ingress.openai import Facts, read_json
from router.types import ModelCard


def test_a_body_gives_the_facts_that_routing_needs() -> None:
    body = b'{"model":"m","messages":[{"x":[1,{}]}],"user":"u","cache_salt":"s","priority":-3,"stream":true}'
    assert read_json(body) == Facts("m", "u", "s", -3, True)


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"model":null}',
        b'{"stream":"true"}',
        b'{"stream":1}',
        b'{"stream": false }',
        b'{"model":""}',
        b'{"user":3,"cache_salt":[],"priority":"high"}',
    ],
)
def test_what_a_body_does_not_say_or_says_in_a_wrong_type_is_left_to_the_engine(body: bytes) -> None:
    assert read_json(body) == Facts()


def test_a_stream_is_asked_for_however_that_is_spaced() -> None:
    assert read_json(b'{ "stream" :  true , "model":"m"}') == Facts("m", stream=True)


@pytest.mark.parametrize("priority", ["true", "1.5", str(2**31), str(-(2**70))])
def test_a_priority_that_is_no_small_integer_counts_as_none(priority: str) -> None:
    assert read_json(b'{"priority":%b}' % priority.encode()).priority == 0


@pytest.mark.parametrize("length", [1023, 10_000])
def test_a_word_too_long_to_route_by_counts_as_none(length: int) -> None:
    word = b"x" * length
    assert read_json(b'{"user":"%b","cache_salt":"%b","model":"m"}' % (word, word)) == Facts("m")


@pytest.mark.parametrize("field", ["user", "cache_salt", "priority"])
def test_what_routing_does_not_need_is_never_built(field: str) -> None:
    body = b'{"model":"m","%b":[%b]}' % (field.encode(), b",".join([b"[]"] * 300_000))
    tracemalloc.start()
    try:
        assert read_json(body) == Facts("m")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        (b'{"model":3}', "model", "Expected `str"),
        (b'{"model":["a"]}', "model", "Expected `str"),
        (b'{"user":"\\q"}', None, "not valid JSON"),
        (b"[]", None, "must be a JSON object"),
        (b"null", None, "must be a JSON object"),
        (b'{"model":"a",}', None, "(byte 13)"),
        (b'{"model":', None, "(byte 9)"),
        (b'{"model":"a"} x', None, "(byte 15)"),
        (b'{"x":"\xff"}', None, "not valid UTF-8 (byte 6)"),
        (b'{"model":"\xff"}', None, "not valid UTF-8 (byte 10)"),
        (b'{"x":' + b"[" * 100_000, None, "nested too deeply"),
        (b"\xef\xbb\xbf{}", None, "(byte 0)"),
    ],
)
def test_a_bad_body_is_refused_with_the_place_of_the_fault(body: bytes, param: str | None, said: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_json(body)
    assert said in caught.value.message
    assert caught.value.param == param


@settings(derandomize=True, max_examples=150)
@given(st.binary(max_size=80))
def test_no_body_makes_the_reader_raise_anything_but_invalid_request(body: bytes) -> None:
    try:
        read_json(body)
    except InvalidRequest:
        pass


def test_an_error_object_has_vllms_shape() -> None:
    body = json.loads(openai.error_body(InvalidRequest("no", param="model")))
    assert body == {"error": {"message": "no", "type": "BadRequestError", "param": "model", "code": 400}}


def test_an_error_object_quotes_no_endless_name() -> None:
    assert len(openai.error_body(InvalidRequest("x" * 1_000_000))) < 2000
    assert len(openai.error_event(InvalidRequest("x" * 1_000_000), "/v1/messages")) < 2000


def test_an_error_of_the_messages_api_says_its_type_first() -> None:
    assert json.loads(openai.error_body(InvalidRequest("no"), "/v1/messages"))["type"] == "error"


@pytest.mark.parametrize(
    ("path", "start", "end"),
    [
        ("/v1/chat/completions", b'data: {"error":{', b"data: [DONE]\n\n"),
        ("/v1/messages", b"event: error\ndata: {", b"}\n\n"),
        ("/v1/responses", b"event: error\ndata: {", b"}\n\n"),
    ],
)
def test_an_error_event_has_the_shape_of_its_api(path: str, start: bytes, end: bytes) -> None:
    event = openai.error_event(ReplicaLost("gone"), path)
    assert event.startswith(start)
    assert event.endswith(end)


def test_any_error_class_can_be_rendered() -> None:
    classes: list[type[KvlaneError]] = [KvlaneError, *KvlaneError.__subclasses__(), *InvalidRequest.__subclasses__()]
    for cls in classes:
        error = MethodNotAllowed("x", allow=("GET",)) if issubclass(cls, MethodNotAllowed) else cls("x")
        assert json.loads(openai.error_body(error))["error"]["code"] == cls.http_status


def test_the_models_list_has_vllms_fields_in_vllms_order() -> None:
    models = (ModelStatus(ModelCard("tiny", max_model_len=64), 1), ModelStatus(ModelCard("lora", "tiny", 64), 0))
    listed = json.loads(openai.models_list(models, 5))
    assert list(listed) == ["object", "data"]
    assert list(listed["data"][0]) == "id object created owned_by root parent max_model_len permission".split()  # noqa: SIM905
    assert [(card["id"], card["root"], card["parent"]) for card in listed["data"]] == [
        ("tiny", "tiny", None),
        ("lora", "tiny", "tiny"),
    ]
    assert openai.model_card(models, "nobody", 5) is None
