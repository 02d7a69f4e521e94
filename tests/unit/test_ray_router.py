"""kvlane's policies as a request router of Ray Serve, without any cluster."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import msgspec
import pydantic
import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
from ray.serve.request_router import PendingRequest, ReplicaID

from router.errors import ConfigError
from router.policies.base import NoOptions
from router.policies.registry import policies
from router.prefix.hashing import Hasher
from router.ray_pool import UNTAKEN_S, InFlight, Pool, Seen, read_options
from router.ray_requests import request_of
from router.ray_router import request_router_config
from router.testing import make_request
from router.types import CacheMode, Decision, Reason, Request, Snapshot

DEPLOYMENT = DeploymentID("Llm", "app")


def metadata(request_id: str = "r", **fields: Any) -> RequestMetadata:
    return RequestMetadata(request_id=request_id, internal_request_id=request_id, call_method="chat", **fields)


class Message(pydantic.BaseModel):
    role: str
    content: str
    name: str | None = None


class ChatCompletionRequest(pydantic.BaseModel):
    """As Ray Serve LLM and vLLM have it."""

    model: str = "m"
    messages: list[Message] = []
    tools: list[dict[str, Any]] | None = None
    user: str | None = None
    temperature: float = 1.0


# -- requests


def test_a_dictionary_an_object_and_json_hash_alike() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    fields: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Why? " * 200}], "tools": tools}
    hasher = Hasher(256, 1 << 20)
    there = msgspec.structs.replace(make_request(model="m"), body=msgspec.json.encode(fields))
    chain = hasher.chain(there)
    assert chain is not None
    assert len(chain.blocks) == 3
    for argument in (fields, ChatCompletionRequest(**fields)):
        request, has_prompt = request_of([argument], {}, metadata())
        assert has_prompt
        assert hasher.chain(request) == chain


def test_the_prompt_is_found_among_the_arguments() -> None:
    for args, kwargs in (
        ([{"prompt": "a"}], {}),
        ([1, None, {"prompt": "a"}], {}),
        (["a"], {}),
        ([], {"request": {"prompt": "a"}}),
    ):
        request, has_prompt = request_of(args, kwargs, metadata())
        assert has_prompt
        assert (request.path, msgspec.json.decode(request.body)) == ("/v1/completions", {"prompt": "a"})


def test_session_model_and_adapter_are_told() -> None:
    asked = {"model": "m", "user": "u", "prompt": "a", "cache_salt": "c"}
    request, _ = request_of([asked], {}, metadata())
    assert (request.model, request.session_id, request.lora, request.cache_salt) == ("m", "u", "", "c")
    request, _ = request_of([asked], {}, metadata(session_id="s", multiplexed_model_id="adapter"))
    assert (request.session_id, request.lora) == ("s", "adapter")
    request, _ = request_of([{"prompt": "a"}], {}, metadata(multiplexed_model_id="adapter"), default_model="d")
    assert (request.model, request.session_id) == ("d", "adapter")


class Hostile:
    @property
    def messages(self) -> Any:
        raise RuntimeError("hands off")


@pytest.mark.parametrize("argument", [object(), Hostile(), {"prompt": object()}, {"messages": iter([])}, b"\xff", 5])
def test_what_is_no_openai_request_has_no_prompt(argument: Any) -> None:
    request, has_prompt = request_of([argument], {}, metadata(), default_model="d")
    assert not has_prompt
    assert request.model == "d"


def test_iterators_in_a_request_keep_their_items() -> None:
    calls = iter([{"id": "1"}])
    request_of([{"messages": [{"role": "assistant", "tool_calls": calls}]}], {}, metadata())
    assert list(calls) == [{"id": "1"}]


# -- requests in flight


def test_a_request_counts_from_the_choice_to_the_end() -> None:
    flight = InFlight()
    flight.chosen("a", "x", 0.0)
    flight.chosen("b", "x", 0.0)
    assert flight.count("x") == 2
    flight.taken("a", "y")
    assert (flight.count("x"), flight.count("y")) == (1, 1)
    flight.chosen("b", "y", 1.0)
    flight.ended("a")
    assert (flight.count("x"), flight.count("y")) == (0, 1)
    flight.left("y")
    flight.ended("b")
    assert flight.count("y") == 0


def test_what_no_replica_took_is_forgotten() -> None:
    flight = InFlight()
    for name, now in (("a", 0.0), ("b", 0.0), ("c", 3.0)):
        flight.chosen(name, "x", now)
    flight.taken("a", "x")
    flight.expire(UNTAKEN_S + 0.1)
    assert flight.count("x") == 2
    flight.expire(1000.0)
    assert flight.count("x") == 1


def test_a_request_that_ended_before_it_was_said_to_be_taken_counts_no_more() -> None:
    flight = InFlight()
    flight.chosen("a", "x", 0.0)
    flight.ended("a")
    flight.taken("a", "x")
    assert flight.count("x") == 0


EVENT = st.tuples(
    st.sampled_from(["chosen", "taken", "ended", "left"]), st.sampled_from("abcde"), st.sampled_from("xyz")
)


@settings(derandomize=True, max_examples=200)
@given(st.lists(EVENT, max_size=60))
def test_counts_neither_drift_nor_fall_below_zero(events: list[tuple[str, str, str]]) -> None:
    flight = InFlight()
    place: dict[str, str] = {}
    for now, (event, request, replica) in enumerate(events):
        if event == "chosen":
            flight.chosen(request, replica, float(now))
            place[request] = replica
        elif event == "taken":
            flight.taken(request, replica)
            if request in place:
                place[request] = replica
        elif event == "ended":
            flight.ended(request)
            place.pop(request, None)
        else:
            flight.left(replica)
            place = {each: where for each, where in place.items() if where != replica}
        assert [flight.count(each) for each in "xyz"] == [list(place.values()).count(each) for each in "xyz"]


# -- the pool


class Failures:
    """Remembers what a guard says (`router.policies.guard.GuardObserver`)."""

    def __init__(self) -> None:
        self.kinds: list[str] = []

    def policy_took(self, policy: str, seconds: float) -> None: ...

    def policy_failed(self, policy: str, kind: str) -> None:
        self.kinds.append(str(kind))


class Scripted:
    """A policy that shows what it was shown, and does as it is told."""

    Options: ClassVar[type[msgspec.Struct]] = NoOptions
    last: ClassVar[list[tuple[Request, Snapshot]]] = []
    fails: ClassVar[bool] = False

    def __init__(self, options: NoOptions, random: random.Random) -> None: ...

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        self.last.append((request, snapshot))
        if self.fails:
            raise ValueError("as told")
        first, *others = [view.replica for view in snapshot.replicas]
        return Decision(first, Reason.POLICY, (*others[:1], "gone"))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[Scripted]:
    create = policies.create

    def created(name: str, *args: Any) -> Any:
        return Scripted(NoOptions(), random.Random(1)) if name == "scripted" else create(name, *args)

    monkeypatch.setattr(policies, "create", created)
    monkeypatch.setattr("router.ray_pool.registry.create", created)
    monkeypatch.setattr(Scripted, "fails", False)
    Scripted.last.clear()
    return Scripted


def make_pool(policy: str = "prefix-affinity", **kwargs: Any) -> tuple[Pool, Failures]:
    failures = Failures()
    options = read_options({"policy": policy, "stall_ms": 60_000.0, **kwargs})
    pool = Pool("Llm", options, failures, clock=lambda: 0.0, timer=lambda: 0.0, rng=random.Random(1))
    pool.listed(["x", "y", "z"])
    return pool, failures


def seen(**queues: int) -> list[Seen]:
    return [Seen(name, queue, 10) for name, queue in queues.items()]


def test_policies_see_the_longer_of_both_counts(scripted: type[Scripted]) -> None:
    pool, _ = make_pool("scripted", kv_tokens=5000)
    for index in range(3):
        pool.choose(seen(x=1, y=4), ["a"], {}, metadata(f"r{index}"))
    view, other = scripted.last[-1][1].replicas
    assert (view.queue_depth, view.leases, view.max_num_seqs, view.kv_tokens) == (2, 2, 10, 5000)
    assert (other.queue_depth, other.leases, other.cache) == (4, 0, CacheMode.APPROXIMATE)
    pool.routed("y", ["a"], {}, metadata("r0"))
    pool.ended("r1")
    pool.choose(seen(x=0, y=0), ["a"], {}, metadata("last"))
    assert [view.queue_depth for view in scripted.last[-1][1].replicas] == [1, 1]


def test_the_choice_and_the_fallbacks_that_are_there_come_back(scripted: type[Scripted]) -> None:
    assert make_pool("scripted")[0].choose(seen(x=0, y=0), [], {}, metadata()) == ("x", "y")


def test_a_policy_that_fails_leaves_the_choice_to_ray(scripted: type[Scripted]) -> None:
    scripted.fails = True
    pool, failures = make_pool("scripted")
    assert pool.choose(seen(x=0, y=0), ["a"], {}, metadata()) == ()
    assert failures.kinds == ["raised"]


def test_a_prompt_is_remembered_where_it_was_sent() -> None:
    pool, _ = make_pool()
    prompt = "a long prompt " * 100
    (home,) = pool.choose(seen(x=0, y=0, z=0), [prompt], {}, metadata("r0"))
    pool.routed(home, [prompt], {}, metadata("r0"))
    for index in range(5):
        queues = {each: 0 if each != home else 3 for each in "xyz"}
        assert pool.choose(seen(**queues), [prompt + "and more"], {}, metadata(f"s{index}")) == (home,)


def test_a_prompt_that_another_replica_took_is_remembered_there() -> None:
    pool, _ = make_pool()
    prompt = "a long prompt " * 100
    pool.routed("z", [prompt], {}, metadata())
    assert pool.choose(seen(x=0, y=0, z=5), [prompt], {}, metadata()) == ("z",)


def test_a_replica_that_came_back_holds_nothing() -> None:
    pool, _ = make_pool()
    prompt = "a long prompt " * 100
    pool.routed("z", [prompt], {}, metadata())
    pool.left("z")
    pool.listed(["x", "y", "z"])
    assert pool.choose(seen(x=0, y=0, z=5), [prompt], {}, metadata()) != ("z",)


def test_without_prefixes_prompts_are_not_hashed(scripted: type[Scripted]) -> None:
    pool, _ = make_pool("scripted", prefix={"enabled": False})
    pool.choose(seen(x=0), ["a" * 1000], {}, metadata())
    snapshot = scripted.last[-1][1]
    assert snapshot.prefix.chain is None
    assert snapshot.replicas[0].cache is CacheMode.OFF


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({"policy": "least-queu"}, "least-queue"),
        ({"policy": 5}, "request_router_kwargs.policy"),
        ({"options": {"max_leed": 1}}, "request_router_kwargs.options.max_leed"),
        ({"prefix": {"block_bytes": 1}}, "request_router_kwargs.prefix.block_bytes"),
        ({"kv_token": 1}, "kv_tokens"),
        ({"stall_ms": 0}, "stall_ms"),
    ],
)
def test_options_that_cannot_be_used_are_refused_by_name(kwargs: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        request_router_config(**kwargs)


# -- the router as Serve runs it


class Replica:
    """What a router asks of a replica."""

    node_id = availability_zone = None
    is_cross_language = False
    max_ongoing_requests = 4
    multiplexed_model_ids: ClassVar[set[str]] = set()

    def __init__(self, name: str) -> None:
        self.name = name
        self.replica_id = ReplicaID(name, DEPLOYMENT)
        self.queue = 0

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return self.queue


class Served:
    """Serve's part: asks the router for a replica, sends, and says how it went."""

    def __init__(self, router: Any, replicas: list[Replica]) -> None:
        self.router = router
        self.replicas = replicas
        self._asked = 0

    def pending(self, *args: Any) -> Any:
        self._asked += 1
        return PendingRequest(args=list(args), kwargs={}, metadata=metadata(f"r{self._asked}"))

    async def send(self, *args: Any) -> tuple[str, str]:
        """The replica that took it, and the request's id."""
        pending = self.pending(*args)
        replica = await asyncio.wait_for(self.router._choose_replica_for_request(pending), 10.0)
        self.router.on_send_request(replica.replica_id)
        replica.queue += 1
        self.router.on_new_queue_len_info(replica.replica_id, replica.queue)
        self.router.on_request_routed(pending, replica.replica_id, None)
        return replica.name, pending.metadata.internal_request_id

    def end(self, name: str, request_id: str) -> None:
        (replica,) = [each for each in self.replicas if each.name == name]
        replica.queue -= 1
        self.router.on_request_completed(replica.replica_id, request_id)
        self.router.decrement_queue_len_cache(replica.replica_id)


