"""`kvlane up` and `kvlane deploy`: Ray, engine replicas and router on one machine, with a demo.

Job: bring everything up with visible progress, show two streamed answers, and take down exactly what it brought up.
Rule: what it found running (a Ray cluster, a Serve instance, an application) it leaves running.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePath
from typing import Any

import msgspec
import ray
from ray import serve
from ray.exceptions import RayError
from rich.console import Console

from engine import deployment
from router import demo
from router.app import model_name
from router.control import STOP_MARGIN_S, Order, spawn_arguments
from router.errors import ConfigError
from router.membership import directory
from router.membership.base import application_name
from router.membership.directory_client import join
from router.options import Config, EngineOptions
from router.ray_private import RayRefused

LOOK_INTERVAL_S = 0.5
"""How often to look for a Ctrl-C that another thread got."""
START_TIMEOUT_S = 1800.0
"""A large model takes many minutes to load; longer means that it hangs."""
ROUTER_TIMEOUT_S = 120.0
"""For the router to start and open its lanes to replicas that are ready."""
DEFAULT_REPLICAS = 2
AUTO, LOCAL = "auto", "local"
_ERROR = re.compile(r"(\w+\.)*\w*(Error|Exception|Failed|NotFound): ")
SERVE_CONTROLLER = "SERVE_CONTROLLER_ACTOR"
TINY_NOTE = "the model is a tiny Llama with random weights, made on this machine: its words are noise"

console = Console(highlight=False)


class StartFailed(ConfigError):
    """Something did not come up; the message says what."""


def with_engine(config: Config, kind: str | None, model: str | None, replicas: int | None) -> Config:
    """The configuration with the engine that the flags describe, or the default one where it has none.

    Raises `ConfigError` where flags and several configured engines would contradict each other.
    """
    given: dict[str, Any] = {"kind": kind, "model": model, "replicas": replicas}
    given = {name: value for name, value in given.items() if value is not None}
    if len(config.engines) > 1 and given:
        raise ConfigError("--engine, --model and --replicas need a configuration with at most one engine")
    if config.engines and not given:
        return config
    engine = config.engines[0] if config.engines else _default_engine(kind or "vllm")
    if replicas and engine.autoscaling is not None:
        raise ConfigError("--replicas: the engine has autoscaling; set min_replicas and max_replicas there")
    if model:
        given["name"] = PurePath(model).name.lower()
        given["served_model_name"] = model
    try:
        engine = msgspec.convert(msgspec.to_builtins(engine) | given, EngineOptions)
    except msgspec.ValidationError as error:
        raise ConfigError(f"--replicas: {error}") from error
    return msgspec.structs.replace(config, engines=(engine,))


def _default_engine(kind: str) -> EngineOptions:
    """Two replicas; vLLM's each on a GPU of its own where there are any, and no more of them than GPUs."""
    gpus = 0 if kind == "sim" else len(list(Path("/dev").glob("nvidia[0-9]*")))
    if not gpus:
        return EngineOptions(replicas=DEFAULT_REPLICAS)
    return EngineOptions(replicas=min(DEFAULT_REPLICAS, gpus), num_gpus=1.0)


def run(config: Config, *, once: bool) -> int:
    """Everything on this machine until Ctrl-C; with `once` until the demo is over. Returns the exit status."""
    for engine in config.engines:
        deployment.engine_args(engine)  # what can be refused is refused before anything starts
    with ExitStack() as stack:
        try:
            _up(config, stack)
            if not once:
                console.print("serving; Ctrl-C stops")
                _wait_for_interrupt()
        except KeyboardInterrupt:
            if once:
                return 130
            console.print("stopping")
        except StartFailed as error:
            console.print(f"kvlane: {error.message}", style="red")
            return 1
        except RayError as error:
            console.print(f"kvlane: Ray failed: {error}", style="red")
            return 1
    return 0


def _wait_for_interrupt() -> None:
    """Until Ctrl-C. One of Ray's threads may get the signal, and the interpreter raises it here once this one runs
    again."""
    while True:
        time.sleep(LOOK_INTERVAL_S)


