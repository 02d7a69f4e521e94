"""What the policy adds to the promises of every policy, which `check_policy` checks."""

from __future__ import annotations

import random

from kvlane_policy_example import StickySession

from router.testing import check_policy, make_request, make_snapshot


def create(max_lead: int = 8) -> StickySession:
    return StickySession(StickySession.Options(max_lead=max_lead), random.Random(1))


def home(policy: StickySession, session: str, depths: list[int], names: list[str] | None = None) -> str:
    return policy.choose(make_request(session_id=session), make_snapshot(depths, names=names)).replica


def test_it_keeps_the_promises_of_every_policy() -> None:
    check_policy(StickySession)
    check_policy(StickySession, {"max_lead": 0})


def test_a_session_stays_on_its_home_in_every_router() -> None:
    homes = {home(create(), "session-1", [0, 3, 1, 2]) for _ in range(10)}
    assert len(homes) == 1


def test_sessions_and_requests_without_one_spread_over_all_replicas() -> None:
    policy = create()
    assert len({home(policy, f"session-{index}", [0] * 4) for index in range(64)}) == 4
    assert len({home(policy, "", [0] * 4) for _ in range(64)}) == 4


def test_a_home_that_is_too_busy_is_left_for_the_next() -> None:
    policy = create(max_lead=2)
    first = int(home(policy, "session-1", [0] * 4).removeprefix("replica-"))
    depths = [5] * 4
    depths[first] = 7
    assert home(policy, "session-1", depths) == f"replica-{first}"
    depths[first] = 8
    assert home(policy, "session-1", depths) != f"replica-{first}"


def test_only_the_sessions_of_a_replica_that_leaves_move() -> None:
    policy = create()
    for index in range(64):
        before = home(policy, f"session-{index}", [0] * 4, list("abcd"))
        after = home(policy, f"session-{index}", [0] * 3, list("abc"))
        assert after == before or before == "d"


def test_long_session_ids_are_fine() -> None:
    assert home(create(), "x" * 10_000, [0, 0]) in ("replica-0", "replica-1")
