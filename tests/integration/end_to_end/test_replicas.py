"""What the others left in the replicas, then their death and replacement under load; the last part, in this order."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter

import httpx
import pytest
from kvlane.client import Client

from loadtests.processes import descendants
from tests.integration.asking import CUT, ERROR_EVENT, WHOLE, ask, ask_grpc
from tests.integration.end_to_end.sending import DEADLINE_S, PLACES, eventually
from tests.integration.ray_local import alive
from tests.integration.stack import Stack
from tests.integration.vllm_fixtures import MODEL

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

REPLACED_DEADLINE_S = 180.0


async def test_both_replicas_serve_and_the_router_is_ready(stack: Stack) -> None:
    async with httpx.AsyncClient(timeout=DEADLINE_S) as http:
        assert (await http.get(f"{stack.http}/readyz")).json()["models"] == {MODEL: 2}
        # At once: one after another they may all go to the replica whose steps are the shorter.
        answers = await asyncio.gather(*(ask(http, stack.http, MODEL, 1, stream=True) for _ in range(3 * PLACES)))
    assert {outcome for _, outcome in answers} == {WHOLE}
    assert {replica for replica, _ in answers} == stack.replica_names()


def test_nothing_is_left_in_router_lanes_or_engines(stack: Stack) -> None:
    eventually(stack.idle)


def test_no_replica_has_logged_a_traceback(stack: Stack) -> None:
    logs = stack.replica_logs()
    assert any("replica" in name for name in logs), sorted(logs)
    assert "Traceback" not in stack.log()
    traces = {name: text[text.index("Traceback") :][:3000] for name, text in logs.items() if "Traceback" in text}
    assert not traces, "\n".join(f"{name}: {text}" for name, text in traces.items())


# -- the death of a replica under load; after the look into the logs, for the dead one's end is in them


async def test_requests_outlive_a_killed_replica_and_its_replacement_takes_traffic(stack: Stack) -> None:
    tokens = 600
    async with httpx.AsyncClient(timeout=REPLACED_DEADLINE_S) as http, Client(stack.grpc) as rpc:
        # A first try of this test may have killed one.
        await asyncio.to_thread(eventually, lambda: len(stack.replica_names()) == 2, REPLACED_DEADLINE_S)
        await asyncio.to_thread(eventually, stack.idle)
        before, victim = stack.replica_names(), stack.replicas()[0]
        children = descendants(victim)
        begun, decided = map(stack.metric, ("kvlane_first_output_seconds_count", "kvlane_policy_seconds_count"))
        # In this order each engine begins streams of both kinds, also where one has the first ones all to itself.
        streams: list[asyncio.Task[tuple[str, str]]] = []
        for count, is_grpc in ((4, True), (8, False), (4, True), (4, False), (4, True)):
            for _ in range(count):
                asked = ask_grpc(rpc, MODEL, tokens) if is_grpc else ask(http, stack.http, MODEL, tokens, stream=True)
                streams.append(asyncio.create_task(asked))
            await asyncio.to_thread(
                eventually, lambda: stack.metric("kvlane_policy_seconds_count") >= decided + len(streams)
            )
        wholes = [asyncio.create_task(ask(http, stack.http, MODEL, tokens, stream=False)) for _ in range(8)]
        count = len(streams) + len(wholes)
        await asyncio.to_thread(eventually, lambda: stack.metric("kvlane_policy_seconds_count") >= decided + count)
        await asyncio.to_thread(eventually, lambda: stack.metric("kvlane_first_output_seconds_count") >= begun + PLACES)
        os.kill(victim, signal.SIGKILL)
        results = await asyncio.wait_for(asyncio.gather(*streams, *wholes), REPLACED_DEADLINE_S)
        outcomes = Counter(outcome for _, outcome in results)
        print(outcomes)
        assert set(outcomes) == {WHOLE, ERROR_EVENT, CUT}
        assert outcomes[ERROR_EVENT] + outcomes[CUT] <= PLACES // 2, "only streams that the dead replica had begun"
        assert {outcome for _, outcome in results[len(streams) :]} == {WHOLE}
        await asyncio.to_thread(eventually, lambda: not any(map(alive, [victim, *children])))

        async with asyncio.timeout(REPLACED_DEADLINE_S):
            new: set[str] = set()
            while not new:
                replica, outcome = await ask(http, stack.http, MODEL, 2, stream=True)
                assert outcome == WHOLE
                new = {replica} - before
            while (await ask_grpc(rpc, MODEL, 2)) != (*new, WHOLE):
                pass
        assert (await http.get(f"{stack.http}/readyz")).json()["models"] == {MODEL: 2}
    await asyncio.to_thread(eventually, stack.idle)


# -- replicas that Serve takes away or replaces, under load


async def test_no_request_fails_while_a_replica_goes_and_the_other_is_replaced(stack: Stack) -> None:
    over = asyncio.Event()
    ends: list[tuple[str, str]] = []
    async with httpx.AsyncClient(timeout=REPLACED_DEADLINE_S) as http, Client(stack.grpc) as rpc:
        if stack.metric("kvlane_replicas_ready") < 2:  # A first try of this test took one away.
            await asyncio.to_thread(stack.deploy, replicas=2)
            await asyncio.to_thread(eventually, lambda: stack.metric("kvlane_replicas_ready") == 2)

        async def client(number: int) -> None:
            while not over.is_set():
                if number % 3:
                    ends.append(await ask(http, stack.http, MODEL, 150, stream=number % 3 == 1))
                else:
                    ends.append(await ask_grpc(rpc, MODEL, 150))

        # More of them than one engine has places, so that the one that goes has requests.
        clients = [asyncio.create_task(client(number)) for number in range(PLACES // 2 + 4)]
        try:
            await asyncio.to_thread(eventually, lambda: len({replica for replica, _ in ends}) == 2)
            await asyncio.to_thread(stack.deploy, replicas=1)
            await asyncio.to_thread(eventually, lambda: stack.metric("kvlane_replicas_ready") == 1)
            (left,) = {(await ask(http, stack.http, MODEL, 2, stream=True))[0] for _ in range(8)}
            await asyncio.to_thread(stack.deploy, replicas=1, env={"KVLANE_TEST": "1"})
            await asyncio.to_thread(eventually, lambda: stack.metric("kvlane_replicas_ready") == 1)
            (new,) = {(await ask(http, stack.http, MODEL, 2, stream=True))[0] for _ in range(8)}
        finally:
            over.set()
            await asyncio.gather(*clients)
    assert new != left
    assert {replica for replica, _ in ends} > {left, new}
    assert {outcome for _, outcome in ends} == {WHOLE}
    print(f"{len(ends)} requests whole")
