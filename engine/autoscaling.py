"""How many replicas a model shall have: the policy that Ray Serve's controller asks, ten times a second.

Streams come by lanes, which Serve cannot see, so each replica reports what it runs and has waiting, for all routers
together, and what routers told it that they hold (`EngineReplica.record_autoscaling_stats`). Rule: what is not known is
no reason to take replicas away. `Scaling` decides, without a clock; `Autoscaler` is what Serve calls.

Serve takes this module to its controller by value, so it imports the standard library alone: the controller's host
needs no kvlane.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import datetime
from math import ceil, inf
from typing import Any, Final, NamedTuple
from zoneinfo import ZoneInfo

STALE_S: Final = 5.0
"""Silence after which a replica's last report counts no longer; five reports."""
SLACK: Final = 0.9
"""Replicas are taken away only where the rest would be filled up to this share, so that the next stream adds none."""
FULL_BATCH: Final = 256.0
"""What a replica runs at once, until one tells; vLLM's default on most GPUs."""
ROUNDING: Final = 1e-9
"""What the sum of means may be too much: it shall not ask for one replica more."""
HELD: Final = "held/"
"""How the names of statistics begin that tell what a router holds; the router's follows."""
SERVE_LOG: Final = "ray.serve"
"""The controller's own, so that an operator finds decisions beside Serve's."""


class Hours(NamedTuple):
    """See `router.schedule.Hours`."""

    days: Sequence[int]
    start: int
    end: int
    timezone: str
    min_replicas: int

    def cover(self, now: float) -> bool:
        """Whether that time, in seconds since 1970, is one of these hours.

        The local clock decides: what a clock change skips is not missed, and what it repeats counts twice.
        """
        try:
            local = datetime.fromtimestamp(now, ZoneInfo(self.timezone))
        except (KeyError, ValueError, OSError):
            return True  # This host has no such time zone: replicas too many are better than too few.
        minute, day = local.hour * 60 + local.minute, local.weekday()
        if self.start < self.end:
            return day in self.days and self.start <= minute < self.end
        return (day in self.days and minute >= self.start) or ((day - 1) % 7 in self.days and minute < self.end)


class Limits(NamedTuple):
    """What `router.options.AutoscalingOptions` says."""

    min_replicas: int
    max_replicas: int
    target_streams: float
    """0: half of what a replica runs at once, as it reports."""
    wake_replicas: int
    upscale_delay_s: float
    downscale_delay_s: float
    downscale_to_zero_delay_s: float
    schedule: Sequence[Hours] = ()

    def least(self, now: float) -> int:
        """The replicas that there must be at that time."""
        warm = (hours.min_replicas for hours in self.schedule if hours.cover(now))
        return min(self.max_replicas, max(self.min_replicas, *warm, 0))


class Seen(NamedTuple):
    """What is known of a model at one moment."""

    streams: float
    """Running and waiting, of all replicas that report."""
    silent: int
    """Replicas that run and do not report: just started, or out of reach."""
    held: float
    """Requests that wait in routers, as far as they have told."""
    batch: float = 0.0
    """What a replica runs at once; 0 where none tells."""
    spare: bool = False
    """Some replica sleeps, and those who are awake have room in their batches for all that there is. Routers wake it
    when they have not, sooner than another one starts."""


class Trail:
    """The greatest of the values of the last `span_s` seconds, or the least of them."""

    def __init__(self, span_s: float, *, least: bool = False) -> None:
        self._span_s = span_s
        self._sign = -1 if least else 1
        self._since = inf
        self._values: deque[tuple[float, int]] = deque()

    def push(self, now: float, value: int) -> int | None:
        """Adds the value of this moment; gives the extreme, or None while the trail is shorter than its span."""
        self._since = min(self._since, now)
        values = self._values
        while values and self._sign * values[-1][1] <= self._sign * value:
            values.pop()
        values.append((now, value))
        while values[0][0] < now - self._span_s:
            values.popleft()
        return values[0][1] if now - self._since >= self._span_s else None


