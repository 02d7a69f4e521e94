"""What the router reads of bodies, and the error and model objects it writes itself."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.errors import InvalidRequest, KvlaneError, MethodNotAllowed, ReplicaLost
from router.ingress import openai
from router.ingress.base import ModelStatus
from router.ingress.openai import Facts, read_json, read_multipart
from router.types import ModelCard

FORM = "multipart/form-data; boundary=xyz"


def part(name: str, value: bytes, extra: str = "") -> bytes:
    return b'--xyz\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n' % (
        name.encode(),
        extra.encode(),
        value,
    )


def test_a_body_gives_the_facts_that_routing_needs() -> None:
    body = b'{"model":"m","messages":[{"x":[1,{}]}],"user":"u","cache_salt":"s","priority":-3,"stream":true}'
    assert read_json(body) == Facts("m", "u", "s", -3)


@pytest.mark.parametrize(
    "body",
    [b"{}", b'{"model":null}', b'{"model":""}', b'{"user":3,"cache_salt":[],"priority":"high"}'],
)
def test_what_a_body_does_not_say_or_says_in_a_wrong_type_is_left_to_the_engine(body: bytes) -> None:
    assert read_json(body) == Facts()


@pytest.mark.parametrize("priority", ["true", "1.5", str(2**31), str(-(2**70))])
def test_a_priority_that_is_no_small_integer_counts_as_none(priority: str) -> None:
    assert read_json(b'{"priority":%b}' % priority.encode()).priority == 0


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        (b'{"model":3}', "model", "Expected `str"),
        (b'{"model":["a"]}', "model", "Expected `str"),
        (b'{"user":1e999}', "user", "out of range"),
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


def test_a_form_gives_its_model_wherever_the_field_stands() -> None:
    file = part("file", b"RIFF" * 1000, '; filename="a.wav"')
    assert read_multipart(file + part("model", b"m") + b"--xyz--\r\n", FORM).model == "m"
    assert read_multipart(part("model", b"m") + file + b"--xyz--\r\n", FORM).model == "m"


def test_a_form_without_model_or_with_a_file_of_that_name_has_none() -> None:
    assert read_multipart(part("file", b"x") + b"--xyz--\r\n", FORM).model == ""
    assert read_multipart(part("model", b"x", '; filename="m"') + b"--xyz--\r\n", FORM).model == ""


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"--xyz\r\n\r\n", "multipart/form-data"),
        (b"nonsense", FORM),
        (part("model", b"\xff") + b"--xyz--\r\n", FORM),
    ],
)
def test_a_malformed_form_is_refused(body: bytes, content_type: str) -> None:
    with pytest.raises(InvalidRequest):
        read_multipart(body, content_type)


@settings(derandomize=True, max_examples=150)
@given(st.binary(max_size=80))
def test_no_body_makes_the_readers_raise_anything_but_invalid_request(body: bytes) -> None:
    for read in (
        read_json,
        lambda data: read_multipart(data, FORM),
        lambda data: read_multipart(b"--xyz" + data, FORM),
    ):
        try:
            read(body)
        except InvalidRequest:
            pass


def test_an_error_object_has_vllms_shape() -> None:
    body = json.loads(openai.error_body(InvalidRequest("no", param="model")))
    assert body == {"error": {"message": "no", "type": "BadRequestError", "param": "model", "code": 400}}


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
