"""How many replicas a model shall have, decided with a clock of the test's own."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingContext

from engine import autoscaling
from engine.autoscaling import STALE_S, Autoscaler, Hours, Limits, Scaling, Seen
from engine.held import HeldInRouters
from engine.serve_autoscaling import autoscaling_config
from router.errors import ConfigError
from router.options import AutoscalingOptions, EngineOptions, HoursOptions

TICK_S = 0.1
NOON = 1_795_435_200.0  # Monday, 23 November 2026, 12:00 UTC.


def limits(**given: Any) -> Limits:
    defaults = Limits(
        min_replicas=0,
        max_replicas=8,
        target_streams=10.0,
        wake_replicas=1,
        upscale_delay_s=5.0,
        downscale_delay_s=30.0,
        downscale_to_zero_delay_s=60.0,
    )
    return defaults._replace(**given)


class Model:
    """A model whose replicas start at once, seen by `Scaling` ten times a second."""

    def __init__(self, replicas: int = 1, now: float = NOON, **given: Any) -> None:
        self.scaling = Scaling(limits(**given))
        self.now = now
        self.replicas = replicas

    def go(
        self, seconds: float, streams: float = 0.0, *, silent: int = 0, held: float = 0.0, spare: bool = False
    ) -> list[int]:
        """The numbers of replicas that there were meanwhile, each once in a row."""
        course = [self.replicas]
        for _ in range(round(seconds / TICK_S)):
            self.now += TICK_S
            seen = Seen(streams, silent, held, spare=spare)
            self.replicas = self.scaling.decide(self.now, self.replicas, seen)
            if course[-1] != self.replicas:
                course.append(self.replicas)
        return course


def test_a_load_that_stays_gets_the_replicas_that_it_needs_at_once() -> None:
    model = Model()
    assert model.go(5.0, streams=35.0) == [1]
    assert model.go(0.3, streams=35.0) == [1, 4]


def test_a_burst_that_ends_sooner_starts_nothing() -> None:
    model = Model()
    for _ in range(10):
        assert model.go(4.5, streams=80.0) == [1]
        assert model.go(0.5, streams=5.0) == [1]


def test_only_what_was_needed_all_the_time_is_started() -> None:
    model = Model()
    model.go(3.0, streams=25.0)
    assert model.go(10.0, streams=75.0) == [1, 3, 8]


def test_fewer_replicas_are_kept_once_fewer_were_enough_for_long() -> None:
    model = Model(replicas=4)
    assert model.go(29.9, streams=12.0) == [4]
    assert model.go(1.0, streams=12.0) == [4, 2]


def test_one_peak_in_between_keeps_the_replicas_for_the_whole_delay_again() -> None:
    model = Model(replicas=4)
    model.go(20.0, streams=1.0)
    model.go(0.1, streams=36.0)
    assert model.go(29.0, streams=1.0) == [4]
    assert model.go(2.0, streams=1.0) == [4, 1]


def test_one_empty_sample_among_many_changes_nothing() -> None:
    model = Model(replicas=3)
    for _ in range(100):
        assert model.go(4.9, streams=28.0) == [3]
        assert model.go(0.1, streams=0.0) == [3]


def test_a_load_around_a_limit_does_not_make_replicas_come_and_go() -> None:
    model = Model(replicas=1)
    course = []
    for _ in range(40):
        course += model.go(20.0, streams=19.5)[1:]
        course += model.go(20.0, streams=20.5)[1:]
    assert course in ([2, 3], [3])


def test_the_last_replica_goes_after_a_delay_of_its_own() -> None:
    model = Model(replicas=3)
    assert model.go(31.0) == [3, 1]
    assert model.go(28.0) == [1]
    assert model.go(2.0) == [1, 0]


def test_a_shorter_delay_to_zero_counts_for_the_last_replica_alone() -> None:
    model = Model(replicas=1, downscale_to_zero_delay_s=10.0)
    assert model.go(11.0) == [1, 0]
    model = Model(replicas=2, downscale_to_zero_delay_s=10.0)
    assert model.go(29.0) == [2]
    assert model.go(2.0) == [2, 1, 0]


def test_one_stream_keeps_the_last_replica() -> None:
    model = Model(replicas=1)
    assert model.go(600.0, streams=0.2) == [1]


def test_replicas_stay_between_their_bounds() -> None:
    model = Model(replicas=2, min_replicas=2)
    assert model.go(300.0) == [2]
    assert model.go(10.0, streams=1e6) == [2, 8]


def test_a_replica_that_reports_nothing_yet_is_not_taken_for_idle() -> None:
    model = Model(replicas=4)
    assert model.go(600.0, streams=8.0, silent=3) == [4]
    assert model.go(31.0, streams=8.0) == [4, 1]


def test_replicas_that_report_nothing_start_no_others() -> None:
    assert Model(replicas=2).go(60.0, silent=2) == [2]


def test_a_model_that_was_woken_has_the_whole_delay_before_it() -> None:
    model = Model(replicas=1)
    model.go(200.0)
    assert model.replicas == 0
    model.now += 120.0  # Serve does not ask while a call waits at zero replicas.
    model.replicas = 1
    assert model.go(59.0) == [1]
    assert model.go(2.0) == [1, 0]


def test_requests_held_are_load_as_well() -> None:
    assert Model(replicas=1).go(10.0, streams=12.0, held=23.0) == [1, 4]
    assert Model(replicas=1).go(600.0, held=1.0) == [1]


def test_after_the_controllers_restart_nothing_goes_before_its_delay_is_over() -> None:
    model = Model(replicas=5)
    assert model.go(29.0, streams=3.0) == [5]


def test_none_is_started_while_one_that_sleeps_is_spare() -> None:
    model = Model(replicas=3)
    assert model.go(60.0, streams=35.0, spare=True) == [3]
    assert model.go(4.9, streams=35.0) == [3]
    assert model.go(1.0, streams=35.0) == [3, 4]


def test_replicas_that_sleep_go_as_idle_ones_do_and_stay_for_the_minimum() -> None:
    assert Model(replicas=4).go(31.0, streams=8.0, spare=True) == [4, 1]
    assert Model(replicas=4, min_replicas=3).go(600.0, streams=8.0, spare=True) == [4, 3]
    model = Model(replicas=1, schedule=[WARM])
    assert model.go(1801.0, streams=8.0, spare=True) == [1, 3]


WARM = Hours((0, 1, 2, 3, 4), 12 * 60 + 30, 13 * 60, "UTC", 3)


def test_a_schedule_brings_replicas_on_time_and_they_go_by_load_afterwards() -> None:
    model = Model(replicas=0, schedule=[WARM])
    assert model.go(1799.0) == [0]
    assert model.go(2.0) == [0, 3]
    assert model.go(1798.0) == [3]
    assert model.go(3.0) == [3, 1, 0]


def test_a_schedule_never_goes_above_the_most_replicas() -> None:
    assert limits(max_replicas=2, schedule=[WARM]).least(NOON + 1900) == 2


def test_of_several_hours_the_most_replicas_count() -> None:
    both = limits(schedule=[WARM, WARM._replace(min_replicas=5), WARM._replace(days=(6,), min_replicas=7)])
    assert both.least(NOON + 1900) == 5


class Step(NamedTuple):
    seconds: float
    streams: float
    silent: int
    held: float


steps = st.lists(
    st.builds(Step, st.floats(0.1, 90.0), st.floats(0, 120), st.integers(0, 3), st.sampled_from([0.0, 0.0, 1.0, 50.0])),
    max_size=12,
)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(steps, st.integers(0, 8), st.integers(0, 3), st.booleans())
def test_whatever_comes_the_rules_hold(course: list[Step], start: int, fewest: int, warm: bool) -> None:
    given = limits(min_replicas=fewest, schedule=[WARM] if warm else [])
    model = Model(replicas=start, min_replicas=fewest, schedule=given.schedule)
    needed: list[tuple[float, int]] = []
    for step in course:
        for _ in range(round(step.seconds / TICK_S)):
            before = model.replicas
            model.go(TICK_S, step.streams, silent=step.silent, held=step.held)
            after, now = model.replicas, model.now
            needed.append((now, -(-(step.streams + step.held) // 10)))
            least = given.least(now)
            assert least <= after <= given.max_replicas
            if after > max(before, least):
                recent = [count for when, count in needed if now - 5.0 + 1e-3 <= when]
                assert after <= max(least, min(recent))
            if after < before and after < given.max_replicas:
                recent = [count for when, count in needed if now - 30.0 + 1e-3 <= when]
                assert after >= min(before, max(recent, default=0)) or before > given.max_replicas
                assert after > 0 or before == 1


class Serve:
    """Serve's control loop around the policy, as `ray.serve` wraps it, with replicas that start at once."""

    def __init__(self, **given: Any) -> None:
        options = EngineOptions(kind="sim", autoscaling=AutoscalingOptions(**given))
        self.config = autoscaling_config(options)
        kwargs = self.config.policy.policy_kwargs
        self.policy: Any = _apply_autoscaling_config(self.config.policy.get_policy()(**kwargs))
        self.now = NOON
        self.state: dict[str, Any] = {}
        self.target = self.config.min_replicas
        self.running: list[str] = []
        self.skew_s = 0.0
        """How much the replicas' clocks differ from the controller's."""

    def tick(self, streams: dict[str, float | None] | None = None, held: float = 0.0) -> int:
        """One turn: `streams` in each replica, None for one that does not report; gives the new target."""
        self.now += TICK_S
        reports = {"running": {}, "waiting": {}} if streams else {}
        for replica, count in (streams or {}).items():
            if count is not None:
                sample = SimpleNamespace(timestamp=self.now + self.skew_s, value=count / 2)
                reports["running"][replica] = reports["waiting"][replica] = [sample]
        decided, self.state = self.policy(self.context(reports, held))
        self.target = max(self.config.min_replicas, min(self.config.max_replicas, decided))
        return self.target

    def context(self, reports: dict[str, Any], held: float) -> AutoscalingContext:
        names: Any = self.running
        return AutoscalingContext(
            **self.version_specific(),
            deployment_id=None,  # type: ignore[arg-type]
            deployment_name="engine",
            app_name="kvlane-sim",
            current_num_replicas=len(self.running),
            target_num_replicas=self.target,
            running_replicas=names,
            total_num_requests=held,
            total_queued_requests=held,
            aggregated_metrics=None,
            raw_metrics=reports,
            capacity_adjusted_min_replicas=self.config.min_replicas,
            capacity_adjusted_max_replicas=self.config.max_replicas,
            policy_state=self.state,
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=self.now,
            config=self.config,
        )

    @staticmethod
    def version_specific() -> dict[str, Any]:
        """Older versions have one argument more."""
        return {}


