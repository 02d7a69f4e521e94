"""Receipts: what is told of a decision, and how it is written into a header."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.receipts import REST_S, Explainer, make_receipt
from router.types import (
    MAX_CANDIDATES_CHARS,
    Candidate,
    Chain,
    Charge,
    Decision,
    Held,
    Load,
    Outlook,
    PrefixView,
    Reason,
    Receipt,
    ReplicaView,
    Request,
    Rpc,
    Snapshot,
)

REQUEST = Request("r1", "m", Rpc.HTTP, "/v1/completions", b"")
CHAIN = Chain(256, 1, tuple(range(10)), 2600)
OUTLOOK = Outlook(wait_s=0.5, token_s=0.001, pair_s=1e-6, batch_s=0.01, as_of=10.0)
PREFIX = PrefixView(CHAIN, 650, {"a": Held(4, 256), "b": Held(10, 700)})


def views(*names: str, outlook: Outlook = OUTLOOK) -> tuple[ReplicaView, ...]:
    return tuple(ReplicaView(name, Load(running=i), 0, 0, 8, outlook) for i, name in enumerate(names))


def receipt(snapshot: Snapshot, replica: str, charge: Charge, **fields: Any) -> Receipt:
    decision = Decision(replica, Reason.LEAST_COST, (), 0.75)
    held = snapshot.prefix.at(replica)
    return make_receipt(REQUEST, snapshot, decision, held, charge, "cost", **{"retry": False, **fields})


def test_a_receipt_says_what_was_held_and_what_is_expected() -> None:
    snapshot = Snapshot("m", views("x", "a"), PREFIX, now=10.2)
    made = receipt(snapshot, "a", Charge(394, 0.0, CHAIN, 4))
    assert (made.queue_depth, made.matched, made.blocks) == (1, 4, 10)
    assert (made.cached_tokens, made.prompt_tokens, made.score) == (256, 650, 0.75)
    # 0.3 s of the queue are left, then a step's own time, 394 tokens and their pairs.
    assert made.expected_s == pytest.approx(0.3 + 0.01 + 0.394 + (394 * 256 + 394 * 394 / 2) * 1e-6)
    assert made.header() == (
        "replica=a;policy=cost;reason=least_cost;queue=1;matched=4/10;cached=256/650;score=0.75;expected_ms=882.5"
    )


def test_a_queue_that_should_be_done_by_now_adds_nothing_to_what_is_expected() -> None:
    snapshot = Snapshot("m", views("a"), PREFIX, now=99.0)
    assert receipt(snapshot, "a", Charge(394)).expected_s == pytest.approx(0.01 + 0.394 + 178_482e-6)


def test_nothing_is_expected_of_a_replica_that_nobody_knows() -> None:
    assert receipt(Snapshot("m", views("a", outlook=Outlook()), PREFIX), "a", Charge(650)).expected_s == 0.0
    assert receipt(Snapshot("m", views("a")), "a", Charge()).expected_s == 0.0


def test_a_retry_says_so_whatever_the_policys_reason_was() -> None:
    assert receipt(Snapshot("m", views("a")), "a", Charge(), retry=True).reason is Reason.RETRY


class Seen:
    """An observer and its clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.failures: list[str] = []

    def __call__(self) -> float:
        return self.now

    def explain_failed(self, kind: str) -> None:
        self.failures.append(kind)


def explainer_of(explain: Any, seen: Seen | None = None) -> Explainer:
    seen = seen or Seen()
    return Explainer(explain, seen, seen, 0.005)


@pytest.mark.parametrize("defect", ["raised", "stalled", "not a number"])
def test_an_explanation_that_fails_or_stalls_rests_and_is_then_asked_again(defect: str) -> None:
    seen, snapshot, asked = Seen(), Snapshot("m", views("a")), 0

    def explain(request: Request, snapshot: Snapshot) -> dict[str, float]:
        nonlocal asked
        asked += 1
        if asked > 1:
            return {"a": 1.0}
        if defect == "raised":
            raise ZeroDivisionError
        seen.now += 1.0 if defect == "stalled" else 0.0
        return {"a": float("nan") if defect == "not a number" else 1.0}

    explainer = explainer_of(explain, seen)
    for _ in range(3):
        explainer.candidates(REQUEST, snapshot, "a")
    assert (asked, seen.failures) == (1, ["stalled" if defect == "stalled" else "raised", "resting", "resting"])
    seen.now += REST_S
    assert explainer.candidates(REQUEST, snapshot, "a")[0].score == 1.0


def test_candidates_come_chosen_first_then_by_score_then_by_what_they_hold() -> None:
    snapshot = Snapshot("m", views("a", "b", "c", "d", "e"), PREFIX)
    explainer = explainer_of(lambda request, snapshot: {"c": 3.0, "d": 1.0, "nobody": 0.0})
    found = explainer.candidates(REQUEST, snapshot, "c")
    assert [one.replica for one in found] == ["c", "d", "b", "a", "e"]
    assert [one.score for one in found] == [3.0, 1.0, None, None, None]
    # More is held than there is by estimate: what is told stays within the prompt.
    assert found[2].cached_tokens == 650


def test_without_an_explanation_candidates_have_no_score() -> None:
    found = explainer_of(None).candidates(REQUEST, Snapshot("m", views("a", "b")), "b")
    assert [(one.replica, one.score) for one in found] == [("b", None), ("a", None)]


@given(st.integers(1, 300), st.integers(1, 120))
@settings(derandomize=True, max_examples=50)
def test_the_header_is_bounded_and_counts_what_it_leaves_out(count: int, length: int) -> None:
    candidates = tuple(Candidate(f"{i:0{length}}", i, i, i, i * 0.1, float(i)) for i in range(count))
    text = Receipt("r1", "a", "cost", Reason.LEAST_COST, 0, candidates=candidates).header()
    told = text.partition(";candidates=")[2]
    assert len(told) <= MAX_CANDIDATES_CHARS + len("+300")
    shown = told.count("(")
    assert told.endswith(f"+{count - shown}") if shown < count else "+" not in told


def test_a_replica_that_has_to_wake_first_is_shown_and_nothing_is_expected_of_it() -> None:
    sleeper = ReplicaView("s", Load(asleep=True), 0, 0, 8, OUTLOOK)
    snapshot = Snapshot("m", (*views("a"), sleeper), PREFIX, now=10.2)
    made = receipt(snapshot, "s", Charge(650, 0.0, CHAIN))
    assert (made.asleep, made.expected_s) == (True, 0.0)
    assert made.header().endswith(";score=0.75;asleep=1")
    assert Candidate("s", asleep=True).words() == "s(matched=0 cached=0 queue=0 asleep=1)"
    assert not receipt(snapshot, "a", Charge()).asleep