def deploy(config: Config, *, wait: bool) -> int:
    """Deploys the engines onto the running Ray cluster; returns the exit status."""
    if not config.engines:
        raise ConfigError("engines: nothing to deploy")
    _quiet()
    try:
        try:
            deployment.deploy(config)
        except ConnectionError as error:
            raise ConfigError(f"membership.ray_address: {error}") from error
        if wait:
            _wait_for_engines(config)
    except StartFailed as error:
        console.print(f"kvlane: {error.message}", style="red")
        return 1
    finally:
        ray.shutdown()
    return 0


def _up(config: Config, stack: ExitStack) -> None:
    with _progress("Ray"):
        ray_is_ours = stack.enter_context(_ray(config))
    if any(engine.kind == "vllm" and not engine.model for engine in config.engines):
        console.print(f"note: {TINY_NOTE}", style="yellow")
    _check_gpus(config)
    stack.enter_context(_engines(config, leave_serve=ray_is_ours))
    with _progress("router"):
        line = stack.enter_context(_router(config))
    console.print(line)
    addresses = dict(word.split("=", 1) for word in line.split()[1:])
    model = model_name(config.engines[0])
    try:
        if config.auth.keys_file:
            console.print("note: no demo, since the router asks for API keys", style="yellow")
            return
        if addresses.get("http", "").startswith("http://"):
            demo.over_http(console, addresses["http"], model)
        if "grpc" in addresses and not config.grpc.tls_cert_file:
            demo.over_grpc(console, addresses["grpc"], model)
    except demo.DemoFailed as error:
        raise StartFailed(str(error)) from error


