"""Turns a table of vLLM arguments into the namespace that ``vllm serve`` would parse.

Rule: vLLM's own parser judges every value, so names, types, choices and defaults are the installed vLLM's.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
from typing import Any, Final, NoReturn

from router.errors import ConfigError

_GIVEN_ELSEWHERE: Final = {"model": "model", "model_tag": "model", "served_model_name": "served_model_name"}
_OF_THE_SERVER: Final = (
    "host", "port", "uds", "config", "headless", "grpc", "api_server_count", "enable_ssl_refresh",
    "ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers",
    "uvicorn_log_level", "disable_uvicorn_access_log", "disable_access_log_for_endpoints",
    "h11_max_incomplete_event_size", "h11_max_header_count",
)  # fmt: skip
_ON_HTTP_ALONE: Final = ("api_key", "middleware")
_API_KEY_VARIABLE: Final = "VLLM_API_KEY"
_GUARD_THE_ROUTER: Final = "would act on HTTP alone and leave gRPC open; a replica is reached through the router only"

_PARALLEL: Final = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "nnodes")
_BIND: Final = "VLLM_CPU_OMP_THREADS_BIND"
_NO_BIND: Final = "nobind"

CPU_KV_CACHE_BYTES: Final = 1 << 30
"""KV cache of a CPU engine unless it is told otherwise: vLLM's own default takes a large part of the machine's memory,
and replicas share it."""


def serve_namespace(model: str, served_model_name: str, args: dict[str, Any], *, cpu: bool) -> argparse.Namespace:
    """vLLM's arguments for `model`, with `args` (names with underscores or dashes) over the defaults.

    Raises `ConfigError` for a name that vLLM does not have, a value that it refuses, and a name without effect here or
    with only half of its effect.
    """
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args

    if os.environ.get(_API_KEY_VARIABLE):
        raise ConfigError(f"the environment variable {_API_KEY_VARIABLE} {_GUARD_THE_ROUTER}", param="api_key")
    words = ["--model", model, *serve_words(served_model_name, args, cpu=cpu)]
    try:
        namespace: argparse.Namespace = _parser().parse_args(words)
        validate_parsed_serve_args(namespace)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"vLLM refuses its arguments: {error}") from error
    for name, value in args.items():
        # What a command line cannot say.
        if value is None:
            setattr(namespace, name.replace("-", "_"), None)
    return namespace


def serve_words(served_model_name: str, args: dict[str, Any], *, cpu: bool) -> list[str]:
    """The words after the model in the ``vllm serve`` command that stands for these arguments. Raises `ConfigError`."""
    parser = _parser()
    actions = {action.dest: action for action in parser._actions if action.option_strings and action.dest != "help"}
    wanted = {name.replace("-", "_"): value for name, value in args.items()}
    for name in wanted:
        _check_name(name, tuple(actions))
    if wanted.get("disable_log_stats"):
        raise ConfigError(
            "vLLM's argument 'disable_log_stats' would leave routers without any replica's load and cache: they follow"
            " from the statistics of each step",
            param="disable_log_stats",
        )
    if cpu:
        wanted = _cpu_defaults(wanted) | wanted
    words = ["--served-model-name", served_model_name] if served_model_name else []
    for name, value in wanted.items():
        words += _words(actions[name], value)
    return words


def prepare_cpu(namespace: argparse.Namespace) -> None:
    """Sets `cpu_environment` for this process and its children; what is set already stays."""
    one_process = namespace.distributed_executor_backend == "uni" and os.environ.get(_BIND, _NO_BIND) == _NO_BIND
    for name, value in cpu_environment(eager=bool(namespace.enforce_eager), one_process=one_process).items():
        os.environ.setdefault(name, value)


def cpu_environment(*, eager: bool, one_process: bool) -> dict[str, str]:
    """What a CPU engine takes from the environment alone.

    No pinning of OpenMP threads: vLLM's `auto` pins each engine's threads to the same first cores, so that two replicas
    on one machine fight for them; Ray's OMP_NUM_THREADS (the replica's CPUs) sets their number instead. Without
    pinning the model may run in the engine core's own process (`one_process`), which vLLM allows on CPU under a
    variable only. And an `eager` engine still compiles a few of its sampling functions at their first use (such as the
    first request with logprobs) and stands still meanwhile, 30 s and more on two cores; this stops it.
    """
    environment = {_BIND: _NO_BIND}
    if one_process:
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if eager:
        environment["TORCH_COMPILE_DISABLE"] = "1"
    return environment


def keep_environment() -> None:
    """Has vLLM read its variables from the environment once more and never again: it asks for one per token.

    As its engine core does by itself. 6% of what its front end takes per token.
    """
    from vllm import envs

    keep = getattr(envs, "enable_envs_cache", None)
    if keep is not None:
        keep()


def forget_environment() -> None:
    """Undoes `keep_environment`: another engine in this process may be given another environment."""
    from vllm import envs

    forget = getattr(envs, "disable_envs_cache", None)
    if forget is not None:
        forget()


def _cpu_defaults(wanted: dict[str, Any]) -> dict[str, Any]:
    # float32: the bfloat16 kernels of the CPU build die with SIGILL on virtual machines whose AMX is masked.
    # enforce_eager: compiling takes longer than most CPU engines live.
    defaults: dict[str, Any] = {"dtype": "float32", "enforce_eager": True}
    if not os.environ.get("VLLM_CPU_KVCACHE_SPACE") and "gpu_memory_utilization" not in wanted:
        defaults["kv_cache_memory_bytes"] = CPU_KV_CACHE_BYTES
    if os.environ.get(_BIND, _NO_BIND) == _NO_BIND and not any(name in wanted for name in _PARALLEL):
        # No worker process beside the engine core: 19 s of CPU time less to start, and no hop in each step. vLLM has
        # one only to pin OpenMP threads.
        defaults["distributed_executor_backend"] = "uni"
    return defaults


def _check_name(name: str, known: tuple[str, ...]) -> None:
    if name in _GIVEN_ELSEWHERE:
        raise ConfigError(f"vLLM's argument {name!r} is the field {_GIVEN_ELSEWHERE[name]!r} here", param=name)
    if name in _OF_THE_SERVER:
        raise ConfigError(
            f"vLLM's argument {name!r} has no effect here: the replica opens no port of its own", param=name
        )
    if name in _ON_HTTP_ALONE:
        raise ConfigError(f"vLLM's argument {name!r} {_GUARD_THE_ROUTER}", param=name)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"vLLM has no argument {name!r}{hint}", param=name)


def _words(action: argparse.Action, value: Any) -> list[str]:
    """The command-line words that give `action` this value."""
    flag = max(action.option_strings, key=len)
    if flag.startswith("--no-"):
        flag = "--" + flag.removeprefix("--no-")
    if value is None:
        return []
    if action.nargs == 0:
        return _flag_words(action, flag, value)
    if isinstance(value, (list, tuple)) and action.nargs in ("+", "*"):
        return [flag, *map(_word, value)]
    return [f"{flag}={_word(value)}"]


def _flag_words(action: argparse.Action, flag: str, value: Any) -> list[str]:
    if not isinstance(value, bool):
        raise ConfigError(f"vLLM's argument {action.dest!r} is true or false, not {value!r}", param=action.dest)
    if value:
        return [flag]
    off = "--no-" + flag.removeprefix("--")
    return [off] if off in action.option_strings else []


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _parser() -> Any:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"vLLM refuses its arguments: {message}")

    return make_arg_parser(Parser(prog="vllm"))
