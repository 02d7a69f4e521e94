"""What one routing decision takes: `python -m loadtests.decision [--replicas N] [--policies NAME,…] …`.

Runs the router's own dispatch, with lanes whose transports lead nowhere, and measures from `Dispatcher.run` to the
sink's `routed`: admission, hashing the prompt, the snapshot, the look-up, the policy under its guard, charge, lease and
hold. What follows (encoding the submit, writing it) belongs to relaying. All replicas hold the prompt's system prompt,
a quarter of them the text after it, and the rest is new. Between two decisions a request ends and some replicas send
steps, from which the load model learns, so that views and processor caches are as under load. Figures are CPU time,
which other processes disturb least, and medians over rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import statistics
import time
from array import array
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec

from router.app import App
from router.lane import frames
from router.lane.client import Lane
from router.lane.frames import CacheReport, End, Step, Welcome
from router.membership.base import ReplicaRecord
from router.options import Config, GrpcOptions, HttpOptions, MembershipOptions, PolicyOptions, StaticReplica
from router.types import EngineInfo, Headers, Load, ModelCard, Receipt, Request, Rpc

MODEL = "m"
BLOCK_TOKENS = 64
"""Prompt tokens of a prefix block, as with four bytes per token."""
SYSTEMS, TEXTS = 4, 64
"""How many system prompts and texts there are for requests to begin with."""
WARM_UP = 500
"""Decisions before the first round: the load model and the interpreter settle."""


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured."""

    policies: str = "power-of-two,prefix-affinity,cost"
    replicas: int = 64
    blocks: int = 1_000_000
    """Prefix blocks indexed, of all replicas together."""
    prompt_bytes: int = 4096
    requests: int = 1000
    """Per round."""
    rounds: int = 7
    stepping: int = 8
    """Replicas that send a step between two decisions."""
    in_flight: int = 200
    seed: int = 1


class Figures(msgspec.Struct, frozen=True):
    """Microseconds per decision."""

    p50_us: float
    p90_us: float
    p99_us: float


