"""The prefix stage takes long reports in, and fills and empties mirrors, a slice at a time."""

from __future__ import annotations

from itertools import pairwise

import pytest

from router.lane.frames import CacheReport
from router.types import CacheMode, EngineInfo, Held, ModelCard
from tests.unit.prefix_stage import INFO, Stage, chain, report

pytestmark = pytest.mark.usefixtures("block_store")


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
