"""A server that goes away in a while: unready, it serves whoever still comes, and asks clients to go elsewhere."""

from __future__ import annotations

import asyncio
import json

from router.ingress.http_connection import LAST_CALL_S
from router.types import Request, Sink
from tests.unit.http_ingress.serving import DEADLINE_S, SSE, get, post, served

NOTICE_S = 60.0


async def test_in_a_notice_the_server_is_unready_alive_and_serves_old_and_new_connections() -> None:
    async with served() as serving:
        old = await serving.connect()
        old.write(get("/readyz"))
        assert "leaving" not in json.loads((await old.answer()).body)
        serving.ingress.notice(NOTICE_S)
        for client in (old, await serving.connect()):
            client.write(post())
            answer = await client.answer()
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            assert await client.rest() == b""
            await client.close()
        unready = await serving.say(get("/readyz"))
        assert (unready.status, json.loads(unready.body)["leaving"]) == (503, True)
        assert not json.loads(unready.body)["ready"]
        assert (await serving.say(get("/healthz"))).status == 200


async def test_in_a_notice_idle_connections_stay_since_their_next_request_may_be_on_its_way() -> None:
    async with served() as serving:
        client = await serving.connect()
        client.write(get("/healthz"))
        await client.answer()
        serving.ingress.notice(NOTICE_S)
        serving.pass_time(10 * LAST_CALL_S)
        client.write(post())
        assert (await client.answer()).status == 200
        assert await client.rest() == b""
        await client.close()


async def test_an_answer_whose_head_is_to_come_says_so_already_and_a_stream_in_flight_leaves_room_for_one_more() -> (
    None
):
    release = {b"early": asyncio.Event(), b"late": asyncio.Event()}

    async def slow(request: Request, sink: Sink) -> None:
        early = b"early" in request.body
        if early:
            await release[b"early"].wait()
        sink.head(200, SSE)
        sink.data(b"data: one\n\n", 1)
        if not early:
            await release[b"late"].wait()
            sink.data(b"data: two\n\n", 1)

    async with served(slow) as serving:
        early, late = await serving.connect(), await serving.connect()
        early.write(post("/v1/chat/completions", b'{"model":"early"}'))
        late.write(post("/v1/chat/completions", b'{"model":"late"}'))
        assert "connection" not in (await late.head())[1]
        await serving.until(lambda: len(serving.dispatch.requests) == 2)
        serving.ingress.notice(NOTICE_S)
        for event in release.values():
            event.set()
        assert (await early.answer()).headers["connection"] == "close"
        assert [await late.chunk() for _ in range(3)] == [b"data: one\n\n", b"data: two\n\n", b""]
        late.write(get("/healthz"))
        assert (await late.answer()).headers["connection"] == "close"
        await early.close()
        await late.close()


async def test_in_a_notice_all_of_several_pipelined_requests_are_answered_and_the_last_answer_says_so() -> None:
    async with served() as serving:
        client = await serving.connect()
        client.write(get("/healthz"))
        await client.answer()
        serving.ingress.notice(NOTICE_S)
        client.write(post() + get("/healthz") + post())
        answers = [await client.answer() for _ in range(3)]
        assert [answer.status for answer in answers] == [200, 200, 200]
        assert [answer.headers.get("connection") for answer in answers] == [None, None, "close"]
        await client.close()


async def test_a_stop_ends_a_notice() -> None:
    async with served() as serving:
        client = await serving.connect()
        client.write(get("/healthz"))
        await client.answer()
        serving.ingress.notice(NOTICE_S)
        await asyncio.wait_for(serving.ingress.stop(NOTICE_S), DEADLINE_S)
        assert await client.rest() == b""
        await client.close()
