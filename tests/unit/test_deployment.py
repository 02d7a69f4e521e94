"""What an engine's options ask of Ray Serve."""

from __future__ import annotations

from typing import Any

import pytest

from engine import deployment
from engine.simulated import SimulatedEngine
from router.errors import ConfigError
from router.options import AutoscalingOptions, EngineOptions


def test_a_replica_without_tensor_parallelism_holds_its_resources_itself() -> None:
    options = EngineOptions(num_cpus=2, num_gpus=1, env={"A": "1"})
    assert deployment.resources(options) == {
        "ray_actor_options": {"runtime_env": {"env_vars": {"A": "1"}}, "num_cpus": 2, "num_gpus": 1}
    }
    assert deployment.engine_args(options) == {}


def test_gpu_workers_get_a_bundle_each_behind_the_replicas_own() -> None:
    options = EngineOptions(num_cpus=2, num_gpus=1, tensor_parallel_size=4)
    assert deployment.resources(options) == {
        "ray_actor_options": {"runtime_env": {"env_vars": {}}, "num_cpus": 2},
        "placement_group_bundles": [{"CPU": 2}, {"GPU": 1}, {"GPU": 1}, {"GPU": 1}, {"GPU": 1}],
        "placement_group_strategy": "PACK",
    }
    assert deployment.engine_args(options) == {"tensor_parallel_size": 4, "distributed_executor_backend": "ray"}


def test_a_replica_that_asks_for_no_cpu_shares_the_first_workers_bundle() -> None:
    options = EngineOptions(num_cpus=0, num_gpus=1, tensor_parallel_size=2)
    assert deployment.resources(options)["placement_group_bundles"] == [{"GPU": 1}, {"GPU": 1}]


def test_workers_with_a_part_of_a_gpu_tell_vllm_so() -> None:
    actor = deployment.resources(EngineOptions(num_gpus=0.5, tensor_parallel_size=2))["ray_actor_options"]
    assert actor["runtime_env"]["env_vars"] == {"VLLM_RAY_PER_WORKER_GPUS": "0.5"}


def test_cpu_workers_are_processes_of_the_replicas_node() -> None:
    options = EngineOptions(num_cpus=2, tensor_parallel_size=2)
    assert deployment.resources(options)["ray_actor_options"]["num_cpus"] == 4
    assert "placement_group_bundles" not in deployment.resources(options)
    assert deployment.engine_args(options) == {"tensor_parallel_size": 2}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"args": {"tensor_parallel_size": 2}}, "beside args"),
        ({"args": {"tensor_parallel_size": 2}, "tensor_parallel_size": 4}, "beside args"),
        ({"kind": "sim", "tensor_parallel_size": 2}, "only the engine vllm"),
        ({"sleep_after_s": 60.0, "num_gpus": 1, "args": {"enable_sleep_mode": False}}, "which args turn off"),
    ],
)
def test_arguments_that_contradict_the_resources_are_refused(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        deployment.build_application(EngineOptions(**given), namespace="kvlane")


@pytest.mark.parametrize(("served", "name"), [("", "tiny"), ("my-model", "my-model")])
async def test_the_engine_answers_to_its_served_name(served: str, name: str) -> None:
    engine = deployment.make_engine(EngineOptions(kind="sim", served_model_name=served))
    assert isinstance(engine, SimulatedEngine)
    await engine.start()
    assert [card.name for card in engine.info().models] == [name]
    await engine.close()


def version(options: EngineOptions, *, anew: bool = False) -> str:
    """What Serve compares to tell whether replicas must be replaced."""
    application = deployment.build_application(options, namespace="kvlane", anew=anew)
    return str(application._bound_deployment.version)


@pytest.mark.parametrize(
    "change",
    [
        {"replicas": 3},
        {"autoscaling": AutoscalingOptions(max_replicas=4)},
        {"surge": "never"},
        {"required": False},
        {"health_check_period_s": 9.0},
    ],
)
def test_a_change_that_is_not_of_the_replicas_leaves_them_alone(change: dict[str, Any]) -> None:
    assert version(EngineOptions(kind="sim", **change)) == version(EngineOptions(kind="sim"))


@pytest.mark.parametrize("change", [{"args": {"seed": 1}}, {"env": {"A": "1"}}, {"drain_timeout_s": 9.0}])
def test_a_change_of_what_replicas_are_made_of_replaces_them(change: dict[str, Any]) -> None:
    assert version(EngineOptions(kind="sim", **change)) != version(EngineOptions(kind="sim"))
    other = deployment.build_application(EngineOptions(kind="sim"), namespace="other")
    assert other._bound_deployment.version != version(EngineOptions(kind="sim"))


def test_what_failed_is_tried_again_though_nothing_has_changed() -> None:
    options = EngineOptions(kind="sim")
    assert len({version(options), version(options, anew=True), version(options, anew=True)}) == 3


def test_engines_that_shall_sleep_on_a_gpu_are_told_at_their_start() -> None:
    on_gpu = EngineOptions(num_gpus=1, sleep_after_s=60.0)
    assert deployment.engine_args(on_gpu) == {"enable_sleep_mode": True}
    assert deployment.engine_args(EngineOptions(num_gpus=1)) == {}
    assert deployment.engine_args(EngineOptions(sleep_after_s=60.0)) == {}  # vLLM's CPU build refuses the argument.
    assert deployment.engine_args(EngineOptions(kind="sim", sleep_after_s=60.0)) == {}
