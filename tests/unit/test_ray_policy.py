"""Ray Serve's request routers as a policy, without any cluster."""

from __future__ import annotations

import asyncio
import os.path
import random
import subprocess
import sys
from collections import Counter
from typing import Any, ClassVar

import msgspec
import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st
from kvlane.v1 import inference_pb2 as pb
from ray.serve.request_router import RequestRouter

from router.errors import ConfigError
from router.policies import registry
from router.policies.base import NoOptions
from router.policies.guard import Guard
from router.policies.least_queue import LeastQueue
from router.policies.ray_policy import MAX_POOLS, RayPolicy
from router.ray_driver import shared_prefix
from router.ray_requests import MAX_BODY_BYTES, ask_of
from router.testing import check_policy, make_replica, make_request, make_snapshot
from router.types import Reason, Request, Rpc, Snapshot

PREFIX_AWARE = "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router.PrefixCacheAffinityRouter"
HERE = "tests.unit.test_ray_policy"


def make_policy(router_class: str = "", seed: int = 1, **kwargs: Any) -> RayPolicy:
    options = {"class": router_class} if router_class else {}
    return RayPolicy(msgspec.convert(options | {"kwargs": kwargs}, RayPolicy.Options), random.Random(seed))


class Recorder(RequestRouter):  # type: ignore[misc]
    """Names the last replica and the first, and remembers what happened to it."""

    events: ClassVar[list[tuple[Any, ...]]] = []

    def initialize_state(self, greeting: str = "") -> None:
        self.events.append(("state", greeting))

    async def choose_replicas(self, candidate_replicas: Any, pending_request: Any = None) -> Any:
        self.events.append(("asked", pending_request))
        lengths = [await each.get_queue_len(deadline_s=1) for each in candidate_replicas]
        probed = await self._probe_queue_lens(candidate_replicas, 0)
        assert [length for _, length in probed] == lengths
        assert [each.routing_stats["running"] for each in candidate_replicas] == lengths
        return [[], [candidate_replicas[-1]], [candidate_replicas[0]]]

    def update_replicas(self, replicas: Any) -> None:
        super().update_replicas(replicas)
        self.events.append(("replicas", sorted(each.replica_id.unique_id for each in replicas)))

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        self.events.append(("routed", pending_request.metadata.request_id, replica_id.unique_id))


class Sleeper(RequestRouter):  # type: ignore[misc]
    async def choose_replicas(self, candidate_replicas: Any, pending_request: Any = None) -> Any:
        await asyncio.sleep(0)
        return [candidate_replicas]


class Undecided(RequestRouter):  # type: ignore[misc]
    async def choose_replicas(self, candidate_replicas: Any, pending_request: Any = None) -> Any:
        return [[]]


class NeedsCluster(RequestRouter):  # type: ignore[misc]
    def initialize_state(self) -> None:
        ray.get_actor("somebody")

    async def choose_replicas(self, candidate_replicas: Any, pending_request: Any = None) -> Any:
        return [candidate_replicas]


@pytest.fixture(autouse=True)
def events() -> list[tuple[Any, ...]]:
    Recorder.events.clear()
    return Recorder.events


class Deaf:
    """Counts nothing (`router.policies.guard.GuardObserver`)."""

    def policy_took(self, policy: str, seconds: float) -> None: ...
    def policy_failed(self, policy: str, kind: str) -> None: ...


# -- the policy


class PowerOfTwo(RayPolicy):
    """Ray's default, held to all that policies without affinity owe."""

    affinity = False


def test_rays_power_of_two_keeps_the_promises_of_policies() -> None:
    check_policy(PowerOfTwo)


def test_rays_prefix_aware_router_keeps_the_promises_of_policies() -> None:
    check_policy(RayPolicy, {"class": PREFIX_AWARE})


def test_no_cluster_was_started() -> None:
    assert not ray.is_initialized()


def test_the_policy_costs_no_import_of_ray_until_it_is_made() -> None:
    code = "import sys; from router.policies import registry; registry.installed(); assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_power_of_two_takes_the_shorter_queue_and_names_the_other_as_fallback() -> None:
    decision = make_policy().choose(make_request(), make_snapshot([5, 3]))
    assert (decision.replica, decision.fallbacks) == ("replica-1", ("replica-0",))
    assert (decision.reason, decision.score) == (Reason.POLICY, 3)


def test_a_router_learns_of_every_choice(events: list[tuple[Any, ...]]) -> None:
    policy = make_policy(f"{HERE}:Recorder", greeting="hello")
    events.clear()
    for name in ("a", "b"):
        policy.choose(make_request(request_id=name), make_snapshot([0, 7]))
    told = [event for event in events if event[0] != "asked"]
    expected = [("routed", "a", "replica-1"), ("routed", "b", "replica-1")]
    assert told == [("state", "hello"), ("replicas", ["replica-0", "replica-1"]), *expected]