class Scaling:
    """Decides how many replicas a model shall have; times in seconds since 1970."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._decided = -1
        self._batch = FULL_BATCH
        self._up = Trail(limits.upscale_delay_s, least=True)
        self._down = Trail(limits.downscale_delay_s)
        self._idle = Trail(limits.downscale_to_zero_delay_s)

    def decide(self, now: float, target: int, seen: Seen) -> int:
        """The replicas to aim for, where Serve aims for `target` now.

        More, once as many were too few for `upscale_delay_s`, as many as were needed all that time, and none that
        sleeps was spare. Less, once fewer were enough for `downscale_delay_s`, as few as were enough all that time. The
        last one goes after `downscale_to_zero_delay_s`, and never together with others.
        """
        low, high = self._needed(seen)
        if seen.spare:
            low = min(low, target)
        if target > self._decided >= 0:
            high = max(high, target)  # Serve was woken, or somebody deployed: from now on the delays count anew.
        up, down, idle = self._up.push(now, low), self._down.push(now, high), self._idle.push(now, high)
        if up is not None and up > target:
            wanted = up
        elif target > 1:
            wanted = target if down is None else max(1, min(target, down))
        else:
            wanted = 0 if idle == 0 else target
        limits = self._limits
        self._decided = max(limits.least(now), min(limits.max_replicas, wanted))
        return self._decided

    def _needed(self, seen: Seen) -> tuple[int, int]:
        """The replicas that are needed at least, and those that are enough, whatever the silent ones do."""
        self._batch = seen.batch or self._batch
        room = self._limits.target_streams or max(1.0, self._batch / 2)
        least = seen.streams + seen.held
        most = least + seen.silent * room
        return ceil(least / room - ROUNDING), ceil(most / (room * SLACK) - ROUNDING)


class Autoscaler:
    """What Serve makes once per deployment and calls in each turn of its control loop."""

    def __init__(self, schedule: Sequence[Sequence[Any]] = (), **limits: Any) -> None:
        """The fields of `Limits`, each of the hours as the list of its fields."""
        self._limits = Limits(schedule=[Hours(*hours) for hours in schedule], **limits)
        self._scaling = Scaling(self._limits)
        self._reports = Reports()
        self._faulty = False

    def __call__(self, ctx: Any) -> tuple[float, dict[str, Any]]:
        """Takes Serve's `AutoscalingContext`. Never raises: that would end Serve's control loop for this turn."""
        try:
            decided = self._decide(ctx)
            self._faulty = False
        except Exception:
            if not self._faulty:
                logging.getLogger(SERVE_LOG).exception("%s: the number of replicas stays as it is", ctx.app_name)
            self._faulty = True
            decided = ctx.target_num_replicas
        return self._for_serve(decided, ctx.current_num_replicas), {}

    def _decide(self, ctx: Any) -> int:
        now, target = ctx.current_time, ctx.target_num_replicas
        seen = self._reports.read(now, ctx.running_replicas, ctx.raw_metrics)
        if ctx.total_queued_requests:
            seen = seen._replace(held=max(1.0, seen.held))  # A router calls, and no replica has heard it yet.
        decided = self._scaling.decide(now, target, seen)
        if decided != target:
            logging.getLogger(SERVE_LOG).info(
                "%s: %d replicas instead of %d: %.1f streams in %d replicas, %d of them silent, %.1f requests held",
                *(ctx.app_name, decided, target, seen.streams, len(ctx.running_replicas), seen.silent, seen.held),
            )
        return decided

    def _for_serve(self, decided: int, running: int) -> float:
        """The answer of which Serve makes `decided`.

        Serve starts as many replicas from zero as its factor for upscaling says, without asking a policy, and that is
        where `wake_replicas` stands. It multiplies what is to be added to running replicas with it as well.
        """
        if decided <= running or running == 0:
            return decided
        return running + (decided - running - 0.5) / self._limits.wake_replicas


class Reports:
    """What the replicas reported last. Their clocks may differ from the controller's, which alone is used."""

    def __init__(self) -> None:
        self._heard: dict[Any, tuple[float, float]] = {}
        """The time stamp of each one's last sample, and when it came."""

    def read(self, now: float, replicas: Sequence[Any], metrics: Mapping[str, Mapping[Any, Any]]) -> Seen:
        """What the replicas that run tell. `metrics`: the samples by name and replica."""
        heard: dict[Any, tuple[float, float]] = {}
        for replica in replicas:
            if samples := metrics.get("running", {}).get(replica):
                stamp = samples[-1].timestamp
                last = self._heard.get(replica, (stamp, now))
                heard[replica] = last if last[0] == stamp else (stamp, now)
        self._heard = heard
        speaking = {replica: stamp for replica, (stamp, when) in heard.items() if now - when <= STALE_S}
        streams = sum(_mean(metrics[name].get(each, ())) for name in ("running", "waiting") for each in speaking)
        held = sum(_held(metrics[name], speaking) for name in metrics if name.startswith(HELD))
        batches = [_mean(samples) for each in speaking if (samples := metrics.get("batch", {}).get(each))]
        batch = sum(batches) / len(batches) if batches else 0.0
        asleep = sum(samples[-1].value > 0 for each in speaking if (samples := metrics.get("asleep", {}).get(each)))
        spare = asleep > 0 and streams + held < batch * (len(speaking) - asleep)
        return Seen(streams, len(replicas) - len(speaking), held, batch, spare)


def _held(samples: Mapping[Any, Any], speaking: Mapping[Any, float]) -> float:
    """What one router holds. It tells one replica at a time, so several may remember it: the most of it counts.

    A replica to which it has told nothing lately has left it out of its last sample.
    """
    last = [(samples[each][-1], stamp) for each, stamp in speaking.items() if samples.get(each)]
    return max((float(sample.value) for sample, stamp in last if sample.timestamp == stamp), default=0.0)


def _mean(samples: Sequence[Any]) -> float:
    """Of the last few seconds, so that one sample alone decides nothing."""
    return sum(sample.value for sample in samples) / len(samples) if samples else 0.0
