"""The prefix stage: reports with duplicates and gaps, modes and their causes, replicas that come, sleep and go."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.lane.frames import CacheReport
from router.types import CacheMode, EngineInfo, Held, ModelCard
from tests.unit.prefix_stage import INFO, TOKENS, Stage, chain, exact, report

pytestmark = pytest.mark.usefixtures("block_store")


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
