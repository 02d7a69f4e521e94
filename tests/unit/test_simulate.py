"""The offline simulator: the fleet on a virtual clock, its traces, its figures and its command."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from math import sqrt
from pathlib import Path

import msgspec
import pytest

from engine.simulated_core import SimulatedCore, StepWork
from engine.simulated_text import hashed_prompt
from loadtests.__main__ import main as loadtests
from loadtests.simulate import runs, traces
from loadtests.simulate.cluster import Change, Cluster, Outcome, Setup
from loadtests.simulate.measure import Result, is_good, percentile
from loadtests.simulate.perf import H200_8B, PROFILES, Profile, cold_prefill_s, step_ms
from loadtests.simulate.runs import Knobs, maker, run_at
from loadtests.simulate.traces import Trace, TraceRow, build

pytestmark = pytest.mark.slow

BLOCK = 512


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saturation rates are remembered for this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(runs, "_saturations", {})


def some_rows(count: int, seed: int = 0, families: int = 8) -> list[TraceRow]:
    """Prompts of a few families, in each of which the longer ones go on from the shorter ones."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        tokens, answer = draw.randrange(1, 20_000), draw.randrange(1, 300)
        family = draw.randrange(families) << 32
        ids = [family + block for block in range(-(-tokens // BLOCK))]
        rows.append(TraceRow(number * 150.0, tokens, answer, ids))
    return rows


def some_trace(count: int = 150, seed: int = 0) -> Trace:
    return build("some", some_rows(count, seed))


def replay(
    trace: Trace, policy: str = "least-queue", rate_rps: float = 8.0, setup: Setup | None = None, seed: int = 0
) -> tuple[Cluster, list[Outcome]]:
    cluster = Cluster(setup or Setup(H200_8B, 3, seed=seed), maker(policy, {}), trace.requests)
    outcomes = cluster.run(traces.arrivals(trace, rate_rps, seed))
    assert outcomes is not None
    return cluster, outcomes


def small(kv_blocks: int, **more: object) -> Profile:
    """The H200's speed with another size of KV cache."""
    options = msgspec.structs.replace(H200_8B.options, kv_blocks=kv_blocks, max_model_len=kv_blocks * BLOCK, **more)
    return Profile("small", options)


def timeless(result: Result) -> Result:
    return msgspec.structs.replace(result, seconds=0.0)


def assert_whole(outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        assert not outcome.error
        assert outcome.at_s < outcome.first_s <= outcome.end_s
        assert 0 <= outcome.cached_tokens < outcome.request.prompt.tokens


@pytest.mark.parametrize("policy", ["cost", "least-queue", "lmetric", "greedy", "ideal"])
def test_every_request_ends_and_nothing_is_left_on_any_replica(policy: str) -> None:
    trace = some_trace()
    setup = Setup(small(60), 3, routers=2, staleness_s=0.05, model_error=0.3, pooled=policy == "ideal")
    cluster, outcomes = replay(trace, policy, 20.0, setup)
    assert len(outcomes) == len(trace.requests)
    assert_whole(outcomes)
    for replica in cluster.replicas.values():
        load = replica.core.load()
        assert (load.running, load.waiting, load.queued_prefill_tokens, load.kv_usage) == (0, 0, 0, 0)
        assert not replica.flights
        assert replica.alone


def test_a_seed_decides_everything_and_another_one_something_else() -> None:
    trace = some_trace()
    one, again, other = (
        run_at(trace, 3, "cost", 8.0, 1.0, Knobs(seed=seed, routers=2, model_error=0.2, staleness_s=0.02))
        for seed in (1, 1, 2)
    )
    assert timeless(one) == timeless(again)
    assert one.ttft_mean_s != other.ttft_mean_s


@pytest.mark.parametrize("policy", ["round-robin", "least-queue", "greedy"])
def test_stretches_of_steps_give_exactly_the_times_of_single_steps(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = some_trace(100)
    setup = Setup(small(120), 2, slow_factor=1.3)
    _, leaping = replay(trace, policy, 6.0, setup)
    monkeypatch.setattr(SimulatedCore, "stretch", lambda core, now, longest=None: [])
    _, stepping = replay(trace, policy, 6.0, setup)
    assert leaping == stepping


def test_an_endless_cache_finds_all_that_the_trace_repeats() -> None:
    trace = some_trace(60)
    # So slowly that every prompt is computed before the next one comes.
    _, outcomes = replay(trace, rate_rps=0.1, setup=Setup(small(10_000), 1))
    tokens = sum(outcome.request.prompt.tokens for outcome in outcomes)
    cached = sum(outcome.cached_tokens for outcome in outcomes)
    in_order = Trace("in order", tuple(outcome.request for outcome in outcomes))
    # An answer's last token is never computed, so a block that it would fill is not there.
    assert cached / tokens == pytest.approx(traces.prefix_hits(in_order), abs=0.005)
    assert cached > 0


@pytest.mark.parametrize(("name", "count", "hits"), [("conversation", 12_031, 0.374), ("synthetic", 3_993, 0.651)])
def test_the_mooncake_traces_are_as_they_were_published(name: str, count: int, hits: float) -> None:
    trace = traces.load(name)
    assert len(trace.requests) == count
    assert traces.prefix_hits(trace) == pytest.approx(hits, abs=0.01)


@pytest.mark.parametrize(("name", "count", "mean"), [("azure-conv", 19_366, 1155), ("azure-code", 8_819, 2048)])
def test_the_azure_traces_share_no_prefixes(name: str, count: int, mean: float) -> None:
    trace = traces.load(name)
    assert len(trace.requests) == count
    assert sum(request.prompt.tokens for request in trace.requests) / count == pytest.approx(mean, abs=1)
    assert traces.prefix_hits(trace) == 0


def test_the_answer_that_a_row_has_ids_for_is_found_by_the_next_turn() -> None:
    first = TraceRow(0.0, 3 * BLOCK, 2 * BLOCK + 9, [1, 2, 3, 4, 5])
    second = TraceRow(600_000.0, 6 * BLOCK, 4, [1, 2, 3, 4, 5, 6])
    trace = build("turns", [first, second])
    assert len(trace.requests[0].chain.blocks) == 3
    _, outcomes = replay(trace, rate_rps=trace.rate_rps, setup=Setup(H200_8B, 1))
    assert outcomes[1].cached_tokens == 5 * BLOCK


def test_equal_ids_behind_different_blocks_are_different_blocks() -> None:
    trace = build("ids", [TraceRow(0, 2 * BLOCK, 1, [1, 2]), TraceRow(1, 2 * BLOCK, 1, [3, 2])])
    one, other = (request.chain.blocks for request in trace.requests)
    assert not set(one) & set(other)


def test_arrivals_come_at_the_rate_asked_for_in_order_and_scattered_by_the_seed() -> None:
    trace = some_trace(200)
    times = [at for at, _ in traces.arrivals(trace, 4.0, 0)]
    assert times == sorted(times)
    assert times[0] == 0
    assert len(times) / times[-1] == pytest.approx(4.0)
    assert times == [at for at, _ in traces.arrivals(trace, 4.0, 0)]
    assert times != [at for at, _ in traces.arrivals(trace, 4.0, 1)]


@pytest.mark.parametrize(("gap", "granularity"), [(3000, 3.0), (500, 0.5)])
def test_batches_of_one_time_each_are_scattered_over_the_gap_between_them(gap: int, granularity: float) -> None:
    # As in the conversations: a batch comes at the gap's multiple, or a millisecond before it.
    rows = [TraceRow(max(batch * gap - batch % 2, 0), 10, 1, []) for batch in range(300) for _ in range(10)]
    trace = build("batches", rows)
    assert traces.granularity_s(trace) == granularity
    times = [at for at, _ in traces.arrivals(trace, trace.rate_rps, 0)]
    in_tenths = [0] * 10
    for at in times:
        in_tenths[int(at / granularity % 1 * 10)] += 1
    assert max(in_tenths) < 1.3 * min(in_tenths)


def test_rare_requests_with_times_of_their_own_stay_where_they_are_within_a_second() -> None:
    trace = build("rare", [TraceRow(number * 60_000.0, 10, 1, []) for number in range(20)])
    assert traces.granularity_s(trace) == 1


def test_requests_that_all_bear_the_same_time_come_evenly() -> None:
    trace = build("same", [TraceRow(5000.0, 10, 1, []) for _ in range(5)])
    times = [at for at, _ in traces.arrivals(trace, 2.0, 0)]
    assert times == pytest.approx([0, 0.625, 1.25, 1.875, 2.5])
    alone = build("one", [TraceRow(5000.0, 10, 1, [])])
    assert [at for at, _ in traces.arrivals(alone, 2.0, 0)] == [0]


def test_the_step_of_a_long_prompt_lasts_as_the_roofline_says() -> None:
    core = SimulatedCore(H200_8B.options)
    core.add("a", hashed_prompt([], 10_000), 3)
    budget = 8192
    expected = 2.5 + sqrt(4.6**2 + (0.0211 * budget) ** 2) + 1.31e-6 * budget**2 / 2
    assert core.plan() == pytest.approx(expected)
    core.commit()
    load = core.load()
    assert (load.step_prefill_tokens, load.step_prefill_pairs) == (budget, budget**2 / 2)
    rest = 10_000 - budget
    pairs = rest * budget + rest**2 / 2
    assert load.queued_prefill_pairs == pairs
    assert core.plan() == pytest.approx(2.5 + sqrt(4.6**2 + (0.0211 * rest) ** 2) + 1.31e-6 * pairs)
    core.commit()
    assert core.load().queued_prefill_pairs == 0
    assert core.plan() == pytest.approx(2.5 + sqrt(4.6**2 + 0.0211**2) + 3.6e-5 * 10_001)
    core.commit()
    load = core.load()
    assert (load.step_decodes, load.step_context_tokens, load.step_prefill_tokens) == (1, 10_001, 0)


def test_vidurs_tables_are_met_at_both_ends() -> None:
    profile = PROFILES["h100-7b-vidur"]
    fixed = profile.options.step_base_ms
    assert step_ms(profile, StepWork(1, 0, 0, 0)) - fixed == pytest.approx(5.5, abs=0.01)
    assert step_ms(profile, StepWork(2048, 0, 0, 0)) - fixed == pytest.approx(40.5)


def test_the_mockers_polynomial_adds_prompts_and_decodes() -> None:
    profile = PROFILES["dynamo-mocker"]
    prompt = 4.209989e-07 * 1000**2 + 1.518344e-02 * 1000 + 16.50142
    decode = -25.74 * 0.25 + 54.01 * 0.5 + 5.74
    assert step_ms(profile, StepWork(1000, 5e5, 0, 0)) == pytest.approx(prompt)
    assert step_ms(profile, StepWork(0, 0, 9, 410_000)) == pytest.approx(decode)
    assert step_ms(profile, StepWork(1000, 5e5, 9, 410_000)) == pytest.approx(prompt + decode)


@pytest.mark.parametrize("name", PROFILES)
def test_a_cold_prompt_on_an_idle_replica_takes_its_cold_prefill(name: str) -> None:
    profile = PROFILES[name]
    trace = build("one", [TraceRow(0.0, 20_000, 5, [])])
    _, (outcome,) = replay(trace, setup=Setup(profile, 1))
    assert outcome.first_s - outcome.at_s == pytest.approx(cold_prefill_s(profile, 20_000))


def test_what_fits_no_replica_is_an_error_and_is_counted() -> None:
    rows = [TraceRow(number * 1000.0, 9 * BLOCK, 4, []) for number in range(20)]
    rows[15] = TraceRow(15_000.0, 11 * BLOCK, 4, [])
    trace = build("large", rows)
    profile = small(10)
    _, outcomes = replay(trace, rate_rps=1.0, setup=Setup(profile, 1))
    assert [outcome.request.index for outcome in outcomes if outcome.error] == [15]
    assert "maximum context length" in outcomes[15].error
    assert not is_good(outcomes[15], 1.0)
    assert_whole([outcome for outcome in outcomes if not outcome.error])


def test_the_requests_of_a_lost_replica_go_to_others_until_their_first_token() -> None:
    trace = some_trace(120)
    lost = Setup(H200_8B, 3, changes=(Change(1.5, joins=False, replica="r1"),))
    cluster, outcomes = replay(trace, "cost", 60.0, lost)
    assert list(cluster.replicas) == ["r0", "r2"]
    broken = [outcome for outcome in outcomes if outcome.error]
    assert broken
    assert all(outcome.first_s and outcome.replica == "r1" for outcome in broken)
    assert any(outcome.tries == 2 for outcome in outcomes)
    assert all(outcome.replica != "r1" for outcome in outcomes if outcome.at_s > 1.5)
    assert_whole([outcome for outcome in outcomes if not outcome.error])


def test_without_any_replica_requests_fail() -> None:
    trace = some_trace(20)
    _, outcomes = replay(trace, setup=Setup(H200_8B, 1, changes=(Change(0.0, joins=False),)))
    assert {outcome.error for outcome in outcomes} == {"there is no replica"}


def test_a_replica_that_joins_is_used() -> None:
    _, outcomes = replay(some_trace(120), "cost", 12.0, Setup(H200_8B, 2, changes=(Change(4.0, joins=True),)))
    assert_whole(outcomes)
    assert any(outcome.replica == "r2" for outcome in outcomes)
    assert all(outcome.at_s >= 4.0 for outcome in outcomes if outcome.replica == "r2")


def test_a_slow_replica_gets_less() -> None:
    _, outcomes = replay(some_trace(), "least-queue", 10.0, Setup(H200_8B, 3, slow_factor=4.0))
    counts = [sum(outcome.replica == name for outcome in outcomes) for name in ("r0", "r1", "r2")]
    assert counts[0] < 0.7 * min(counts[1:])


def test_late_reports_make_the_shortest_queue_longer() -> None:
    trace = some_trace(300)
    fresh, stale = (
        run_at(trace, 4, "least-queue", 14.0, 1.0, Knobs(staleness_s=staleness, routers=4)) for staleness in (0.0, 2.0)
    )
    assert stale.ttft_mean_s > 1.1 * fresh.ttft_mean_s
    assert stale.inflight_imbalance > fresh.inflight_imbalance


def test_one_pool_of_caches_finds_what_any_replica_holds() -> None:
    rows = [TraceRow(number * 60_000.0, 4 * BLOCK + 1, 2, [1, 2, 3, 4]) for number in range(4)]
    trace = build("same", rows)
    for pooled, cached in ((True, [0, 2048, 2048, 2048]), (False, [0, 0, 2048, 2048])):
        setup = Setup(H200_8B, 2, pooled=pooled)
        _, outcomes = replay(trace, "round-robin", trace.rate_rps, setup)
        assert [outcome.cached_tokens for outcome in outcomes] == cached


def test_truthful_baselines_are_spared_the_routers_errors_and_say_so() -> None:
    trace = some_trace(60)
    errors = Knobs(staleness_s=1.0, routers=4, model_error=0.3, replica_error=0.2)
    plain, spoiled = (run_at(trace, 3, "greedy", 8.0, 1.0, knobs) for knobs in (Knobs(), errors))
    assert timeless(plain) == timeless(spoiled)
    assert (spoiled.staleness_ms, spoiled.routers, spoiled.model_error, spoiled.token_error) == (0, 1, 0, 0)


def test_a_result_says_under_what_it_came_about() -> None:
    knobs = Knobs(
        token_error=0.1,
        replica_error=0.2,
        slow_factor=1.5,
        joins=(0.2,),
        leaves=(0.6,),
        options={"prefix": 2.0},
    )
    result = run_at(some_trace(60), 3, "llm-d", 8.0, 1.0, knobs)
    for field in ("token_error", "replica_error", "slow_factor", "joins", "leaves", "options"):
        assert getattr(result, field) == getattr(knobs, field)


def test_a_router_knows_the_ends_of_its_own_streams_however_late_reports_are() -> None:
    trace = build("one", [TraceRow(0.0, 1000, 20, [])])
    cluster = Cluster(Setup(H200_8B, 1, staleness_s=100.0), maker("least-queue", {}), trace.requests)
    ends: list[float] = []
    router = cluster._routers[0]
    ended = router.ended

    def noted(replica: str, hold: object) -> None:
        ends.append(cluster.now)
        ended(replica, hold)

    router.ended = noted  # type: ignore[method-assign]
    (outcome,) = cluster.run(traces.arrivals(trace, 1.0, 0)) or []
    assert ends == [pytest.approx(outcome.end_s)]
    assert cluster.now > 100


def test_mean_times_are_told_by_prompt_length() -> None:
    rows = [TraceRow(number * 60_000.0, tokens, 1, []) for number, tokens in enumerate((100, 10_000, 30_000) * 4)]
    result = run_at(build("lengths", rows), 1, "least-queue", 1 / 60, 1.0, Knobs())
    for field, tokens in (("short", 100), ("middle", 10_000), ("long", 30_000)):
        assert getattr(result, f"ttft_{field}_mean_s") == pytest.approx(cold_prefill_s(H200_8B, tokens))


def test_a_trace_that_no_rate_overloads_ends_the_search_and_is_marked() -> None:
    trace = build("few", [TraceRow(number * 1000.0, 100, 2, []) for number in range(4)])
    best = runs.goodput(trace, 2, "least-queue")
    assert best.unlimited
    assert best.good_share == 1
    assert best.goodput_rps == best.rate_rps == pytest.approx(4 / runs.AT_ONCE_S)
    assert not runs.goodput(some_trace(100), 2, "least-queue").unlimited


def test_requests_in_flight_are_counted_by_the_router_that_sent_them() -> None:
    trace = build("same", [TraceRow(0.0, 3 * BLOCK + 1, 9, [1, 2, 3]), TraceRow(1.0, 3 * BLOCK, 9, [1, 2, 4])])
    router = Cluster(Setup(H200_8B, 1), maker("dynamo", {}), trace.requests)._routers[0]
    first, second = trace.requests
    assert router.in_flight("r0", second.chain.blocks) == 0
    name, _, hold = router.route(first, 0.0)
    assert router.in_flight(name, second.chain.blocks) == 2
    router.ended(name, hold)
    assert router.in_flight(name, second.chain.blocks) == 0


@pytest.mark.parametrize("damage", ["", "{", '{"rps": null}', '{"rps": -1}', "directory"])
def test_a_remembered_rate_that_cannot_be_used_is_found_anew(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = some_trace(60)
    rate = runs.saturation_rps(trace, 2)
    (path,) = runs._cache_dir().iterdir()
    path.unlink()
    if damage == "directory":
        path.mkdir()  # Neither read nor written.
    else:
        path.write_text(damage)
    monkeypatch.setattr(runs, "_saturations", {})
    assert runs.saturation_rps(trace, 2) == rate


def test_all_code_that_decides_a_saturation_rate_is_in_its_key() -> None:
    names = {path.name for path in runs._sources()}
    assert names >= {"routers.py", "simulated_text.py", "account.py", "model.py", "index.py"}


def test_each_seed_has_a_generated_trace_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, seed: int = 0) -> Trace:
        asked.append((name, seed))
        return some_trace(30, seed)

    monkeypatch.setattr(traces, "load", load)
    runs.run("agentic", 2, "least-queue", 0.5, seed=3)
    runs.goodput("agentic", 2, "least-queue", seed=4)
    assert asked == [("agentic", 3), ("agentic", 4)]


def test_the_saturation_rate_is_what_least_queue_gets_done_and_is_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trace = some_trace(100)
    rate = runs.saturation_rps(trace, 2)
    result = run_at(trace, 2, "least-queue", rate, 1.0, Knobs())
    assert result.errors == 0
    monkeypatch.setattr(runs, "_saturations", {})
    monkeypatch.setattr(runs, "replay", None)  # Another run would fail.
    assert runs.saturation_rps(trace, 2) == rate


def test_the_search_ends_at_a_rate_that_is_good_enough_and_not_far_from_one_that_is_not() -> None:
    trace = some_trace(150)
    best = runs.goodput(trace, 2, "least-queue")
    assert best.good_share >= 0.9
    assert best.goodput_rps == best.rate_rps
    worse = run_at(trace, 2, "least-queue", best.rate_rps * 1.2, 0.0, Knobs())
    assert worse.good_share < 0.9


def test_a_run_that_is_given_up_would_not_have_been_good_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtests.simulate.cluster.ASK_EVERY", 10)
    trace = some_trace(150)
    given_up = 0
    for rate in (2.0, 6.0, 9.0, 12.0, 15.0, 20.0):
        result = runs._run(trace, 2, "least-queue", rate, 1.0, Knobs(), may_give_up=True)
        whole = run_at(trace, 2, "least-queue", rate, 1.0, Knobs())
        if result is None:
            given_up += 1
            assert whole.good_share < 0.9
        else:
            assert timeless(result) == timeless(whole)
    assert 0 < given_up < 6


def test_a_fleet_that_copes_with_no_rate_has_no_goodput(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtests.simulate.measure.TPOT_LIMIT_S", 0.001)
    assert runs.goodput(some_trace(30), 1, "round-robin").goodput_rps == 0


def test_percentiles_lie_between_the_values_around_them() -> None:
    assert percentile([1.0, 2.0, 4.0], 0.5) == 2.0
    assert percentile([1.0, 2.0, 4.0], 0.75) == 3.0
    assert percentile([1.0, 2.0, 4.0], 1.0) == 4.0
    assert percentile([], 0.5) == 0.0


KEYS = {
    "policy", "trace", "replicas", "load", "hit_ratio", "ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s",
    "tpot_p50_s", "tpot_p99_s", "goodput_rps", "imbalance",
}  # fmt: skip


def write_trace(path: Path, rows: Sequence[TraceRow]) -> None:
    path.write_bytes(b"\n".join(msgspec.json.encode(row) for row in rows))


def test_the_command_takes_a_file_and_writes_a_result_for_each_policy_load_and_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, out = tmp_path / "mine.jsonl", tmp_path / "out.json"
    write_trace(trace, some_rows(40))
    arguments = ["--trace", str(trace), "--replicas", "2", "--load", "0.5,0.8", "--seed", "0,1", "--json", str(out)]
    assert loadtests(["simulate", *arguments, "--policies", "least-queue,cost", "--slow-replica", "1.2"]) == 0
    results = json.loads(out.read_text())["results"]
    assert len(results) == 8
    assert all(result.keys() >= KEYS for result in results)
    assert {result["trace"] for result in results} == {"mine"}
    assert capsys.readouterr().out.count("TTFT") == 8


def test_several_processes_find_the_same(tmp_path: Path) -> None:
    trace = tmp_path / "mine.jsonl"
    write_trace(trace, some_rows(30))
    found = []
    for jobs in ("1", "2"):
        out = tmp_path / f"{jobs}.json"
        arguments = ["--trace", str(trace), "--replicas", "2", "--policies", "cost,round-robin", "--json", str(out)]
        assert loadtests(["simulate", *arguments, "--jobs", jobs]) == 0
        found.append([{**result, "seconds": 0} for result in json.loads(out.read_text())["results"]])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--trace", "nowhere", "--policies", "cost"], "nowhere"),
        (["--trace", "conversation", "--policies", "best-of-all"], "best-of-all"),
        (["--trace", "conversation", "--policies", "best-of-all"], "chwbl, cost"),
        (["--trace", "conversation", "--policies", ","], "--policies"),
        (["--trace", "conversation"], "--policies"),
        (["--trace", "conversation", "--policies", "cost", "--replicas", "0"], "'0' is not an integer at least 1"),
        (["--trace", "conversation", "--policies", "cost", "--load", "0.8,0"], "'0' is not a number above 0"),
        (["--trace", "conversation", "--policies", "cost", "--load", "nan"], "--load"),
        (["--trace", "conversation", "--policies", "cost", "--routers", "0"], "--routers"),
        (["--trace", "conversation", "--policies", "cost", "--jobs", "0"], "--jobs"),
        (["--trace", "conversation", "--policies", "cost", "--staleness-ms", "-1"], "--staleness-ms"),
        (["--trace", "conversation", "--policies", "cost", "--model-error", "1"], "--model-error"),
        (["--trace", "conversation", "--policies", "cost", "--token-error", "1.5"], "--token-error"),
        (["--trace", "conversation", "--policies", "cost", "--slow-replica", "0"], "--slow-replica"),
        (["--trace", "conversation", "--policies", "cost", "--seed", "one"], "--seed"),
        (["--trace", "conversation", "--policies", "cost", "--replicas", "2", "--leave", "0.1,0.2"], "no replica"),
        (["--trace", "conversation", "--policies", "cost", "--options", "[1]"], "--options"),
        (["--trace", "conversation", "--policies", "cost", "--options", '{"chwbl": {}}'], "chwbl"),
        (["--trace", "conversation", "--policies", "chwbl", "--options", '{"chwbl": {"prize": 2}}'], "prize"),
        (["--trace", "conversation", "--policies", "greedy", "--options", '{"greedy": {"prize": 2}}'], "no options"),
        (["--trace", "conversation", "--policies", "nowhere.at_all:Policy"], "nowhere"),
        (["--trace", "conversation", "--policies", "cost", "--options", '{"cost": {"prize": 2}}'], "prize"),
    ],
)
def test_a_wrong_name_ends_the_command_with_a_complaint(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert loadtests(["simulate", *arguments]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "empty"),
        (b'{"timestamp": 0, "input_length": 3, "output_length": 1, "hash_ids": [-1]}', "line 1"),
        (b'{"timestamp": 0, "input_length": 3, "output_length": 1, "hash_ids": [18446744073709551616]}', "line 1"),
        (b'{"timestamp": 0, "input_length": 0, "output_length": 1}', "line 1"),
        (b'{"timestamp": NaN, "input_length": 3, "output_length": 1}', "line 1"),
        (b'{"timestamp": 0, "input_length": 900000, "output_length": 1}', "fits into a replica"),
        (b"\xff\xfe", "no text"),
    ],
)
def test_a_trace_that_cannot_be_used_is_refused_in_one_line(
    content: bytes, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    assert loadtests(["simulate", "--trace", str(path), "--policies", "cost"]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_results_are_on_disk_before_the_last_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace, out = tmp_path / "mine.jsonl", tmp_path / "out.json"
    write_trace(trace, some_rows(30))
    runs_made: list[Result] = []

    def failing(*args: object, **more: object) -> Result:
        if runs_made:
            raise RuntimeError("the second one fails")
        runs_made.append(runs.run(*args, **more))  # type: ignore[arg-type]
        return runs_made[0]

    monkeypatch.setattr("loadtests.simulate.command.run", failing)
    out.write_text("what was there before")
    arguments = ["--trace", str(trace), "--replicas", "2", "--policies", "round-robin,cost", "--json", str(out)]
    with pytest.raises(RuntimeError):
        loadtests(["simulate", *arguments])
    (kept,) = json.loads((tmp_path / "out.json.part").read_text())["results"]
    assert kept["policy"] == "round-robin"
    assert out.read_text() == "what was there before"


@pytest.mark.parametrize("name", ["nowhere/out.json", ""])
def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "mine.jsonl"
    write_trace(trace, some_rows(20))
    arguments = ["--trace", str(trace), "--policies", "cost", "--json", str(tmp_path / name)]
    assert loadtests(["simulate", *arguments]) == 2
    told = capsys.readouterr()
    assert not told.out
    assert str(tmp_path) in told.err


def test_a_file_that_is_no_trace_is_refused_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 3, "output_length": 1, "hash_ids": []}\n{"timestamp": "soon"}\n')
    assert loadtests(["simulate", "--trace", str(path), "--policies", "cost"]) == 2
    assert "line 2" in capsys.readouterr().err
