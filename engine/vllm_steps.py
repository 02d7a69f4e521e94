"""What an engine's last step said of itself, as vLLM tells it to its statistics loggers.

Rule: nothing is kept but the last step; with several engine cores, each one's last step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from engine.vllm_cache import VllmCache


class Steps:
    """One engine's."""

    def __init__(self, cache: VllmCache) -> None:
        self._cache = cache
        self.running = 0
        self.kv_usage = 0.0
        self.step_ms = 0.0
        self.listeners: list[Callable[[], None]] = []
        self._cores: dict[int, Any] = {}
        self._last = 0.0

    def logger_factory(self) -> Callable[[Any, int], Any]:
        """For `AsyncLLM`'s `stat_loggers`."""
        from vllm.v1.metrics.loggers import StatLoggerBase

        record = self._record

        class StepLogger(StatLoggerBase):  # type: ignore[misc]
            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
                pass

            def record(
                self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
            ) -> None:
                record(scheduler_stats, iteration_stats, engine_idx)

            def log_engine_initialized(self) -> None:
                pass

        return StepLogger

    def _record(self, stats: Any, iteration: Any, core: int) -> None:
        if stats is not None:
            self._cores[core] = stats
            self.running = sum(each.num_running_reqs for each in self._cores.values())
            self.kv_usage = sum(each.kv_cache_usage for each in self._cores.values()) / len(self._cores)
        if self._cache.stepped(stats, iteration):
            # The first step after a pause began when its first request came.
            now = time.perf_counter()
            self.step_ms = (now - max(self._last, self._cache.busy_since)) * 1e3
            self._last = now
        self.tell()

    def tell(self, _: object = None) -> None:
        """Calls the listeners."""
        for listener in self.listeners:
            listener()