@asynccontextmanager
async def served(count: int = 4, **kwargs: Any) -> AsyncIterator[Served]:
    # The class as processes with a handle get it: by value.
    config = request_router_config(**kwargs, stall_ms=60_000.0)
    router: Any = config.get_request_router_class()(
        deployment_id=DEPLOYMENT, handle_source=DeploymentHandleSource.UNKNOWN, use_replica_queue_len_cache=True
    )
    router.initialize_state(**config.request_router_kwargs)
    replicas = [Replica(f"x{index}") for index in range(count)]
    router.update_replicas(replicas)
    yield Served(router, replicas)
    leftover = asyncio.all_tasks() - {asyncio.current_task()}
    if leftover:
        await asyncio.wait(leftover, timeout=10.0)


async def test_serve_sends_requests_where_the_policy_says() -> None:
    async with served(policy="round-robin") as serve:
        places = [(await serve.send("a"))[0] for _ in range(8)]
    assert sorted(places[:4]) == ["x0", "x1", "x2", "x3"]
    assert places[4:] == places[:4]


async def test_requests_that_are_routed_at_once_do_not_herd() -> None:
    async with served(policy="least-queue") as serve:
        sent = await asyncio.gather(*(serve.send("a") for _ in range(12)))
    assert Counter(place for place, _ in sent) == {"x0": 3, "x1": 3, "x2": 3, "x3": 3}