def serve(**given: Any) -> Serve:
    fast = {"upscale_delay_s": 0.0, "downscale_delay_s": 0.0, "downscale_to_zero_delay_s": 0.0, "target_streams": 10.0}
    return Serve(**(fast | {"min_replicas": 0, "max_replicas": 8} | given))


@pytest.mark.parametrize("wake", [1, 2, 3, 8])
@pytest.mark.parametrize("running", [1, 2, 5])
def test_serve_carries_out_each_decision_whatever_its_factor_for_waking(wake: int, running: int) -> None:
    for wanted in range(1, 9):
        controller = serve(wake_replicas=wake, max_replicas=8)
        controller.running, controller.target = [str(each) for each in range(running)], running
        load = dict.fromkeys(controller.running, wanted * 9.0 / running)
        assert controller.tick(load) == wanted


@pytest.mark.parametrize("wake", [1, 3])
def test_serve_starts_from_zero_as_many_as_shall_be_woken(wake: int) -> None:
    controller = serve(wake_replicas=wake)
    assert controller.tick() == 0
    assert controller.tick(held=200.0) == wake


def test_serve_takes_the_last_replica_away_and_no_other_with_it() -> None:
    controller = serve()
    controller.running, controller.target = ["a", "b"], 2
    assert controller.tick({"a": 0.0, "b": 0.0}) == 1
    controller.running = ["a"]
    assert controller.tick({"a": 0.0}) == 0


