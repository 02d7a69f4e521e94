"""A vLLM engine under one replica: `AsyncLLM` in this process, its engine core in a child process.

HTTP streams run through vLLM's own OpenAI application (`engine.vllm_http`), gRPC streams straight on `AsyncLLM`
(`engine.vllm_grpc`). Rule: this module owns the engine's life and the count of its streams, and nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import multiprocessing
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, Final

from engine.base import Abort, StreamOut
from engine.cache_report import CacheFeed
from engine.vllm_args import forget_environment, keep_environment, prepare_cpu, serve_namespace
from engine.vllm_cache import VllmCache
from engine.vllm_direct import DirectStreams, bodies_stay
from engine.vllm_errors import FAILED
from engine.vllm_grpc import GrpcStreams
from engine.vllm_http import HttpStream
from engine.vllm_log import keep_levels, shorten_tracebacks
from engine.vllm_rendering import show_outputs, show_streams
from engine.vllm_sockets import EngineSockets
from engine.vllm_steps import Steps
from router.errors import ConfigError, KvlaneError, ReplicaFailed, ReplicaLost
from router.lane.frames import Submit
from router.types import EngineInfo, Load, ModelCard, RouteInfo, Rpc

_CLOSE_GRACE_S: Final = 5.0
"""How long aborted streams may take to end before their tasks are cancelled."""
_WATCH_S: Final = 0.25
"""How often to look whether the engine lives; vLLM tells nobody that it died."""

_log = logging.getLogger(__name__)


class VllmEngine:
    """One model on vLLM. `args` are vLLM's engine and server arguments by name; see `engine.vllm_args`.

    `fast_rendering` has plain text streams rendered here where vLLM allows it (`engine.vllm_rendering`).
    """

    def __init__(
        self, model: str, served_model_name: str, args: dict[str, Any], *, fast_rendering: bool = True
    ) -> None:
        self._model = model
        self._served_model_name = served_model_name
        self._args = args
        self._fast = fast_rendering
        self._direct: DirectStreams | None = None
        self._engine: Any = None
        self._app: Any = None
        self._grpc: GrpcStreams | None = None
        self._info: EngineInfo | None = None
        self._cache = VllmCache()
        self._steps = Steps(self._cache)
        self._active: set[_Stream] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._watch: asyncio.Task[None] | None = None
        self._death_told = False
        self._sleep_level = 1
        self._cores: list[multiprocessing.process.BaseProcess] = []
        self._sockets = EngineSockets()
        self._closing = AsyncExitStack()

    async def start(self) -> None:
        """Loads the model; the event loop stays free meanwhile. Raises `ConfigError` for what vLLM refuses."""
        keep_levels()
        try:
            namespace = await asyncio.to_thread(self._namespace)
            self._engine = await _finish_or_undo(
                asyncio.create_task(asyncio.to_thread(self._launch, namespace)), self._sockets
            )
            await self._start_app(namespace)
            self._watch = asyncio.create_task(self._watch_for_death())
        except BaseException:
            await self.close()
            raise

    def info(self) -> EngineInfo:
        """What the engine serves; valid after `start`."""
        if self._info is None:
            raise ReplicaFailed("the engine has not started")
        return self._info

    def load(self) -> Load:
        """The load now.

        `running` is the batch of the last step, less what ended or was aborted since; `waiting` is all the rest of
        the streams taken and not ended, so it holds those still in the tokenizer too, and a stream of `n` choices
        counts `n` times once the engine has it. `step_ms` is from one step's end to the next's, or
        from the arrival of the first request. How exact the rest is
        says `engine.vllm_work`. All zero when the engine is dead.
        """
        work = self._cache.work
        if self._lost() or work is None:
            return Load()
        unfinished = self._engine.get_num_unfinished_requests()
        running = min(self._steps.running, unfinished)
        tokens, pairs = self._cache.queued()
        return Load(
            running=running,
            waiting=max(len(self._active), unfinished) - running,
            queued_prefill_tokens=tokens,
            kv_usage=self._steps.kv_usage,
            step_ms=self._steps.step_ms,
            queued_prefill_pairs=pairs,
            step_prefill_tokens=work.step_prefill_tokens,
            step_prefill_pairs=work.step_prefill_pairs,
            step_decodes=work.step_decodes,
            step_context_tokens=work.step_context_tokens,
        )

    def cache(self) -> CacheFeed | None:
        """What is known of the KV cache; None before `start` is done."""
        return self._cache.feed

    def on_step(self, listener: Callable[[], None]) -> None:
        """Calls `listener` after each engine step, when an aborted stream has left the engine, and when the engine is
        found dead. Of a step's output, plain text is written by then; what vLLM's server renders comes later.
        """
        self._steps.listeners.append(listener)

    def submit(self, call: Submit, out: StreamOut) -> Abort:
        """Takes a stream; returns at once. The abort takes the stream out of the counts at once."""
        if self._grpc is None:
            out.fail(ReplicaFailed("the engine is not running"))
            return _nothing
        if self._lost():
            out.fail(ReplicaLost("the engine died"))
            return _nothing
        stream = _Stream(out, self._active)
        if call.rpc == Rpc.HTTP:
            http = HttpStream(self._app, call, stream, self._lost, self._direct)
            task = asyncio.create_task(http.run())
            stream.stop = http.disconnect
        else:
            task = asyncio.create_task(self._grpc.run(call, stream))
            stream.stop = task.cancel
        self._tasks.add(task)
        task.add_done_callback(partial(self._ended, stream))

        def abort() -> None:
            if stream in self._active:
                self._active.discard(stream)
                stream.data = _dropped  # What the engine's next step brings may come before the task hears of it.
                # The engine may have no step left that would tell of the lower load.
                task.add_done_callback(self._steps.tell)
                stream.stop()

        return abort

    def dead(self) -> bool:
        """Whether the engine has started and does not run any more: all that is asked of it fails from now on."""
        return self._info is not None and self._lost()

    async def check_health(self) -> None:
        """Raises `ReplicaFailed` when the engine is dead."""
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._engine is None:
            raise ReplicaFailed("the engine is not running")
        try:
            await self._engine.check_health()
        except EngineDeadError as error:
            raise ReplicaFailed("the engine died") from error

    async def sleep(self, level: int) -> None:
        """Empties the KV cache; on a GPU gives its memory and that of the weights back, which needs vLLM's argument
        `enable_sleep_mode`. On a CPU, where vLLM knows no such thing, the memory stays."""
        await self._engine.sleep(level)
        self._sleep_level = level
        self._cache.slept()

    async def wake(self) -> None:
        """After level 2 the weights are loaded again from where they came from at the start."""
        engine = self._engine
        if self._sleep_level == 2:
            await engine.wake_up(["weights"])
            await engine.collective_rpc("reload_weights")
            await engine.wake_up(["kv_cache"])
        else:
            await engine.wake_up()
        if await engine.is_sleeping():
            raise ReplicaFailed("vLLM goes on sleeping")

    async def close(self) -> None:
        """Fails all streams, then ends the engine and its processes. May be called more than once."""
        self._grpc = None
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
            self._watch = None
        for stream in tuple(self._active):
            stream.fail(ReplicaLost("the replica has shut down"))
            stream.stop()
        if self._tasks:
            await self._await_tasks()
        await self._closing.aclose()
        self._app = self._direct = None
        self._cache.close()
        if self._engine is not None:
            engine, self._engine = self._engine, None
            # On the loop's own thread: the engine's sockets and tasks belong to this loop.
            engine.shutdown()
            for core in self._cores:
                # A core that is slow to end gets killed, and vLLM does not wait for that.
                await asyncio.to_thread(core.join, _CLOSE_GRACE_S)
            self._sockets.remove()
            forget_environment()
            gc.unfreeze()  # The application froze all that start-up had made; the engine itself may go now.

    def _namespace(self) -> argparse.Namespace:
        from vllm.platforms import current_platform
        from vllm.reasoning import ReasoningParserManager
        from vllm.tool_parsers import ToolParserManager

        cpu: bool = current_platform.is_cpu()
        namespace = serve_namespace(self._model, self._served_model_name, self._args, cpu=cpu)
        if cpu:
            prepare_cpu(namespace)
        if namespace.tool_parser_plugin:
            ToolParserManager.import_tool_parser(namespace.tool_parser_plugin)
        if namespace.reasoning_parser_plugin:
            ReasoningParserManager.import_reasoning_parser(namespace.reasoning_parser_plugin)
        return namespace

    def _launch(self, namespace: argparse.Namespace) -> Any:
        """Starts the engine core's process and waits until it has loaded the model; tens of seconds."""
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs.from_cli_args(namespace)
        # As a server: the context decides vLLM's default batch size.
        context = UsageContext.OPENAI_API_SERVER
        try:
            config = arguments.create_engine_config(usage_context=context)
        except (ValueError, TypeError, OSError) as error:
            raise ConfigError(f"vLLM refuses its arguments: {' '.join(str(error).split())}") from error
        self._cache.configure(config)
        before = multiprocessing.active_children()
        with self._sockets.starting(config):
            engine = AsyncLLM.from_vllm_config(
                vllm_config=config,
                usage_context=context,
                stat_loggers=[self._steps.logger_factory()],
                enable_log_requests=arguments.enable_log_requests,
                aggregate_engine_logging=arguments.aggregate_engine_logging,
                disable_log_stats=arguments.disable_log_stats,
            )
        self._cores = [child for child in multiprocessing.active_children() if child not in before]
        return engine

    async def _start_app(self, namespace: argparse.Namespace) -> None:
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        shorten_tracebacks()
        await self._engine.reset_mm_cache()  # As the server: drops the dummy data of the profile run.
        tasks = await self._engine.get_supported_tasks()
        self._app = build_app(namespace, tasks, self._engine.model_config)
        state = self._app.state
        state.server = _Server()
        await init_app_state(self._engine, state, namespace, tasks)
        # Logs the engine's statistics now and then, and takes the start-up's objects out of garbage collection.
        await self._closing.enter_async_context(self._app.router.lifespan_context(self._app))
        await self._cache.follow(self._engine, state)
        if self._fast and show_outputs(self._engine) and bodies_stay(self._app) and show_streams(state):
            self._direct = DirectStreams(self._app)
        keep_environment()
        self._info = _info(self._engine, self._app)
        self._grpc = GrpcStreams(self._engine, state, self._lost)

    def _lost(self) -> bool:
        return self._engine is None or bool(self._engine.errored)

    async def _watch_for_death(self) -> None:
        while not self._lost():
            await asyncio.sleep(_WATCH_S)
        self._tell_of_death()

    def _tell_of_death(self) -> None:
        if not self._death_told:
            self._death_told = True
            _log.error("the engine died")
            self._steps.tell()

    def _ended(self, stream: _Stream, task: asyncio.Task[None]) -> None:
        """A stream's task is over: whatever became of the task, the stream has its end."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a stream's task failed", exc_info=error)
        if self._watch is not None and self._lost():
            self._tell_of_death()
        if stream in self._active:
            stream.fail(ReplicaLost("the engine died") if self._lost() else ReplicaFailed(FAILED))

    async def _await_tasks(self) -> None:
        _, late = await asyncio.wait(self._tasks, timeout=_CLOSE_GRACE_S)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=_CLOSE_GRACE_S)


class _Stream:
    """A `StreamOut` that is in the set of active ones until it ends; what comes per token goes straight through."""

    __slots__ = ("_active", "_out", "data", "head", "stop")

    def __init__(self, out: StreamOut, active: set[_Stream]) -> None:
        self.head = out.head
        self.data = out.data
        self.stop: Callable[[], object] = _nothing
        self._out = out
        self._active = active
        active.add(self)

    def end(self, finish: str = "") -> None:
        self._active.discard(self)
        self._out.end(finish)

    def fail(self, error: KvlaneError) -> None:
        self._active.discard(self)
        self._out.fail(error)


class _Server:
    """Stands in for uvicorn in the application's state: its error handler asks the server to exit when the engine dies.

    Nothing to do here: `check_health` tells Ray Serve, which replaces the replica.
    """

    should_exit = False


async def _finish_or_undo(launch: asyncio.Task[Any], sockets: EngineSockets) -> Any:
    """The launched engine. A thread cannot be cancelled: if this is, the engine is shut down as soon as it is up."""
    try:
        return await asyncio.shield(launch)
    except asyncio.CancelledError:
        launch.add_done_callback(partial(_undo, sockets))
        raise


def _undo(sockets: EngineSockets, launch: asyncio.Task[Any]) -> None:
    if not launch.cancelled() and launch.exception() is None:
        launch.result().shutdown()
        sockets.remove()


def _info(engine: Any, app: Any) -> EngineInfo:
    import vllm

    config = engine.vllm_config
    served = app.state.openai_serving_models
    length = config.model_config.max_model_len
    bases = tuple(ModelCard(path.name, max_model_len=length) for path in served.base_model_paths)
    adapters = tuple(ModelCard(name, bases[0].name, length) for name in served.lora_requests)
    routes = [route for route in app.routes if getattr(route, "methods", None)]
    return EngineInfo(
        kind="vllm",
        models=bases + adapters,
        routes=tuple(RouteInfo(route.path, tuple(sorted(route.methods))) for route in routes),
        max_num_seqs=config.scheduler_config.max_num_seqs * config.parallel_config.data_parallel_size,
        kv_blocks=config.cache_config.num_gpu_blocks or 0,
        kv_block_tokens=config.cache_config.block_size,
        prefix_caching=bool(config.cache_config.enable_prefix_caching),
        version=vllm.__version__,
    )


def _dropped(payload: bytes, tokens: int = 0, *, urgent: bool = False) -> None:
    """Output that nobody waits for any more."""


def _nothing() -> None:
    pass