async def test_a_full_replica_is_left_out() -> None:
    async with served(policy="session", options={"max_lead": 100}) as serve:
        asked = {"prompt": "a", "user": "u"}
        sent = [await serve.send(asked) for _ in range(6)]
        assert list(Counter(place for place, _ in sent).values()) == [4, 2]
        home = sent[0][0]
        serve.end(*sent[0])
        assert (await serve.send(asked))[0] == home


async def test_while_all_are_full_requests_wait_and_are_then_sent() -> None:
    async with served(count=2, policy="least-queue") as serve:
        sent = [await serve.send("a") for _ in range(8)]
        waiting = asyncio.create_task(serve.send("a"))
        await asyncio.sleep(0)
        serve.end(*sent[0])
        assert (await waiting)[0] == sent[0][0]


async def test_a_queue_that_is_not_known_is_asked_for() -> None:
    async with served(count=2, policy="least-queue") as serve:
        busy, idle = serve.replicas
        busy.queue = 3
        for replica in serve.replicas:
            serve.router.replica_queue_len_cache.invalidate_key(replica.replica_id)
        await serve.send("a")  # either: nobody knows
        await asyncio.wait_for(asyncio.gather(serve.router._probe), 10.0)
        assert serve.router.replica_queue_len_cache.get(busy.replica_id) >= 3
        assert (await serve.send("a"))[0] == idle.name