def test_reports_that_stop_coming_are_no_empty_load() -> None:
    controller = serve(downscale_delay_s=1.0)
    controller.running, controller.target, controller.skew_s = ["a", "b"], 2, -3600.0
    for _ in range(20):
        assert controller.tick({"a": 5.0, "b": 9.0}) == 2
    frozen = controller.context({"running": {}, "waiting": {}}, 0.0).raw_metrics
    sample = [SimpleNamespace(timestamp=NOON, value=0.0)]
    frozen["running"] = {"a": sample, "b": sample}
    started = controller.now
    while controller.now < started + 2 * STALE_S:
        controller.now += TICK_S
        decided, controller.state = controller.policy(controller.context(frozen, 0.0))
        if controller.now > started + STALE_S + 1.0:
            controller.target = 2
            assert decided == 2


def test_clocks_that_differ_between_hosts_do_not_matter() -> None:
    for skew in (-7200.0, 7200.0):
        controller = serve()
        controller.running, controller.target, controller.skew_s = ["a"], 1, skew
        assert controller.tick({"a": 35.0}) == 4


def test_a_policy_that_fails_changes_nothing_and_serve_goes_on() -> None:
    policy = Autoscaler(**limits()._replace(schedule=())._asdict())
    context = SimpleNamespace(app_name="a", target_num_replicas=3, current_num_replicas=3)
    assert policy(context) == (3, {})