@contextmanager
def _ray(config: Config) -> Iterator[bool]:
    """A Ray cluster: the one that runs, or one of our own that ends with us; tells whether it is ours."""
    _quiet()
    membership = config.membership
    ours = membership.ray_address == LOCAL
    try:
        if not ours:
            try:
                join(membership)
            except ConnectionError as error:
                if membership.ray_address != AUTO or isinstance(error, RayRefused):
                    raise
                ours = True
        if ours:
            ray.init(
                address=LOCAL,
                namespace=membership.ray_namespace,
                num_cpus=config.ray.num_cpus or max(os.cpu_count() or 1, _cpus_needed(config)),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise StartFailed(f"Ray did not start: {error}") from error
    signal.signal(signal.SIGTERM, _interrupt)  # only now: Ray has put a handler of its own there
    directories = _directories()
    try:
        yield ours
    finally:
        if not ours:
            _end_directories(_directories() - directories, membership.ray_namespace)
        ray.shutdown()


def _quiet() -> None:
    """Ray's own progress would stand between ours."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def _check_gpus(config: Config) -> None:
    # Of a model that is at zero, one replica must be able to start.
    wanted = sum(e.num_gpus * e.tensor_parallel_size * max(1, _fewest(e)) for e in config.engines)
    present = ray.cluster_resources().get("GPU", 0.0)
    if wanted > present:
        raise StartFailed(f"the replicas need {wanted:g} GPUs, and the Ray cluster has {present:g}")


def _directories() -> set[str]:
    """Names of the directory actors that run."""
    return {a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["name"] == directory.NAME}


def _end_directories(names: set[str], namespace: str) -> None:
    """Ends the directories that this run brought into a cluster that goes on."""
    for name in names:
        ray.kill(ray.get_actor(name, namespace=namespace))


def _cpus_needed(config: Config) -> int:
    per_replica = [engine.num_cpus * max(1, engine.tensor_parallel_size) for engine in config.engines]
    return int(sum(cpus * _most(engine) for cpus, engine in zip(per_replica, config.engines, strict=True)) + 1)


def _fewest(engine: EngineOptions) -> int:
    """The replicas that there are at least, once all have started."""
    return engine.replicas if engine.autoscaling is None else engine.autoscaling.min_replicas


def _most(engine: EngineOptions) -> int:
    return engine.replicas if engine.autoscaling is None else engine.autoscaling.max_replicas


@contextmanager
def _engines(config: Config, *, leave_serve: bool) -> Iterator[None]:
    """The engine replicas, deployed and ready; `leave_serve` where Serve ends with the cluster anyway."""
    serve_ran = _serve_runs()
    before = deployment.statuses() if serve_ran else {}
    ours = [e.name for e in config.engines if application_name(e.name) not in before]
    try:
        deployment.deploy(config)
        _wait_for_engines(config)
        yield
    finally:
        with _progress("engines stop"):
            deployment.undeploy(ours)
            if not serve_ran and not leave_serve:
                serve.shutdown()


def _serve_runs() -> bool:
    return any(actor["name"] == SERVE_CONTROLLER for actor in ray.util.list_named_actors(all_namespaces=True))


def _wait_for_engines(config: Config) -> None:
    wanted = sum(map(_fewest, config.engines))
    models = ", ".join(engine.model or model_name(engine) for engine in config.engines)
    deadline = time.monotonic() + START_TIMEOUT_S
    with _progress(f"engines: loading {models}") as tell:
        while True:
            status = deployment.statuses()
            ready, settled = 0, len(status) > 0
            for engine in config.engines:
                application = status.get(application_name(engine.name))
                if application is not None:
                    # On a redeploy the old replicas are ready as well; only RUNNING says that the new ones are.
                    ready += min(application.ready, _fewest(engine))
                    settled = settled and application.status == "RUNNING"
                    if application.status == "DEPLOY_FAILED":
                        raise StartFailed(f"engine {engine.name!r} did not start: {_cause(application.message)}")
            tell(f"{ready} of {wanted} replicas ready")
            if ready >= wanted and settled:
                return
            if time.monotonic() > deadline:
                raise StartFailed(f"{ready} of {wanted} replicas were ready after {START_TIMEOUT_S:.0f} s")
            time.sleep(0.5)


def _cause(message: str) -> str:
    """The error itself out of Serve's message, which holds the replica's whole traceback; else all of it."""
    errors = [line.strip() for line in message.splitlines() if _ERROR.match(line.strip())]
    return errors[-1] if errors else message


@contextmanager
def _router(config: Config) -> Iterator[str]:
    """The router as a child process; gives its `ready …` line."""
    address = ray.get_runtime_context().gcs_address
    membership = msgspec.structs.replace(config.membership, ray_address=address)
    order = Order(msgspec.structs.replace(config, membership=membership))
    child = subprocess.Popen(
        spawn_arguments(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(msgspec.json.encode(order).decode() + "\n")
        child.stdin.flush()
        yield _ready_line(child)
    finally:
        child.stdin.close()
        try:
            child.wait(config.shutdown.grace_s + STOP_MARGIN_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _ready_line(child: subprocess.Popen[str]) -> str:
    """The child's line that tells its addresses; what else it prints goes on to our standard error, now and later."""
    lines: queue.Queue[str] = queue.Queue()
    output = child.stdout
    assert output is not None

    def read() -> None:
        for line in output:
            if line.startswith("ready "):
                lines.put(line.strip())
            else:
                sys.stderr.write(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    try:
        line = lines.get(timeout=ROUTER_TIMEOUT_S)
    except queue.Empty:
        raise StartFailed(f"the router has no lane to every model after {ROUTER_TIMEOUT_S:.0f} s") from None
    if not line:
        raise StartFailed(f"the router ended with status {child.wait()}; its log stands above")
    return line


@contextmanager
def _progress(what: str) -> Iterator[Callable[[str], None]]:
    """Shows what is under way and for how long: a live line on a terminal, a line per change elsewhere."""
    began, told = time.monotonic(), ""

    def line() -> str:
        detail = f": {told}" if told else ""
        return f"{what}{detail} ({time.monotonic() - began:.0f} s)"

    if not console.is_terminal:

        def tell_plainly(news: str) -> None:
            nonlocal told
            if news != told:
                told = news
                console.print(line())

        yield tell_plainly
    else:
        with console.status(line()) as status:
            over = threading.Event()

            def tell(news: str) -> None:
                nonlocal told
                told = news

            def tick() -> None:
                while not over.wait(0.5):
                    status.update(line())

            ticker = threading.Thread(target=tick, daemon=True)
            ticker.start()
            try:
                yield tell
            finally:
                over.set()
                ticker.join()
    console.print(f"{what}: done ({time.monotonic() - began:.0f} s)")


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
