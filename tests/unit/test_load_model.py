"""The load model learns how long steps take, and the account charges what no step has counted yet."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import msgspec
import pytest

from router.load.account import new_account
from router.load.model import new_fleet
from router.types import CacheMode, Charge, EngineInfo, Load
from tests.twins import twins

both = twins("router.load._outlooks")

INFO = EngineInfo("sim", (), max_num_seqs=8, kv_blocks=100, kv_block_tokens=16)


def h200_ms(prompt: int, pairs: float, decodes: int, context: int) -> float:
    return 2.5 + math.hypot(4.6, 0.0211 * (prompt + decodes)) + 1.31e-6 * pairs + 3.6e-5 * context


def steps(count: int, *, seed: int = 1, noise: float = 0.05) -> Iterator[Load]:
    """Steps of an engine with a budget of 8,192 tokens, some with prompts and some without."""
    chance = random.Random(seed)
    for _ in range(count):
        decodes = chance.randrange(1, 100)
        context = decodes * chance.randrange(5_000, 15_000)
        prompt, pairs = 0, 0.0
        if chance.random() < 0.3:
            prompt = min(8192, int(chance.expovariate(1 / 5000)) + 1)
            pairs = prompt * chance.randrange(0, 20_000) + prompt * prompt / 2
        ms = h200_ms(prompt, pairs, decodes, context) * chance.uniform(1 - noise, 1 + noise)
        yield Load(
            step_ms=ms,
            step_prefill_tokens=prompt,
            step_prefill_pairs=pairs,
            step_decodes=decodes,
            step_context_tokens=context,
        )


def test_a_long_prompts_time_is_learned_within_a_tenth() -> None:
    replica = new_fleet().foresight()
    for load in steps(1000):
        replica.observe(load, 0.0)
    outlook = replica.outlook(Load(), 0, 0.0, 0)
    for tokens, cached in ((8_000, 0), (30_000, 0), (30_000, 20_000)):
        new = tokens - cached
        chunks = [min(8192, new - done) for done in range(0, new, 8192)]
        done, truth = cached, 0.0
        for chunk in chunks:
            truth += h200_ms(chunk, chunk * done + chunk * chunk / 2, 0, 0) / 1e3
            done += chunk
        assert outlook.prefill_s(tokens, cached) == pytest.approx(truth, rel=0.1)


def test_the_time_of_an_undisturbed_output_token_is_learned() -> None:
    replica = new_fleet().foresight()
    for load in steps(1000):
        replica.observe(load, 0.0)
    outlook = replica.outlook(Load(running=40, step_decodes=40, step_context_tokens=400_000), 0, 0.0, 0)
    assert outlook.step_s == pytest.approx(h200_ms(0, 0, 40, 400_000) / 1e3, rel=0.1)


def test_a_slow_replica_is_told_apart_and_does_not_spoil_the_others() -> None:
    fleet = new_fleet()
    replicas = [fleet.foresight() for _ in range(4)]
    for index, load in enumerate(steps(4000)):
        slow = 2.0 if index % 4 == 3 else 1.0
        replicas[index % 4].observe(_slower(load, slow), 0.0)
    outlooks = [replica.outlook(Load(), 0, 0.0, 0).prefill_s(8_000, 0) for replica in replicas]
    assert outlooks[3] / outlooks[0] == pytest.approx(2.0, rel=0.15)
    assert outlooks[0] == pytest.approx(h200_ms(8_000, 3.2e7, 0, 0) / 1e3, rel=0.15)


def test_a_replica_that_was_slow_once_is_like_the_others_after_it_had_nothing_to_do_for_a_while() -> None:
    fleet = new_fleet()
    replicas = [fleet.foresight() for _ in range(4)]
    now = 0.0
    for index, load in enumerate(steps(4000)):
        now += load.step_ms * 1e-3 / 4
        replicas[index % 4].observe(_slower(load, 3.0 if index % 4 == 3 else 1.0), now)
    ratios = [replicas[3].outlook(Load(), 0, 0.0, 0).token_s / replicas[0].outlook(Load(), 0, 0.0, 0).token_s]
    until = now + 60.0
    for index, load in enumerate(steps(20_000, seed=2)):
        if now > until:
            break
        now += load.step_ms * 1e-3 / 3
        replicas[index % 3].observe(load, now)
    ratios.append(replicas[3].outlook(Load(), 0, 0.0, 0).token_s / replicas[0].outlook(Load(), 0, 0.0, 0).token_s)
    assert ratios == [pytest.approx(3.0, rel=0.2), 1.0]


def test_a_pause_of_the_machine_does_not_ruin_what_was_learned() -> None:
    replica = new_fleet().foresight()
    for index, load in enumerate(steps(1000)):
        replica.observe(_slower(load, 1000.0) if index == 900 else load, 0.0)
    truth = h200_ms(8_000, 3.2e7, 0, 0) / 1e3
    assert replica.outlook(Load(), 0, 0.0, 0).prefill_s(8_000, 0) == pytest.approx(truth, rel=0.15)


def test_coefficients_are_never_negative_whatever_the_steps_say() -> None:
    chance = random.Random(3)
    fleet = new_fleet()
    replica = fleet.foresight()
    for _ in range(2000):
        prompt = chance.choice([0, chance.randrange(1, 9000)])
        load = Load(
            step_ms=chance.choice([0.0, chance.uniform(0.01, 500)]),
            step_prefill_tokens=prompt,
            step_prefill_pairs=prompt * chance.randrange(1, 5000),
            step_decodes=chance.randrange(0, 300),
            step_context_tokens=chance.randrange(0, 900_000),
        )
        replica.observe(load, 0.0)
        assert min(fleet.prefill.coefficients) >= 0.0
        assert min(fleet.decode.coefficients) >= 0.0
        outlook = replica.outlook(load, 5, 12.0, 1)
        assert all(math.isfinite(value) and value >= 0.0 for value in (outlook.wait_s, outlook.token_s, outlook.step_s))


def test_an_engine_that_says_nothing_of_its_steps_teaches_nothing() -> None:
    fleet = new_fleet()
    before = fleet.prefill.coefficients, fleet.decode.coefficients
    fleet.foresight().observe(Load(running=3, step_ms=20.0), 0.0)
    assert (fleet.prefill.coefficients, fleet.decode.coefficients) == before


def test_requests_that_have_ended_are_not_in_the_next_step() -> None:
    """An idle replica steps no more, so the figures of its last step stay with its load."""
    replica = new_fleet().foresight()
    for load in steps(500):
        replica.observe(load, 0.0)
    after = Load(running=0, step_decodes=64, step_context_tokens=600_000)
    assert replica.outlook(after, 0, 0.0, 0) == replica.outlook(Load(), 0, 0.0, 0)


@pytest.mark.parametrize("figure", [math.nan, math.inf, -math.inf])
def test_figures_that_are_no_numbers_teach_nothing(figure: float) -> None:
    fleet = new_fleet()
    broken, sound = fleet.foresight(), fleet.foresight()
    for load in steps(500):
        broken.observe(Load(step_ms=figure, step_prefill_tokens=10, step_prefill_pairs=figure), 0.0)
        broken.observe(Load(step_ms=5.0, step_prefill_tokens=10, step_prefill_pairs=figure), 0.0)
        sound.observe(load, 0.0)
    assert sound.outlook(Load(), 0, 0.0, 0).prefill_s(8_000, 0) == pytest.approx(
        h200_ms(8_000, 3.2e7, 0, 0) / 1e3, rel=0.15
    )


def test_small_prompts_do_not_make_long_ones_look_as_if_they_took_a_step_per_token() -> None:
    fleet = new_fleet()
    replica = fleet.foresight()
    for tokens in range(1, 300):
        replica.observe(Load(step_ms=20.0 + tokens * 1e-3, step_prefill_tokens=1 + tokens % 20), float(tokens))
    assert fleet.budget >= 2048
    assert replica.outlook(Load(), 0, 0.0, 0).prefill_s(30_000, 0) < 3.0


def test_a_queue_is_worked_on_from_the_last_step_and_not_from_news_in_between() -> None:
    replica = new_fleet().foresight()
    step = Load(running=1, queued_prefill_tokens=8_000, step_ms=100.0, step_prefill_tokens=2_000)
    replica.observe(step, 1.0)
    replica.observe(step, 1.5)
    assert replica.outlook(step, 0, 0.0, 0).as_of == 1.0


def test_who_comes_while_requests_run_waits_for_the_step_under_way() -> None:
    replica = new_fleet().foresight()
    for load in steps(1000):
        replica.observe(load, 0.0)
    step = Load(running=40, step_ms=30.0, step_decodes=40, step_context_tokens=400_000)
    replica.observe(step, 1.0)
    outlook = replica.outlook(step, 0, 0.0, 0)
    assert outlook.wait_s == outlook.step_s == pytest.approx(h200_ms(0, 0, 40, 400_000) / 1e3, rel=0.1)
    assert outlook.begins_s(1.0 + outlook.wait_s / 2) == pytest.approx(outlook.wait_s / 2)
    # Who was sent since is in the next step, not in this one.
    assert replica.outlook(step, 0, 0.0, 8).wait_s == outlook.wait_s
    ended = msgspec.structs.replace(step, running=0)
    assert replica.outlook(ended, 0, 0.0, 0).wait_s == 0.0
    # A queue that takes longer than the step is all there is to wait for.
    queued = msgspec.structs.replace(step, queued_prefill_tokens=20_000)
    assert replica.outlook(queued, 0, 0.0, 0).wait_s > 5 * outlook.wait_s


def test_a_step_under_way_began_with_the_last_step_and_not_with_news_in_between() -> None:
    replica = new_fleet().foresight()
    step = Load(running=3, step_ms=20.0, step_decodes=3, step_context_tokens=3_000)
    replica.observe(step, 1.0)
    replica.observe(msgspec.structs.replace(step, running=2), 1.01)  # One has ended, or was taken back.
    assert replica.outlook(step, 0, 0.0, 0).as_of == 1.0
    replica.observe(msgspec.structs.replace(step, step_context_tokens=3_003), 1.02)
    assert replica.outlook(step, 0, 0.0, 0).as_of == 1.02


def test_steps_that_count_no_context_look_alike_and_are_new_ones_all_the_same() -> None:
    replica = new_fleet().foresight()
    step = Load(running=3, step_ms=20.0, step_decodes=3)
    for now in (1.0, 1.02, 1.04):
        replica.observe(step, now)
        assert replica.outlook(step, 0, 0.0, 0).as_of == now


def test_news_of_an_idle_engine_are_as_good_as_a_step() -> None:
    replica = new_fleet().foresight()
    done = Load(step_ms=20.0, step_prefill_tokens=100, step_prefill_pairs=5_000.0)
    replica.observe(done, 1.0)
    replica.observe(done, 5.0)
    assert replica.outlook(done, 0, 0.0, 0).as_of == 5.0


def test_an_engine_without_step_figures_is_as_busy_as_it_last_said() -> None:
    replica = new_fleet().foresight()
    for now in (1.0, 50.0, 100.0):
        load = Load(running=1, queued_prefill_tokens=100_000)
        replica.observe(load, now)
    outlook = replica.outlook(load, 0, 0.0, 0)
    assert outlook.begins_s(100.0) == outlook.wait_s > 0.0


def test_queued_work_makes_for_the_wait() -> None:
    replica = new_fleet().foresight()
    for load in steps(500):
        replica.observe(load, 0.0)
    idle = replica.outlook(Load(), 0, 0.0, 0)
    busy = replica.outlook(Load(queued_prefill_tokens=10_000, queued_prefill_pairs=5e7), 0, 0.0, 0)
    ours = replica.outlook(Load(), 10_000, 5e7, 1)
    assert idle.wait_s == 0.0
    assert busy.wait_s == ours.sent_s == pytest.approx(busy.prefill_s(10_000, 0), rel=1e-6)


def test_a_submit_is_charged_until_a_step_counts_it() -> None:
    account = new_account("a", INFO, Load())
    account.submitted(1, Charge(100, 5_000.0))
    account.submitted(2, Charge(10, 50.0))
    view = account.view()
    assert (view.unacked, view.unacked_tokens, view.unacked_pairs) == (2, 110, 5_050.0)
    account.stepped(Load(running=1, queued_prefill_tokens=100), 1, 0.0)
    view = account.view()
    assert (view.unacked, view.unacked_tokens, view.queue_depth) == (1, 10, 2)
    account.stepped(Load(running=2), 2, 0.0)
    view = account.view()
    assert (view.unacked, view.unacked_tokens, view.unacked_pairs) == (0, 0, 0.0)


def test_a_view_is_made_once_and_anew_after_a_change() -> None:
    account = new_account("a", INFO, Load())
    view = account.view()
    assert account.view() is view
    account.leased(1)
    assert account.view().leases == 1
    account.caches(CacheMode.EXACT)
    assert account.view().cache is CacheMode.EXACT
    assert account.view().kv_tokens == 1600


def _slower(load: Load, factor: float) -> Load:
    return Load(
        step_ms=load.step_ms * factor,
        step_prefill_tokens=load.step_prefill_tokens,
        step_prefill_pairs=load.step_prefill_pairs,
        step_decodes=load.step_decodes,
        step_context_tokens=load.step_context_tokens,
    )