class _Nowhere(asyncio.Transport):
    """Takes everything and answers nothing."""

    def write(self, data: object) -> None: ...
    def abort(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...

    def is_closing(self) -> bool:
        return False


class _Carrier:
    """Opens lanes to replicas that are not there."""

    def __init__(self) -> None:
        self.lanes: list[Lane] = []

    async def connect(self, record: ReplicaRecord, protocol: Callable[[], asyncio.Protocol]) -> asyncio.BaseTransport:
        lane = protocol()
        assert isinstance(lane, Lane)
        transport = _Nowhere()
        lane.connection_made(transport)
        info = EngineInfo("bench", (ModelCard(MODEL),), (), 256, 50_000, 16)
        lane.data_received(frames.encode(Welcome(frames.VERSION, record.replica, info, Load())))
        self.lanes.append(lane)
        return transport


class _Watch:
    """A sink that notes when it was told of the decision."""

    started = False

    def __init__(self) -> None:
        self.told = 0

    def routed(self, receipt: Receipt) -> None:
        self.told = time.thread_time_ns()

    def head(self, status: int, headers: Headers) -> None: ...
    def data(self, payload: bytes, tokens: int) -> None: ...


class _Prompts:
    """Chats of a system prompt (a quarter), a text that others sent before (a quarter), and one of their own."""

    def __init__(self, prompt_bytes: int, rng: random.Random) -> None:
        self._rng = rng
        self._part = prompt_bytes // 4
        self._systems = [self._text(self._part) for _ in range(SYSTEMS)]
        self._texts = [self._text(self._part) for _ in range(TEXTS)]

    def _text(self, length: int) -> str:
        return "".join(self._rng.choices("abcdefghij klmnopqrst", k=length))

    def request(self, name: str, text: int | None = None) -> Request:
        """With the shared text of that number, by default any."""
        number = self._rng.randrange(TEXTS) if text is None else text
        said = [self._systems[number % SYSTEMS], self._texts[number], self._text(self._part * 2)]
        roles = ("system", "user", "user")
        turns = [{"role": role, "content": content} for role, content in zip(roles, said, strict=True)]
        body = json.dumps({"model": MODEL, "messages": turns, "stream": True}).encode()
        return Request(name, MODEL, Rpc.HTTP, "/v1/chat/completions", body)


class _Fleet:
    """The replicas' side: what they hold, and their steps."""

    def __init__(self, lanes: list[Lane], rng: random.Random) -> None:
        self._lanes = lanes
        self._rng = rng
        self._seq = 1

    def report(self, app: App, prompts: _Prompts, blocks: int) -> None:
        """Each holds all system prompts, a quarter of the texts, and other prompts up to its share of the blocks."""
        for lane in self._lanes:
            lane.data_received(self._told(CacheReport(1, snapshot=True)))
        asked = [(lane, text) for text in range(SYSTEMS) for lane in self._lanes]
        for text in range(SYSTEMS, TEXTS):
            asked += [(lane, text) for lane in self._rng.sample(self._lanes, len(self._lanes) // 4)]
        self._rng.shuffle(asked)
        seqs = dict.fromkeys(self._lanes, 1)
        held = dict.fromkeys(self._lanes, 0)
        for lane, text in asked:  # Replicas report prompts as they compute them.
            chain = app.prefixes.chain(prompts.request("r", text))
            assert chain is not None
            seqs[lane] += 1
            held[lane] += len(chain.blocks)
            lane.data_received(self._told(_stored(seqs[lane], chain.blocks)))
        for lane in self._lanes:
            others = [self._rng.getrandbits(64) for _ in range(blocks // len(self._lanes) - held[lane])]
            lane.data_received(self._told(_stored(seqs[lane] + 1, others)))
        while app.prefixes.sweep():
            pass  # The router does it in slices between requests.
        assert app.prefixes.status().blocks >= 0.9 * blocks

    def _told(self, report: CacheReport) -> bytes:
        self._seq += 1
        return frames.encode(Step(self._seq, 0, Load(), [], report))

    def step(self, stepping: int) -> None:
        """Some replicas send a step, as a large GPU makes them with a small model."""
        for lane in self._rng.sample(self._lanes, min(stepping, len(self._lanes))):
            self._seq += 1
            lane.data_received(frames.encode(Step(self._seq, 1 << 30, self._load(), [])))

    def _load(self) -> Load:
        chance = self._rng
        running, waiting = chance.randint(1, 40), chance.randint(0, 3)
        new = chance.choice([0, 0, chance.randint(100, 4000)])
        pairs, context = new * chance.uniform(0, 4000), running * chance.randint(500, 2000)
        expected_ms = 2.5 + 4.6 + 0.0211 * (new + running) + 1.31e-6 * pairs + 3.6e-5 * context
        return Load(
            running=running,
            waiting=waiting,
            queued_prefill_tokens=waiting * 2000,
            kv_usage=chance.uniform(0.3, 0.6),
            step_ms=expected_ms * chance.gauss(1, 0.05),
            queued_prefill_pairs=waiting * 2e6,
            step_prefill_tokens=new,
            step_prefill_pairs=pairs,
            step_decodes=running,
            step_context_tokens=context,
        )


def _stored(seq: int, blocks: Sequence[int]) -> CacheReport:
    depths = array("I", [BLOCK_TOKENS * (i % 64 + 1) for i in range(len(blocks))])
    return CacheReport(seq, stored=array("Q", blocks).tobytes(), depths=depths.tobytes())


async def measure(setup: Setup) -> dict[str, list[Figures]]:
    """The rounds of each policy."""
    found = {}
    for policy in setup.policies.split(","):
        rng = random.Random(setup.seed)
        prompts = _Prompts(setup.prompt_bytes, rng)
        app = App(_config(policy, setup.replicas))
        carrier = app.replicas.carrier = _Carrier()
        await app.start()
        while app.replicas.readiness().models.get(MODEL) != setup.replicas:
            await app.replicas.wait_for_news()
        fleet = _Fleet(carrier.lanes, rng)
        fleet.report(app, prompts, setup.blocks)
        found[policy] = _rounds(app, fleet, prompts, setup)
        await app.stop(0)
    return found


def _config(policy: str, replicas: int) -> Config:
    members = tuple(StaticReplica(name=f"llm#engine#{i:08x}", port=1) for i in range(replicas))
    return Config(
        http=HttpOptions(enabled=False),
        grpc=GrpcOptions(enabled=False),
        membership=MembershipOptions(kind="static", replicas=members),
        policy=PolicyOptions(name=policy),
    )


def _rounds(app: App, fleet: _Fleet, prompts: _Prompts, setup: Setup) -> list[Figures]:
    flying: list[Coroutine[Any, Any, End]] = []
    rng = random.Random(setup.seed)

    def decide(number: int) -> float:
        """One decision, after what happens between two; microseconds."""
        fleet.step(setup.stepping)
        if len(flying) > setup.in_flight:
            flying.pop(rng.randrange(len(flying))).close()
        request, watch = prompts.request(f"r{number}"), _Watch()
        running = app.dispatcher.run(request, watch)
        began = time.thread_time_ns()
        running.send(None)  # Runs until it waits for the stream's end.
        flying.append(running)
        return (watch.told - began) * 1e-3

    gc.collect()
    gc.freeze()
    for number in range(WARM_UP):
        decide(number)
    rounds = [figures([decide(number) for number in range(setup.requests)]) for _ in range(setup.rounds)]
    for running in flying:
        running.close()
    gc.unfreeze()
    return rounds


def figures(took: list[float]) -> Figures:
    """Of one round."""
    took.sort()
    return Figures(*(round(took[int(len(took) * share)], 1) for share in (0.5, 0.9, 0.99)))


def medians(rounds: list[Figures]) -> Figures:
    """Of several rounds."""
    return Figures(*(statistics.median(getattr(one, field) for one in rounds) for field in Figures.__struct_fields__))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.decision")
    for field in msgspec.structs.fields(Setup):
        parser.add_argument(f"--{field.encode_name.replace('_', '-')}", type=type(field.default), default=field.default)
    setup = Setup(**vars(parser.parse_args()))
    print("| policy | p50, µs | p90, µs | p99, µs | least disturbed round |\n|---|---|---|---|---|")
    for policy, rounds in asyncio.run(measure(setup)).items():
        usual, best = medians(rounds), min(rounds, key=lambda one: one.p50_us)
        cells = (policy, usual.p50_us, usual.p90_us, usual.p99_us, f"{best.p50_us} / {best.p90_us} / {best.p99_us}")
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