def test_ranks_become_the_choice_and_its_fallbacks() -> None:
    decision = make_policy(f"{HERE}:Recorder").choose(make_request(), make_snapshot([0, 7, 9]))
    assert (decision.replica, decision.fallbacks) == ("replica-2", ("replica-0",))


def test_a_router_sees_the_request_as_a_deployment_would(events: list[tuple[Any, ...]]) -> None:
    policy = make_policy(f"{HERE}:Recorder")
    policy.choose(make_request("Why?", session_id="s"), make_snapshot([0, 0]))
    pending = events[-2][1]
    assert pending.args[0].messages == pending.args[0]["messages"] == [{"role": "user", "content": "Why?"}]
    assert not hasattr(pending.args[0], "prompt")
    assert (pending.metadata.request_id, pending.metadata.session_id) == ("request-0", "s")
    assert (pending.metadata.call_method, pending.metadata.is_streaming) == ("completions", True)


def test_a_router_is_told_when_replicas_come_and_go(events: list[tuple[Any, ...]]) -> None:
    policy = make_policy(f"{HERE}:Recorder")
    for names in (["a", "b"], ["b", "a"], ["b"], ["b", "c"]):
        policy.choose(make_request(), make_snapshot([0] * len(names), names=names))
    told = [event[1] for event in events if event[0] == "replicas"]
    assert told == [["a", "b"], ["b"], ["b", "c"]]


def test_each_model_has_a_router_of_its_own(events: list[tuple[Any, ...]]) -> None:
    policy = make_policy(f"{HERE}:Recorder")
    for model in ("m", "n", "m"):
        policy.choose(make_request(), make_snapshot([0, 0], model=model, names=[f"{model}-0", f"{model}-1"]))
    assert [event[1] for event in events if event[0] == "replicas"] == [["m-0", "m-1"], ["n-0", "n-1"]]


def test_routers_of_models_that_nobody_asks_for_are_dropped(events: list[tuple[Any, ...]]) -> None:
    policy = make_policy(f"{HERE}:Recorder")
    for index in range(MAX_POOLS + 1):
        policy.choose(make_request(), make_snapshot([0, 0], model=f"m{index}"))
    made = sum(event[0] == "state" for event in events)
    for index in (MAX_POOLS, 0):
        policy.choose(make_request(), make_snapshot([0, 0], model=f"m{index}"))
    assert sum(event[0] == "state" for event in events) == made + 1


@pytest.mark.parametrize("router_class", ["", PREFIX_AWARE])
def test_any_name_of_a_replica_or_model_will_do(router_class: str) -> None:
    policy = make_policy(router_class)
    names = ["SERVE_REPLICA::app#Llm#x1", "100%", "10.0.0.1:7000", "ä b"]
    snapshot = make_snapshot([0] * 4, model="org/model#1", names=names)
    chosen = {policy.choose(make_request(f"{index} is new"), snapshot).replica for index in range(40)}
    assert chosen == set(names)


def test_a_pools_only_replica_is_chosen_and_the_router_learns_it(events: list[tuple[Any, ...]]) -> None:
    decision = make_policy(f"{HERE}:Recorder").choose(make_request(), make_snapshot([4]))
    assert (decision.replica, decision.reason) == ("replica-0", Reason.ONLY_REPLICA)
    assert events[-1] == ("routed", "request-0", "replica-0")


def test_the_source_of_chance_of_everybody_else_is_left_as_it_was() -> None:
    policy = make_policy()
    state = random.getstate()
    policy.choose(make_request(), make_snapshot([0] * 8))
    assert random.getstate() == state


async def test_a_router_that_waits_fails_the_choice_and_the_guard_decides() -> None:
    policy = make_policy(f"{HERE}:Sleeper")
    with pytest.raises(RuntimeError, match="without waiting"):
        policy.choose(make_request(), make_snapshot([0, 0]))
    guard = Guard(policy, "ray", LeastQueue(NoOptions(), random.Random(1)), Deaf(), lambda: 0.0, 1.0)
    decision = guard.choose(make_request(), make_snapshot([4, 0]))
    assert (decision.replica, decision.reason) == ("replica-1", Reason.POLICY_FAILED)


def test_a_router_that_names_nobody_fails_the_choice() -> None:
    with pytest.raises(RuntimeError, match="Undecided chose nobody"):
        make_policy(f"{HERE}:Undecided").choose(make_request(), make_snapshot([0, 0]))


