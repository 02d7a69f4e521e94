"""The model of a form, found without a look at most of its bytes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.errors import InvalidRequest
from router.ingress.multipart import MAX_PARTS, WINDOW_BYTES, read_model, read_model_strictly

FORM = "multipart/form-data; boundary=xyz"
END = b"--xyz--\r\n"


def part(name: str, value: bytes, extra: str = "") -> bytes:
    return b'--xyz\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n' % (
        name.encode(),
        extra.encode(),
        value,
    )


@pytest.mark.parametrize("size", [10, WINDOW_BYTES, 2 * WINDOW_BYTES, 5 * WINDOW_BYTES])
def test_a_form_gives_its_model_before_or_behind_a_file_of_any_size(size: int) -> None:
    file = part("file", b"RIFF" * (size // 4), '; filename="a; name=\\"model\\".wav"')
    assert read_model(file + part("model", b"m") + END, FORM) == "m"
    assert read_model(part("prompt", b"p") + part("model", b"m") + file + END, FORM) == "m"
    assert read_model(b"\r\n" + file + part("x", b"") + part("model", b"m") + END, FORM) == "m"


@pytest.mark.parametrize("shift", range(2, 14))
def test_a_boundary_across_the_edge_of_a_window_is_found(shift: int) -> None:
    head = part("file", b"", '; filename="a"')
    filling = b"x" * (WINDOW_BYTES - len(head) + 4 - shift)
    file = part("file", filling, '; filename="a"')
    behind = part("model", b"m") + part("other", b"x" * 3 * WINDOW_BYTES, '; filename="b"')
    assert read_model(file + behind + END, FORM) == "m"
    tail = part("model", b"m") + part("other", b"x" * (WINDOW_BYTES - 128 - shift)) + END
    assert read_model(part("file", b"x" * 3 * WINDOW_BYTES) + tail, FORM) == "m"


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data; boundary=xyz",
        'Multipart/Form-Data;Boundary="xyz"',
        "multipart/form-data; a=b; boundary=xyz",
    ],
)
def test_the_boundary_is_read_in_every_spelling(content_type: str) -> None:
    assert read_model(part("model", b"m") + END, content_type) == "m"


def test_a_form_without_model_or_with_a_file_of_that_name_has_none() -> None:
    assert read_model(part("file", b"x") + END, FORM) == ""
    assert read_model(part("model", b"x", '; filename="m"') + END, FORM) == ""
    assert read_model(b"--xyz\r\n\r\nno headers\r\n" + END, FORM) == ""
    assert read_model(b"--xyz--\r\n" + part("model", b"m"), FORM) == ""


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"--xyz\r\n\r\n", "multipart/form-data"),
        (b"--\r\n\r\n", 'multipart/form-data; boundary=""'),
        (b"--xyz\r\n\r\n", "multipart/form-data; boundary=" + "x" * 71),
        (b"--xyz\r\n\r\n", "multipart/form-data; " + "a" * 5000 + "; boundary=xyz"),
        (b"nonsense", FORM),
        (b"--xyz", FORM),
        (b"--xyzabc\r\n\r\n", FORM),
        (part("model", b"\xff") + END, FORM),
        (part("model", b"m"), FORM),
        (part("model", b"m" * 5000) + END, FORM),
        (part("x", b"") * (MAX_PARTS + 1) + part("model", b"m") + END, FORM),
        (part("x", b"", "; a=" + "y" * 10_000) + part("model", b"m") + END, FORM),
        (part("x", b"", "; a=" + "y" * 500) * 20 + part("model", b"m") + END, FORM),
    ],
)
def test_a_malformed_or_excessive_form_is_refused(body: bytes, content_type: str) -> None:
    with pytest.raises(InvalidRequest):
        read_model(body, content_type)


class _Counted(bytes):
    """Counts the bytes that searches and slices may look at."""

    seen = 0

    def find(self, sub: object, start: object = None, end: object = None) -> int:
        assert isinstance(sub, bytes)
        assert isinstance(start, int)
        stop = len(self) if end is None else min(end, len(self))  # type: ignore[call-overload]
        at = super().find(sub, start, stop)
        self.seen += max((stop if at < 0 else at) - start, 0)
        return at


@pytest.mark.parametrize("unit", [b"\0", b"--xyz", b"\r\n--xy", b"\r\n--xyz\r\n\r\n", b"--xyz\r\na:b\r\n\r\n\r\n"])
def test_a_hostile_form_of_any_size_is_searched_in_its_windows_alone(unit: bytes) -> None:
    body = _Counted(part("file", b"") + unit * ((8 << 20) // len(unit)))
    try:
        assert read_model(body, FORM) == ""
    except InvalidRequest:
        pass
    assert body.seen < 3 * WINDOW_BYTES


@settings(derandomize=True, max_examples=300)
@given(st.binary(max_size=80), st.text('abnmodelxyz=;" \\-', max_size=60))
def test_no_form_makes_the_reader_raise_anything_but_invalid_request(data: bytes, header: str) -> None:
    disposition = b"--xyz\r\nContent-Disposition: form-data" + header.encode() + b"\r\n\r\n"
    for body in (data, b"--xyz" + data, disposition + data):
        for content_type in (FORM, "multipart/form-data;" + header):
            try:
                read_model(body, content_type)
            except InvalidRequest:
                pass


def strictly(body: bytes) -> str:
    slices = read_model_strictly(body, FORM)
    while True:
        try:
            next(slices)
        except StopIteration as end:
            model: str = end.value
            return model


@pytest.mark.parametrize("size", [10, WINDOW_BYTES, 5 * WINDOW_BYTES])
def test_a_form_that_is_plain_gives_its_one_model_to_a_strict_reader(size: int) -> None:
    file = part("file", b"RIFF" * (size // 4), '; filename="a.wav"')
    assert strictly(file + part("model", b"m") + END) == "m"
    assert strictly(part("prompt", b"p") + part("model", b"m") + file + END) == "m"
    assert strictly(file + END) == ""


OTHER = b"--xyz\r\nContent-Disposition: form-data; %b\r\n\r\nother\r\n"


@pytest.mark.parametrize(
    "hidden",
    [
        part("model", b"other"),
        OTHER % b"name=model",
        OTHER % b"name*=utf-8''model",
        OTHER % b'name*0="mod"; name*1="el"',
        OTHER % b'name="mod\\el"',
        OTHER % b'name="x"; name="model"',
        OTHER % b'name="x"\r\nContent-Disposition: form-data; name="model"',
        OTHER % b'name="x";\r\n name="model"',
    ],
)
def test_a_strict_reader_refuses_what_could_name_another_model(hidden: bytes) -> None:
    large = part("file", b"x" * 3 * WINDOW_BYTES, '; filename="a"')
    for body in (hidden + part("model", b"m"), part("model", b"m") + large + hidden + large):
        with pytest.raises(InvalidRequest):
            strictly(body + END)


@given(st.binary(max_size=300), st.integers(0, 300))
@settings(max_examples=200, deadline=None)
def test_a_strict_reader_fails_in_no_other_way(noise: bytes, at: int) -> None:
    form = part("file", b"x", '; filename="a"') + part("model", b"m") + END
    try:
        strictly(form[:at] + noise + form[at:])
    except InvalidRequest:
        pass
