"""Heads of replicas' answers: those of streams are remembered, and nothing of one request shows in another's."""

from __future__ import annotations

import pytest

from router.errors import ReplicaFailed
from router.ingress import http_response
from router.ingress.http_response import Envelope, Exchange
from router.types import Headers, Reason, Receipt

SSE = ("content-type", "text/event-stream; charset=utf-8")


class Wire:
    """An exchange's connection; keeps what is written."""

    flowing = True

    def __init__(self) -> None:
        self.written = b""

    def write_now(self, data: bytes) -> None:
        self.written += data

    write = write_now

    def socket(self) -> int:
        return -1

    def check_room(self) -> None: ...
    def answered(self, exchange: Exchange, *, close: bool) -> None: ...
    def cut(self) -> None: ...


def head(status: int, headers: Headers, *, request_id: str = "1", method: str = "POST", queue: int = 3) -> str:
    """The head that a client gets."""
    wire = Wire()
    exchange = Exchange(wire, Envelope(request_id, method, "/v1/completions", False, True, "", lambda: "date: now\r\n"))
    exchange.routed(Receipt(request_id, "r", "cost", Reason.LEAST_COST, queue))
    exchange.head(status, headers)
    exchange.finish()
    return wire.written.partition(b"\r\n\r\n")[0].decode()


def test_a_remembered_head_is_the_same_but_for_what_is_the_requests_own() -> None:
    first = head(200, (SSE, ("x-a", "1")), request_id="one", queue=3)
    again = head(200, [SSE, ("x-a", "1")], request_id="two", queue=4)
    assert first.splitlines() == [
        "HTTP/1.1 200 OK",
        "content-type: text/event-stream; charset=utf-8",
        "x-a: 1",
        "transfer-encoding: chunked",
        "x-kvlane-route: replica=r;policy=cost;reason=least_cost;queue=3",
        "x-request-id: one",
        "date: now",
    ]
    assert again == first.replace("one", "two").replace("queue=3", "queue=4")


def test_other_statuses_and_headers_have_heads_of_their_own() -> None:
    assert "x-a: 2" in head(200, (SSE, ("x-a", "2")))
    assert "x-a" not in head(200, (SSE,))
    assert head(206, (SSE, ("x-a", "2"))).startswith("HTTP/1.1 206 ")
    assert "transfer-encoding" not in head(200, (SSE, ("x-a", "2")), method="HEAD")


def test_no_more_heads_are_remembered_than_a_model_can_have() -> None:
    for number in range(300):
        assert f"x-n: {number}" in head(200, (SSE, ("x-n", str(number))))
        head(200, (("content-type", "application/json"), ("content-length", "0"), ("x-n", str(number))))
    assert len(http_response._known_heads) <= http_response._MOST_KNOWN
    assert all(lines.sse for lines in http_response._known_heads.values())


@pytest.mark.parametrize("value", ["a\r\nset-cookie: b", "a\n", "\r", "a\r\n\r\nHTTP/1.1 200 OK", "東"])
def test_a_head_that_cannot_be_sent_is_refused_each_time(value: str) -> None:
    for _ in range(2):
        with pytest.raises(ReplicaFailed):
            head(200, (SSE, ("x-b", value)))


@pytest.mark.parametrize("replica", ["r\r\nset-cookie: b", "r\n", "r\r"])
def test_a_replicas_name_adds_no_lines(replica: str) -> None:
    exchange = Exchange(Wire(), Envelope("1", "POST", "/", False, True, "", str))
    exchange.routed(Receipt("1", replica, "cost", Reason.LEAST_COST, 3))
    with pytest.raises(ReplicaFailed):
        exchange.head(200, (SSE,))