@pytest.mark.parametrize(
    ("router_class", "kwargs", "told"),
    [
        ("nowhere.to:Find", {}, "cannot be imported"),
        ("Nothing", {}, "cannot be imported"),
        ("ray.serve.request_router:Nothing", {}, "cannot be imported"),
        ("collections:OrderedDict", {}, "no subclass of Ray Serve's RequestRouter"),
        (PREFIX_AWARE, {"treshold": 1}, "treshold"),
        ("ray.serve.request_router:RequestRouter", {}, "abstract"),
        (f"{HERE}:NeedsCluster", {}, "does not start"),
    ],
)
def test_a_class_that_cannot_be_used_stops_the_start(router_class: str, kwargs: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        registry.create("ray", {"class": router_class, "kwargs": kwargs}, random.Random(1))
    assert not ray.is_initialized()


# -- Ray's prefix-aware router


def ask(policy: RayPolicy, prompt: str, snapshot: Snapshot) -> str:
    return policy.choose(make_request(prompt), snapshot).replica


def test_prefix_aware_keeps_a_conversation_on_one_replica() -> None:
    policy, snapshot = make_policy(PREFIX_AWARE), make_snapshot([0] * 4)
    homes = {each: ask(policy, each * 50, snapshot) for each in "abcdefgh"}
    assert Counter(homes.values()) == {f"replica-{index}": 2 for index in range(4)}
    for each, home in homes.items():
        assert ask(policy, each * 50 + " and more", snapshot) == home


def test_prefix_aware_leaves_a_busy_replica_where_it_is_told_to() -> None:
    policy = make_policy(PREFIX_AWARE, imbalanced_threshold=5)
    home = ask(policy, "a long prompt " * 20, make_snapshot([0] * 4))
    busy = tuple(make_replica(f"replica-{i}", 20 if f"replica-{i}" == home else 0) for i in range(4))
    chosen = {ask(policy, "a long prompt " * 20 + str(i), Snapshot("model", busy)) for i in range(20)}
    assert home not in chosen


def test_prefix_aware_forgets_what_is_old() -> None:
    policy = make_policy(PREFIX_AWARE, eviction_threshold_chars=4000, eviction_target_chars=2000)
    snapshot = make_snapshot([0] * 2)
    for index in range(100):
        ask(policy, f"{index:03} " * 100, snapshot)
    (driver,) = policy._drivers.values()
    tree = driver._router._tree_actor._target
    assert set(tree.tenant_to_char_count.values()) <= set(range(4001))
    assert sum(tree.tenant_to_char_count.values()) > 1000


def test_prefix_aware_routes_requests_without_text_by_load() -> None:
    policy = make_policy(PREFIX_AWARE)
    for body in (b"", b"{}", b'{"prompt": [1, 2, 3]}', b'{"prompt": ""}', b'{"input": "a"}', b"\xff", b"[" * 9999):
        request = Request("r", "model", Rpc.HTTP, "/v1/completions", body)
        assert policy.choose(request, make_snapshot([9, 0])).replica == "replica-1"


@settings(derandomize=True, max_examples=200)
@given(st.text("ab", max_size=40), st.text("ab", max_size=40), st.text("abc\ud800é", max_size=20))
def test_a_shared_prefix_is_as_long_as_rays(one: str, other: str, both: str) -> None:
    one, other = both + one, both + other
    assert shared_prefix(one, other) == len(os.path.commonprefix([one, other]))  # noqa: RUF071  what Ray does


# -- what routers are shown


def grpc(method: str, message: Any) -> Request:
    return Request("r", "m", Rpc.GRPC, f"/kvlane.v1.Inference/{method}", message.SerializeToString())


def test_grpc_requests_look_like_those_over_http() -> None:
    chat = pb.ChatRequest(model="m", messages=[pb.ChatMessage(role="user", content="Why?")])
    assert ask_of(grpc("Chat", chat)) == {
        "model": "m",
        "messages": [{"role": "user", "content": "Why?"}],
        "stream": True,
    }
    generate = ask_of(grpc("Generate", pb.GenerateRequest(model="m", text="Once")))
    assert generate is not None
    assert generate.prompt == "Once"
    assert ask_of(grpc("Generate", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2])))) is None
    assert ask_of(grpc("Embed", pb.EmbedRequest(texts=["a"]))) is None
    assert ask_of(Request("r", "m", Rpc.GRPC, "/kvlane.v1.Inference/Chat", b"\xff\xff")) is None


def test_long_bodies_and_other_methods_are_not_read() -> None:
    body = b'{"prompt": "' + b"a" * MAX_BODY_BYTES + b'"}'
    assert ask_of(Request("r", "m", Rpc.HTTP, "/v1/completions", body)) is None
    assert ask_of(Request("r", "m", Rpc.HTTP, "/v1/completions", b'{"prompt": "a"}', method="GET")) is None


@settings(derandomize=True, max_examples=200)
@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)), st.sampled_from(Rpc), st.booleans())
def test_no_body_raises(body: bytes, rpc: Rpc, chat: bool) -> None:
    path = ("/kvlane.v1.Inference/Chat" if chat else "/kvlane.v1.Inference/Generate") if rpc is Rpc.GRPC else "/v1/x"
    ask_of(Request("r", "m", rpc, path, body))
