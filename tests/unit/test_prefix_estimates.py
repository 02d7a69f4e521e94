"""What the prefix stage makes of what it knows: holds of requests in flight, lengths of prompts, charges."""

from __future__ import annotations

import json
import random

import msgspec
import pytest

from router.policies.cost import Cost
from router.testing import make_replica, make_request
from router.types import NO_PREFIX, Charge, EngineInfo, Held, Holders, ModelCard, Outlook, Request, Rpc, Snapshot
from tests.unit.prefix_stage import INFO, TOKENS, Stage, chain, exact, report

pytestmark = pytest.mark.usefixtures("block_store")


def test_a_request_in_flight_counts_as_soon_cached_until_it_ends() -> None:
    stage = exact(1, 2)
    with stage.prefixes.hold("a", chain(1, 2, 3, 4)):
        assert stage.held(chain(1, 2, 3, 4, 5)) == {"a": Held(4, 120 + 128, soon=2)}
        stage.prefixes.reported("a", report(1, [3]))
        assert stage.held(chain(1, 2, 3, 4, 5)) == {"a": Held(4, 180 + 64, soon=1)}
        assert stage.prefixes.status().holds == 1
    assert stage.held(chain(1, 2, 3, 4, 5)) == {"a": Held(3, 180)}
    assert stage.prefixes.status().holds == 0


def test_a_request_that_fails_holds_nothing_any_more() -> None:
    stage = exact()
    with pytest.raises(RuntimeError), stage.prefixes.hold("a", chain(1)):
        raise RuntimeError
    assert stage.held(chain(1)) == {}


def test_a_hold_that_lasts_too_long_expires() -> None:
    stage = exact(hold_timeout_s=10.0)
    with stage.prefixes.hold("a", chain(1)):
        stage.clock.now = 5.0
        with stage.prefixes.hold("a", chain(2)):
            stage.clock.now = 10.0
            stage.prefixes.sweep()
            assert stage.held(chain(1)) == {}
            assert stage.held(chain(2))["a"].soon == 1
    assert stage.held(chain(2)) == {}
    assert stage.prefixes.status().expired == 1


def test_a_hold_outlives_the_loss_of_its_replica() -> None:
    stage = exact()
    with stage.prefixes.hold("a", chain(1)):
        stage.prefixes.lost("a")
        stage.prefixes.opened("a", INFO)
        assert stage.held(chain(1)) == {}
    assert stage.prefixes.status().holds == 0


def test_the_ratio_of_tokens_to_bytes_is_learned_per_base_model() -> None:
    stage = exact()
    stage.prefixes.opened("b", EngineInfo("sim", (ModelCard("other"),)))
    assert stage.prefixes.view("llama", chain(1, rest=744)).tokens == 250
    stage.prefixes.reported("a", report(1, prompt_bytes=3 << 20, prompt_tokens=3 << 19))
    assert stage.prefixes.view("llama", chain(1, rest=744)).tokens == pytest.approx(500, rel=0.01)
    assert stage.prefixes.view("adapter", chain(1, rest=744)).tokens == pytest.approx(500, rel=0.01)
    assert stage.prefixes.view("other", chain(1, rest=744)).tokens == 250
    assert stage.prefixes.status().tokens_per_byte["llama"] == pytest.approx(0.5, rel=0.01)


def test_the_length_of_a_prompt_is_estimated_from_what_is_known_of_its_beginning() -> None:
    stage = exact()
    stage.prefixes.reported("a", report(1, [1, 2], depths=[100, 200]))
    assert stage.prefixes.view("llama", chain(1, 2, 3, rest=100)).tokens == 200 + 89


def test_what_most_hold_is_not_said_of_a_replica_that_reuses_nothing() -> None:
    stage = Stage()
    for name in ("a", "b", "c"):
        stage.prefixes.opened(name, INFO)
        stage.prefixes.reported(name, report(0, [1, 2], snapshot=True))
    stage.prefixes.opened("off", msgspec.structs.replace(INFO, prefix_caching=False))
    view = stage.prefixes.view("llama", chain(1, 2))
    assert isinstance(view.held, Holders)
    assert view.held.most == Held(2, 2 * TOKENS)
    assert (view.at("off"), view.at("a")) == (None, Held(2, 2 * TOKENS))
    assert set(view.held) == {"a", "b", "c"}
    policy = Cost(Cost.Options(), random.Random(1))
    views = tuple(make_replica(name, outlook=Outlook(token_s=0.01)) for name in ("a", "b", "c", "off"))
    costs = policy.explain(make_request(), Snapshot("llama", views, view))
    assert costs["off"] == pytest.approx(costs["a"] + 2 * TOKENS * 0.01 * 1.25)
    stage.prefixes.lost("off")
    assert view.held.groups
    assert not stage.prefixes.view("llama", chain(1, 2)).held.groups  # type: ignore[attr-defined]


