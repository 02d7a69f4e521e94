"""What an engine's autoscaling asks of Ray Serve: its configuration, with `engine.autoscaling` as the policy."""

from __future__ import annotations

import warnings
from typing import Any, Final

from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from engine.autoscaling import FULL_BATCH
from router import schedule
from router.errors import ConfigError
from router.options import AutoscalingOptions, EngineOptions

POLICY: Final = "engine.autoscaling:Autoscaler"
REPORT_INTERVAL_S: Final = 1.0
"""How often each replica reports to Serve's controller. One call a second costs both about 1 ms of CPU; Serve's own
10 s would be added to every decision."""
LOOK_BACK_S: Final = 5.0
"""What a report holds: samples of the last few seconds."""


def autoscaling_config(options: EngineOptions) -> AutoscalingConfig:
    """Serve's autoscaling of this engine, which has some. Raises `ConfigError` for what contradicts itself.

    Delays and bounds are the policy's own; Serve's are set so that it carries out each decision at once.
    """
    given = options.autoscaling
    assert given is not None
    try:
        policy = AutoscalingPolicy(policy_function=POLICY, policy_kwargs=_limits(given))
        with warnings.catch_warnings():
            # Ray says that environment variables will replace the interval, and heeds none so far.
            warnings.simplefilter("ignore", DeprecationWarning)
            return AutoscalingConfig(
                min_replicas=given.min_replicas,
                max_replicas=given.max_replicas,
                target_ongoing_requests=given.target_streams or FULL_BATCH / 2,  # For Serve's own metric alone.
                metrics_interval_s=REPORT_INTERVAL_S,
                look_back_period_s=LOOK_BACK_S,
                upscaling_factor=given.wake_replicas,
                downscaling_factor=1.0,
                upscale_delay_s=0.0,
                downscale_delay_s=0.0,
                downscale_to_zero_delay_s=0.0,
                policy=policy,
            )
    except ValueError as error:
        raise ConfigError(f"engine {options.name!r}: {error}", param="autoscaling") from error


def _limits(given: AutoscalingOptions) -> dict[str, Any]:
    hours = [schedule.parse(each) for each in given.schedule]
    return {
        "min_replicas": given.min_replicas,
        "max_replicas": given.max_replicas,
        "target_streams": given.target_streams,
        "wake_replicas": given.wake_replicas,
        "upscale_delay_s": given.upscale_delay_s,
        "downscale_delay_s": given.downscale_delay_s,
        "downscale_to_zero_delay_s": given.downscale_to_zero_delay_s,
        "schedule": [[list(each.days), each.start, each.end, each.timezone, each.min_replicas] for each in hours],
    }