def test_the_policy_needs_nothing_but_the_standard_library_on_the_controllers_host() -> None:
    tree = ast.parse(Path(autoscaling.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {str(name).split(".")[0] for name in imported} <= set(sys.stdlib_module_names)


def test_the_target_is_half_a_full_batch_unless_the_options_say() -> None:
    batch, model = 40.0, Model(replicas=1, target_streams=0.0)
    for _ in range(60):
        model.now += TICK_S
        model.replicas = model.scaling.decide(model.now, model.replicas, Seen(50.0, 0, 0.0, batch))
    assert model.replicas == 3
    # None tells any more: what the last one told still counts.
    assert model.go(6.0, streams=70.0) == [3, 4]
    assert Model(replicas=1, target_streams=0.0).go(60.0, streams=129.0) == [1, 2]


def test_what_a_replica_runs_at_once_is_taken_from_its_reports() -> None:
    controller = serve(target_streams=0.0)
    controller.running, controller.target = ["a"], 1
    sample = {name: {"a": [SimpleNamespace(timestamp=1.0, value=8.0)]} for name in ("running", "waiting", "batch")}
    decided, _ = controller.policy(controller.context(sample, 0.0))
    assert decided == 4


@pytest.mark.parametrize(
    ("streams", "asleep", "wanted"),
    [
        (39.0, 0.0, 4),
        (39.0, 1.0, 2),  # The one that is awake has room for one more.
        (40.0, 1.0, 4),  # Its batch is full: who sleeps is being woken, and that is not enough.
        (15.0, 1.0, 2),
    ],
)
def test_a_replica_that_sleeps_is_woken_before_another_is_started(streams: float, asleep: float, wanted: int) -> None:
    controller = serve()
    controller.running, controller.target = ["a", "b"], 2
    told = {"running": (streams, 0.0), "waiting": (0.0, 0.0), "batch": (40.0, 40.0), "asleep": (0.0, asleep)}
    reports = {
        name: {each: [SimpleNamespace(timestamp=1.0, value=value)] for each, value in zip("ab", values, strict=True)}
        for name, values in told.items()
    }
    decided, _ = controller.policy(controller.context(reports, 0.0))
    assert decided == wanted


def test_options_that_cannot_be_are_refused_before_serve_sees_them() -> None:
    wrong = AutoscalingOptions(max_replicas=1, schedule=(HoursOptions(start="7", end="8", min_replicas=1),))
    with pytest.raises(ConfigError, match="from: expected a time"):
        autoscaling_config(EngineOptions(autoscaling=wrong))
    with pytest.raises(ConfigError, match="max_replicas"):
        autoscaling_config(EngineOptions(autoscaling=AutoscalingOptions(max_replicas=1, min_replicas=2)))


def test_the_schedule_reaches_the_policy() -> None:
    hours = HoursOptions(days="mon", start="12:00", end="13:00", min_replicas=3)
    controller = serve(schedule=(hours,))
    assert controller.tick() == 3
    assert msgspec.json.encode(controller.config.policy.policy_kwargs)


def test_what_routers_hold_is_counted_once_for_each_router() -> None:
    controller = serve(max_replicas=100)
    controller.running, controller.target = ["a", "b"], 2
    streams, reports = [SimpleNamespace(timestamp=1.0, value=10.0)], {}
    old = SimpleNamespace(timestamp=0.5, value=500.0)
    reports["running"] = {"a": streams, "b": streams}
    reports["waiting"] = {"a": [SimpleNamespace(timestamp=1.0, value=0.0)]}
    reports["held/one"] = {
        "a": [old, SimpleNamespace(timestamp=1.0, value=70.0)],
        "b": [SimpleNamespace(timestamp=1.0, value=90.0)],
    }
    reports["held/two"] = {"b": [SimpleNamespace(timestamp=1.0, value=30.0)]}
    reports["held/gone"] = {"a": [old]}
    decided, _ = controller.policy(controller.context(reports, 0.0))
    assert decided == (10 + 10 + 90 + 30) / 10


def test_a_call_that_no_replica_has_heard_keeps_the_last_one() -> None:
    controller = serve()
    controller.running, controller.target = ["a"], 1
    assert controller.tick({"a": 0.0}, held=1.0) == 1
    assert controller.tick({"a": 0.0}) == 0


def test_a_replica_forgets_what_a_router_does_not_repeat() -> None:
    held = HeldInRouters()
    held.tell("one", 5, 0.0)
    held.tell("two", 7, 2.0)
    held.tell("", 9, 2.0)
    assert held.stats(2.5) == {"held/one": 5.0, "held/two": 7.0}
    held.tell("two", 0, 3.0)
    assert held.stats(4.0) == {"held/two": 0.0}
    assert held.stats(60.0) == {}