async def test_a_replica_that_died_is_chosen_no_more() -> None:
    async with served(count=2, policy="round-robin") as serve:
        serve.router.on_replica_actor_died(serve.replicas[0].replica_id)
        assert {(await serve.send("a"))[0] for _ in range(3)} == {"x1"}


async def test_prompts_stay_together_as_far_as_load_allows() -> None:
    async with served(policy="prefix-affinity", options={"max_lead": 1, "load_factor": 1.0}) as serve:
        prompt = "a long prompt " * 100
        place, request_id = await serve.send(prompt)
        serve.end(place, request_id)
        assert (await serve.send(prompt))[0] == place
        others = [(await serve.send(prompt))[0] for _ in range(11)]
    assert Counter([place, *others]) == dict.fromkeys(["x0", "x1", "x2", "x3"], 3)


async def test_where_the_policy_fails_rays_power_of_two_decides(
    scripted: type[Scripted], caplog: pytest.LogCaptureFixture
) -> None:
    scripted.fails = True
    async with served(policy="scripted") as serve:
        places = {(await serve.send("a"))[0] for _ in range(16)}
    assert len(places) == 4
    assert "raised ValueError" in caplog.text


async def test_a_defect_of_the_adapter_leaves_no_request_unanswered(caplog: pytest.LogCaptureFixture) -> None:
    async with served(policy="least-queue") as serve:
        serve.router._pool.choose = lambda *_: 1 / 0
        assert len({(await serve.send("a"))[0] for _ in range(16)}) == 4
    assert "Ray Serve's own router does" in caplog.text


async def test_wrong_options_that_were_not_checked_before_are_refused_by_the_router() -> None:
    async with served(policy="least-queue") as serve:
        with pytest.raises(ConfigError, match="unknown"):
            serve.router.initialize_state(policy="nothing")


def test_no_cluster_was_started() -> None:
    assert not ray.is_initialized()