def test_a_hold_has_what_is_only_coming_too() -> None:
    """What dispatch tells of a look-up must not leave out blocks that only another request in flight will bring."""
    stage = exact(1)
    prompt = chain(1, 2, 3)
    first = stage.prefixes.hold("a", chain(1, 2), stage.prefixes.view("llama", chain(1, 2)).at("a"))
    with first:
        second = stage.prefixes.hold("a", prompt, stage.prefixes.view("llama", prompt).at("a"))
    with second:
        assert stage.held(prompt)["a"].blocks == 3
    assert stage.held(prompt) == {"a": Held(1, 60)}


def test_what_a_replica_says_after_it_was_off_counts_from_its_snapshot_on() -> None:
    stage = Stage()
    for name in ("a", "b", "c", "d"):
        stage.prefixes.opened(name, INFO)
        stage.prefixes.reported(name, report(0, [1, 2], snapshot=True))
    stage.prefixes.reported("d", report(1, mode="off", cause="for a while"))
    stage.prefixes.reported("d", report(2, [3]))
    view = stage.prefixes.view("llama", chain(1, 2))
    assert (view.at("d"), view.at("a")) == (None, Held(2, 2 * TOKENS))
    assert isinstance(view.held, Holders)
    assert (None, ("d",)) in view.held.groups


def test_the_charge_is_for_what_the_replica_does_not_hold() -> None:
    stage = exact(1, 2)
    prompt = chain(1, 2, 3)
    view = stage.prefixes.view("llama", prompt)
    assert stage.prefixes.charge(view, view.at("a")) == Charge(64, 64 * (120 + 32), prompt, 2)
    assert stage.prefixes.charge(view, view.at("b")) == Charge(184, 184 * 92, prompt, 0)


def test_a_prompt_that_is_held_whole_still_costs_its_last_token() -> None:
    stage = exact(1)
    view = stage.prefixes.view("llama", chain(1))
    assert stage.prefixes.charge(view, view.at("a")).tokens == 1


def test_a_request_without_a_prompt_costs_and_holds_nothing() -> None:
    stage = exact(1)
    assert stage.prefixes.view("llama", None) is NO_PREFIX
    assert stage.prefixes.charge(NO_PREFIX, None) == Charge()
    with stage.prefixes.hold("a", None):
        assert stage.prefixes.status().holds == 0


def request(prompt: str) -> Request:
    body = json.dumps({"model": "llama", "prompt": prompt}).encode()
    return Request("r", "llama", Rpc.HTTP, "/v1/completions", body)


def test_prompts_are_cut_into_blocks_of_the_configured_size() -> None:
    stage = Stage(block_bytes=64, max_prompt_bytes=1024)
    found = stage.prefixes.chain(request("x" * 700))
    assert found is not None
    assert (found.block_bytes, len(found.blocks), found.prompt_bytes) == (64, 10, 700)
    bounded = stage.prefixes.chain(request("x" * 7000))
    assert bounded is not None
    assert len(bounded.blocks) == 16


def body_of(body: bytes, method: str = "POST") -> Request:
    return Request("r", "llama", Rpc.HTTP, "/v1/completions", body, method=method)


@pytest.mark.parametrize(
    ("asked", "tokens"),
    [
        (body_of(b"x" * 4000), 1000),
        (body_of(b""), 0),
        (body_of(b"", "GET"), 0),
        (body_of(b"--boundary\r\n" + bytes(1 << 20)), 4096),
        (body_of(b"x y " * (1 << 20)), 1 << 18),
        (body_of(b'{"url":"' + b"A" * (1 << 20) + b'"}'), 25),
    ],
)
def test_a_prompt_that_is_not_hashed_is_estimated_by_the_body(asked: Request, tokens: int) -> None:
    view = exact().prefixes.unhashed(asked)
    assert (view.chain, dict(view.held)) == (None, {})
    assert view.tokens == pytest.approx(tokens, abs=15)
    charge = exact().prefixes.charge(view, view.at("a"))
    assert (charge.tokens, charge.pairs) == (view.tokens, view.tokens**2 / 2)


def test_prompts_are_not_hashed_where_the_configuration_turns_prefixes_off() -> None:
    assert Stage(enabled=False).prefixes.chain(request("x" * 700)) is None
