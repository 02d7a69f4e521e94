"""The admin port: health, metrics and route receipts, and nothing that reaches a replica."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from router.errors import InvalidRequest
from router.ingress.admin import AdminPort
from router.observe.routes import RouteLog
from router.options import AdminOptions
from router.types import Candidate, Reason, Receipt, Request, Rpc
from tests.unit.http_ingress.serving import Answer, Client, FakeFleet, get, post


def receipt(request_id: str, replica: str = "a", **fields: Any) -> Receipt:
    return Receipt(request_id, replica, "cost", Reason.LEAST_COST, 2, **fields)


def request(request_id: str, model: str = "tiny") -> Request:
    return Request(request_id, model, Rpc.HTTP, "/v1/chat/completions", b'{"messages": "a secret"}')


def log_of(*receipts: Receipt, size: int = 8, model: str = "tiny") -> RouteLog:
    log = RouteLog(size, wall=lambda: 1_700_000_000.5)
    for one in receipts:
        log.record(request(one.request_id, model), one)
    return log


def ids(page: bytes) -> list[str]:
    return [record["route"]["request_id"] for record in json.loads(page)["routes"]]


class Admin:
    """A running admin port."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def say(self, data: bytes) -> Answer:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        try:
            client.write(data)
            return await client.answer()
        finally:
            await client.close()


@asynccontextmanager
async def admin(log: RouteLog) -> AsyncIterator[Admin]:
    port = AdminPort(AdminOptions(port=0), FakeFleet(), metrics=lambda: (b"up 1\n", "text/plain"), routes=log.page)
    yield Admin(await port.start())
    await port.stop(0)


async def test_the_pages_of_the_admin_port() -> None:
    async with admin(log_of()) as serving:
        assert (await serving.say(get("/healthz"))).body == b"ok"
        assert json.loads((await serving.say(get("/readyz"))).body)["ready"]
        assert (await serving.say(get("/metrics"))).body == b"up 1\n"
        assert json.loads((await serving.say(get("/debug/routes"))).body) == {"routes": []}


async def test_nothing_else_is_there_and_nothing_can_be_sent() -> None:
    async with admin(log_of()) as serving:
        assert (await serving.say(get("/v1/models"))).status == 404
        assert (await serving.say(post())).status in (404, 413)
        assert (await serving.say(get("/debug/routes", method="DELETE"))).status == 405
        assert (await serving.say(get("/debug/routes?limit=many"))).status == 400


async def test_a_receipt_tells_of_every_candidate_and_nothing_of_the_prompt() -> None:
    candidates = (Candidate("a", 2, 5, 400, 0.02, 0.31), Candidate("b", 0, 0, 0, 0.05, None))
    one = receipt("r1", matched=5, blocks=9, cached_tokens=400, prompt_tokens=720, score=0.31, candidates=candidates)
    async with admin(log_of(one)) as serving:
        answer = await serving.say(get("/debug/routes"))
    assert answer.headers["content-type"] == "application/json"
    (record,) = json.loads(answer.body)["routes"]
    assert (record["time_s"], record["model"]) == (1_700_000_000.5, "tiny")
    assert record["route"]["candidates"][1] == {
        "replica": "b",
        "queue_depth": 0,
        "matched": 0,
        "cached_tokens": 0,
        "expected_s": 0.05,
        "score": None,
        "asleep": False,
    }
    assert (record["route"]["reason"], record["route"]["matched"]) == ("least_cost", 5)
    assert b"secret" not in answer.body


def test_a_receipt_says_whose_api_key_its_request_came_with() -> None:
    log = RouteLog(8, wall=lambda: 1_700_000_000.5)
    log.record(msgspec.structs.replace(request("r1"), tenant="team-a"), receipt("r1"))
    (record,) = json.loads(log.page(""))["routes"]
    assert record["tenant"] == "team-a"


def test_receipts_come_newest_first_and_the_oldest_are_forgotten() -> None:
    log = log_of(*(receipt(f"r{i}") for i in range(6)), size=4)
    assert ids(log.page("")) == ["r5", "r4", "r3", "r2"]
    assert ids(log.page("limit=2")) == ["r5", "r4"]
    assert ids(log.page("limit=0")) == []


def test_receipts_can_be_filtered() -> None:
    log = log_of(receipt("r1", "a"), receipt("r2", "b"), receipt("r3", "a"))
    log.record(request("r4", "other"), receipt("r4", "b"))
    assert ids(log.page("replica=b")) == ["r4", "r2"]
    assert ids(log.page("replica=b&model=tiny")) == ["r2"]
    assert ids(log.page("request_id=r3")) == ["r3"]
    assert ids(log.page("replica=a&limit=1")) == ["r3"]
    assert ids(log.page("replica=")) == []


@pytest.mark.parametrize("query", ["limit=-1", "limit=", "limit=1e3", "limit=99999999999", "prompt=x"])
def test_a_query_that_says_nothing_is_refused(query: str) -> None:
    with pytest.raises(InvalidRequest):
        log_of().page(query)
