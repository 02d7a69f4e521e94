"""The prefix stage: reports with duplicates and gaps, modes and their causes, estimates, holds."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Sequence
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.lane.frames import CacheReport
from router.options import PrefixOptions
from router.policies.cost import Cost
from router.prefix.prefixes import Prefixes
from router.testing import make_replica, make_request
from router.types import (
    NO_PREFIX,
    CacheMode,
    Chain,
    Charge,
    EngineInfo,
    Held,
    Holders,
    ModelCard,
    Outlook,
    Request,
    Rpc,
    Snapshot,
)

INFO = EngineInfo("sim", (ModelCard("llama"), ModelCard("adapter", parent="llama")), kv_blocks=1000, kv_block_tokens=16)
TOKENS = 60


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Stage:
    """A `Prefixes` with what it tells others."""

    def __init__(self, **options: object) -> None:
        self.clock = Clock()
        self.prefixes = Prefixes(PrefixOptions(**options), self.clock)  # type: ignore[arg-type]
        self.modes: list[tuple[str, CacheMode]] = []
        self.prefixes.on_mode = lambda replica, mode: self.modes.append((replica, mode))

    def cause(self, replica: str) -> str:
        return self.prefixes.status().replicas[replica].cause

    def held(self, chain: Chain) -> dict[str, Held]:
        return dict(self.prefixes.view("llama", chain).held)


def chain(*blocks: int, rest: int = 0) -> Chain:
    return Chain(256, 0, blocks, len(blocks) * 256 + rest)


def report(
    seq: int, stored: Sequence[int] = (), evicted: Sequence[int] = (), depths: Sequence[int] = (), **more: object
) -> CacheReport:
    """Block n lies n * 60 tokens deep unless `depths` says otherwise."""
    depths = depths or [block % 1000 * TOKENS for block in stored]
    return CacheReport(
        seq,
        stored=struct.pack(f"<{len(stored)}Q", *stored),
        depths=struct.pack(f"<{len(depths)}I", *depths),
        evicted=struct.pack(f"<{len(evicted)}Q", *evicted),
        **more,  # type: ignore[arg-type]
    )


def exact(*blocks: int, **options: object) -> Stage:
    """A stage with one replica, `a`, that reported these blocks."""
    stage = Stage(**options)
    stage.prefixes.opened("a", INFO)
    assert stage.prefixes.reported("a", report(0, blocks, snapshot=True))
    return stage


def test_a_replica_is_exact_from_its_first_snapshot_on() -> None:
    stage = Stage()
    stage.prefixes.opened("a", INFO)
    assert stage.prefixes.mode("a") is CacheMode.APPROXIMATE
    assert stage.cause("a") == "no cache report yet"
    assert stage.prefixes.reported("a", report(0, [1, 2], snapshot=True))
    assert stage.prefixes.mode("a") is CacheMode.EXACT
    assert stage.cause("a") == ""
    assert stage.held(chain(1, 2, 3)) == {"a": Held(2, 120)}
    assert stage.modes == [("a", CacheMode.APPROXIMATE), ("a", CacheMode.EXACT)]


def test_a_snapshot_in_parts_is_taken_whole() -> None:
    stage = exact(1, 2)
    assert stage.prefixes.reported("a", report(1, [3]))
    assert stage.prefixes.reported("a", report(2, [4], [2]))
    assert stage.held(chain(1, 2, 3, 4)) == {"a": Held(1, 60)}
    assert stage.prefixes.reported("a", report(3, [2]))
    assert stage.held(chain(1, 2, 3, 4)) == {"a": Held(4, 240)}


def test_a_long_report_is_taken_in_by_sweeps_and_those_after_it_wait_for_it() -> None:
    stage, many = Stage(), range(1, 5001)
    stage.prefixes.opened("a", INFO)
    assert stage.prefixes.reported("a", report(0, many, depths=many, snapshot=True))
    assert stage.prefixes.mode("a") is CacheMode.APPROXIMATE
    assert stage.cause("a") == "what it reported is being taken in"
    assert stage.prefixes.reported("a", report(1, [], [4000]))
    assert stage.prefixes.status().late == 1
    assert stage.prefixes.mode("a") is CacheMode.APPROXIMATE
    seen = set()
    while stage.prefixes.sweep():
        seen.add(stage.prefixes.status().blocks)
    assert len(seen) > 4
    assert stage.held(chain(*many)) == {"a": Held(3999, 3999)}
    assert stage.prefixes.status().late == 0
    assert (stage.prefixes.mode("a"), stage.cause("a")) == (CacheMode.EXACT, "")
    assert stage.modes == [("a", CacheMode.APPROXIMATE), ("a", CacheMode.EXACT)]


def test_a_gap_while_a_snapshot_is_taken_in_does_not_become_exact_by_taking_in_the_rest() -> None:
    stage, many = Stage(), range(1, 5001)
    stage.prefixes.opened("a", INFO)
    stage.prefixes.reported("a", report(0, many, depths=many, snapshot=True))
    assert not stage.prefixes.reported("a", report(2, [1]))
    while stage.prefixes.sweep():
        pass
    assert stage.prefixes.mode("a") is CacheMode.APPROXIMATE


def test_what_a_replica_held_goes_into_its_mirror_in_slices_and_no_more_than_fits() -> None:
    stage, many = Stage(), range(1, 20_001)
    info = EngineInfo("sim", (ModelCard("llama"),), kv_blocks=10_000, kv_block_tokens=16)  # 2,500 blocks of 64 tokens.
    stage.prefixes.opened("a", info)
    stage.prefixes.reported("a", report(0, many, depths=many, snapshot=True))
    while stage.prefixes.sweep():
        pass
    assert stage.prefixes.status().blocks == 20_000
    stage.prefixes.reported("a", report(1, mode="approximate", cause="a test"))
    with stage.prefixes.hold("a", chain(30_001, 30_002)):
        pass
    counts = [stage.prefixes.status().blocks]
    while stage.prefixes.sweep():
        counts.append(stage.prefixes.status().blocks)
    assert max(before - after for before, after in pairwise(counts)) <= 2048
    assert counts[-1] == 2500
    assert stage.held(chain(30_001, 30_002))["a"].blocks == 2


def test_a_mirror_whose_capacity_falls_gives_up_its_surplus_in_slices() -> None:
    stage = Stage()
    info = EngineInfo("sim", (ModelCard("llama"),), kv_blocks=40_000, kv_block_tokens=16)
    stage.prefixes.opened("a", info)
    with stage.prefixes.hold("a", chain(*range(1, 10_001))):
        pass
    stage.prefixes.reported(
        "a", CacheReport(0, mode="approximate", cause="a test", prompt_bytes=1 << 30, prompt_tokens=1 << 30)
    )
    with stage.prefixes.hold("a", chain(20_001)):
        pass
    counts = [stage.prefixes.status().blocks]
    while stage.prefixes.sweep():
        counts.append(stage.prefixes.status().blocks)
    assert counts[0] > 9900
    assert len(counts) > 5
    assert counts[-1] == pytest.approx(2500, abs=2)


@pytest.mark.parametrize("then", ["snapshot", "lost", "opened", "approximate"])
def test_what_is_void_is_not_taken_in_later(then: str) -> None:
    stage, many = Stage(), range(1, 3001)
    stage.prefixes.opened("a", INFO)
    assert stage.prefixes.reported("a", report(0, many, depths=many, snapshot=True))
    match then:
        case "snapshot":
            stage.prefixes.reported("a", report(1, [7], snapshot=True))
        case "lost":
            stage.prefixes.lost("a")
        case "opened":
            stage.prefixes.opened("a", INFO)
        case _:
            stage.prefixes.reported("a", report(1, mode="approximate", cause="a test"))
    while stage.prefixes.sweep():
        pass
    assert stage.held(chain(*many)) == {}
    assert stage.prefixes.status().late == 0


def test_in_one_report_eviction_comes_before_storing() -> None:
    stage = exact(1, 2)
    stage.prefixes.reported("a", report(1, [2], [2]))
    assert stage.held(chain(1, 2))["a"].blocks == 2


def test_a_gap_is_told_once_and_healed_by_a_snapshot() -> None:
    stage = exact(1)
    assert not stage.prefixes.reported("a", report(2, [2]))
    assert stage.prefixes.mode("a") is CacheMode.APPROXIMATE
    assert stage.cause("a") == "cache reports between 0 and 2 missed"
    assert stage.prefixes.reported("a", report(3, [3]))  # Resync is on its way already.
    assert stage.prefixes.mode("a") is CacheMode.APPROXIMATE
    assert stage.prefixes.reported("a", report(4, [1, 2, 3], snapshot=True))
    assert stage.prefixes.mode("a") is CacheMode.EXACT
    assert stage.held(chain(1, 2, 3)) == {"a": Held(3, 180)}
    status = stage.prefixes.status()
    assert (status.gaps, status.healed) == (1, 1)


def test_a_report_that_does_not_begin_with_a_snapshot_is_a_gap() -> None:
    stage = Stage()
    stage.prefixes.opened("a", INFO)
    assert not stage.prefixes.reported("a", report(5, [1]))
    assert stage.cause("a") == "cache reports before 5 missed"
    assert stage.held(chain(1)) == {}


def test_a_report_that_comes_again_changes_nothing() -> None:
    stage = exact(1)
    stage.prefixes.reported("a", report(1, [2]))
    stage.prefixes.reported("a", report(2, [], [2]))
    assert stage.prefixes.reported("a", report(1, [2]))
    assert stage.held(chain(1, 2))["a"].blocks == 1
    assert stage.prefixes.mode("a") is CacheMode.EXACT


def test_a_replica_that_cannot_say_is_mirrored_from_what_was_known() -> None:
    stage = exact(1, 2)
    assert stage.prefixes.reported("a", report(1, mode="approximate", cause="unknown events"))
    assert stage.prefixes.mode("a") is CacheMode.APPROXIMATE
    assert stage.cause("a") == "unknown events"
    assert stage.held(chain(1, 2))["a"].blocks == 2
    with stage.prefixes.hold("a", chain(11, 12, 13)):
        pass
    assert stage.held(chain(11, 12, 13)) == {"a": Held(3, 192)}
    assert stage.modes[-1] == ("a", CacheMode.APPROXIMATE)


def test_a_replica_that_can_say_again_has_to_begin_with_a_snapshot() -> None:
    stage = exact(1)
    stage.prefixes.reported("a", report(1, mode="approximate", cause="unknown events"))
    assert not stage.prefixes.reported("a", report(2, [1, 2]))
    assert stage.prefixes.reported("a", report(3, [5], snapshot=True))
    assert stage.held(chain(5)) == {"a": Held(1, 300)}
    assert stage.held(chain(1)) == {}


def test_a_mirror_is_no_larger_than_the_replicas_kv_cache() -> None:
    stage = Stage()
    info = EngineInfo("sim", (ModelCard("llama"),), kv_blocks=40, kv_block_tokens=16)  # 640 tokens: ten blocks of 64.
    stage.prefixes.opened("a", info)
    for first in (100, 200, 300):
        with stage.prefixes.hold("a", chain(*range(first, first + 6))):
            pass
    assert stage.prefixes.status().blocks == 10
    assert stage.held(chain(*range(300, 306)))["a"].blocks == 6
    assert stage.held(chain(*range(200, 206)))["a"].blocks == 4
    assert stage.held(chain(100)) == {}


@pytest.mark.parametrize(
    "broken",
    [
        {"stored": b"1234567", "depths": b""},
        {"stored": b"12345678", "depths": b""},
        {"stored": b"12345678", "depths": b"12345678"},
        {"evicted": b"123"},
    ],
)
def test_a_report_that_cannot_be_read_ends_the_trust_until_a_snapshot_can_be(broken: dict[str, bytes]) -> None:
    stage = exact(1)
    assert not stage.prefixes.reported("a", CacheReport(1, **broken))  # type: ignore[arg-type]
    assert stage.prefixes.mode("a") is CacheMode.APPROXIMATE
    assert stage.cause("a") == "a cache report that cannot be read"
    assert stage.prefixes.reported("a", report(2, [2]))
    assert stage.prefixes.mode("a") is CacheMode.APPROXIMATE
    assert stage.prefixes.reported("a", report(3, [1, 2], snapshot=True))
    assert stage.held(chain(1, 2)) == {"a": Held(2, 120)}
    assert stage.prefixes.mode("a") is CacheMode.EXACT


def test_where_snapshots_cannot_be_read_either_they_are_asked_for_seldom() -> None:
    stage, broken = exact(1), {"snapshot": True, "evicted": b"123"}
    answers = []
    for seq in range(1, 100):
        stage.clock.now += 1.0
        answers.append(stage.prefixes.reported("a", CacheReport(seq, **broken)))  # type: ignore[arg-type]
    assert answers.count(False) == 4
    assert stage.prefixes.reported("a", report(100, [1, 2], snapshot=True))
    assert stage.prefixes.mode("a") is CacheMode.EXACT
    status = stage.prefixes.status()
    assert (status.gaps, status.healed) == (1, 1)


def test_a_mode_of_a_later_version_counts_as_approximate() -> None:
    stage = exact(1)
    assert stage.prefixes.reported("a", report(1, mode="hearsay", cause="who knows"))
    assert (stage.prefixes.mode("a"), stage.cause("a")) == (CacheMode.APPROXIMATE, "who knows")


@pytest.mark.parametrize("how", ["engine", "report", "options"])
def test_a_replica_that_reuses_nothing_has_no_entries_at_all(how: str) -> None:
    stage = Stage(enabled=how != "options")
    info = EngineInfo("sim", (ModelCard("llama"),), prefix_caching=how != "engine")
    stage.prefixes.opened("a", info)
    mode = "off" if how == "report" else "exact"
    assert stage.prefixes.reported("a", report(0, [1, 2], snapshot=True, mode=mode, cause="caching is off"))
    with stage.prefixes.hold("a", chain(1, 2)):
        assert stage.held(chain(1, 2)) == {}
    assert stage.prefixes.mode("a") is CacheMode.OFF
    assert "off" in stage.cause("a")
    assert stage.prefixes.status().blocks == 0
    assert stage.modes[-1] == ("a", CacheMode.OFF)


def test_a_replica_that_turns_its_caching_off_and_on_again_is_followed() -> None:
    stage = exact(1)
    stage.prefixes.reported("a", report(1, mode="off", cause="the cache is being reset"))
    assert stage.held(chain(1)) == {}
    assert stage.prefixes.mode("a") is CacheMode.OFF
    stage.prefixes.reported("a", report(2, mode="approximate", cause="unknown events"))
    assert stage.prefixes.mode("a") is CacheMode.APPROXIMATE
    stage.prefixes.reported("a", report(3, [1], snapshot=True))
    assert stage.held(chain(1)) == {"a": Held(1, 60)}
    assert stage.prefixes.mode("a") is CacheMode.EXACT


def test_a_lost_replica_holds_nothing_and_has_no_mode() -> None:
    stage = exact(1)
    stage.prefixes.lost("a")
    assert stage.held(chain(1)) == {}
    assert stage.prefixes.mode("a") is CacheMode.OFF
    assert stage.prefixes.reported("a", report(1, [1]))
    assert stage.prefixes.status().replicas == {}
    while stage.prefixes.sweep():
        pass
    assert stage.prefixes.status().blocks == 0


def test_a_new_lane_to_a_known_replica_starts_from_nothing() -> None:
    stage = exact(1)
    stage.prefixes.opened("a", INFO)
    assert stage.held(chain(1)) == {}
    assert stage.prefixes.mode("a") is CacheMode.APPROXIMATE
    assert stage.prefixes.reported("a", report(0, [1], snapshot=True))
    assert stage.held(chain(1)) == {"a": Held(1, 60)}


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
    assert stage.prefixes.charge(view, "a") == Charge(64, 64 * (120 + 32), prompt, 2)
    assert stage.prefixes.charge(view, "b") == Charge(184, 184 * 92, prompt, 0)


def test_a_prompt_that_is_held_whole_still_costs_its_last_token() -> None:
    stage = exact(1)
    assert stage.prefixes.charge(stage.prefixes.view("llama", chain(1)), "a").tokens == 1


def test_a_request_without_a_prompt_costs_and_holds_nothing() -> None:
    stage = exact(1)
    assert stage.prefixes.view("llama", None) is NO_PREFIX
    assert stage.prefixes.charge(NO_PREFIX, "a") == Charge()
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
    charge = exact().prefixes.charge(view, "a")
    assert (charge.tokens, charge.pairs) == (view.tokens, view.tokens**2 / 2)


def test_prompts_are_not_hashed_where_the_configuration_turns_prefixes_off() -> None:
    assert Stage(enabled=False).prefixes.chain(request("x" * 700)) is None


def test_what_replicas_compared_is_summed_up() -> None:
    stage = exact()
    stage.prefixes.reported("a", report(1, compared=10, off=1))
    stage.prefixes.reported("a", report(2, compared=5))
    status = stage.prefixes.status()
    assert (status.compared, status.off) == (15, 1)


BLOCKS = [1000 + n for n in range(1, 31)]
"""One chain, and below it a second one that shares its first ten blocks."""
BRANCH = BLOCKS[:10] + [2000 + n for n in range(11, 31)]

CHANGES = st.tuples(
    st.lists(st.sampled_from(BLOCKS + BRANCH), max_size=12, unique=True),
    st.lists(st.sampled_from(BLOCKS + BRANCH), max_size=12, unique=True),
    st.sampled_from(["deliver"] * 8 + ["twice", "lose", "approximate", "sweep"]),
)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), CHANGES), max_size=40))
def test_reports_with_duplicates_and_gaps_end_at_what_the_replicas_hold(
    moves: list[tuple[str, tuple[list[int], list[int], str]]],
) -> None:
    stage = Stage()
    truth: dict[str, set[int]] = {"a": set(), "b": set()}
    seqs, asked = {"a": 0, "b": 0}, {"a": False, "b": False}
    for name in truth:
        stage.prefixes.opened(name, INFO)
        assert stage.prefixes.reported(name, report(0, snapshot=True))
    for name, (stored, evicted, fate) in moves:
        seqs[name] += 1
        if fate == "approximate":
            frame = report(seqs[name], mode="approximate", cause="a test")
            asked[name] = True  # When it can say again it begins with a snapshot.
        elif asked[name]:
            truth[name] = truth[name] - set(evicted) | set(stored)
            frame = report(seqs[name], sorted(truth[name]), snapshot=True)
            asked[name] = False
        else:
            truth[name] = truth[name] - set(evicted) | set(stored)
            frame = report(seqs[name], stored, evicted)
        if fate == "lose":
            asked[name] = asked[name] or frame.snapshot
            continue
        if not stage.prefixes.reported(name, frame):
            asked[name] = True
        if fate == "twice":
            assert stage.prefixes.reported(name, frame)
        if fate == "sweep":
            stage.prefixes.sweep()
    for name in truth:
        if stage.prefixes.mode(name) is not CacheMode.EXACT:
            seqs[name] += 1
            assert stage.prefixes.reported(name, report(seqs[name], sorted(truth[name]), snapshot=True))
        elif not stage.prefixes.reported(name, report(seqs[name] + 1)):  # The last ones were lost.
            assert stage.prefixes.reported(name, report(seqs[name] + 2, sorted(truth[name]), snapshot=True))
    while stage.prefixes.sweep():
        pass
    for blocks in (BLOCKS, BRANCH):
        expected = {}
        for name, held in truth.items():
            length = next((at for at, block in enumerate(blocks) if block not in held), len(blocks))
            if length:
                expected[name] = Held(length, length * TOKENS)
        assert stage.held(chain(*blocks)) == expected
    assert stage.prefixes.status().blocks == len(truth["a"] | truth["b"])


def test_what_was_sent_to_a_replica_that_cannot_report_is_forgotten_when_it_sleeps() -> None:
    stage = Stage()
    stage.prefixes.opened("a", INFO)
    with stage.prefixes.hold("a", chain(1, 2, 3)):
        pass
    assert stage.held(chain(1, 2, 3))["a"].blocks == 3
    stage.prefixes.slept("a")
    assert "a" not in stage.held(chain(1, 2, 3))
    assert stage.prefixes.mode("a") is CacheMode.APPROXIMATE
    with stage.prefixes.hold("a", chain(1, 2)):
        pass
    assert stage.held(chain(1, 2, 3))["a"].blocks == 2
    stage.prefixes.slept("nobody")


def test_of_a_replica_that_reports_only_its_reports_count_when_it_sleeps() -> None:
    stage = Stage()
    stage.prefixes.opened("a", INFO)
    stage.prefixes.reported("a", report(1, [1, 2], snapshot=True))
    stage.prefixes.slept("a")
    assert stage.held(chain(1, 2))["a"].blocks == 2
    assert stage.prefixes.reported("a", report(2, snapshot=True))
    assert "a" not in stage.held(chain(1, 2))
