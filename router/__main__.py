"""The command `kvlane`."""

from __future__ import annotations

import argparse
import datetime
import inspect
import logging
import math
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import msgspec

from router import compiled, keys
from router import config as config_files
from router.errors import ConfigError
from router.fields import expected
from router.options import Config
from router.policies import registry
from router.watched import WatchedFile


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 fine, 1 it failed, 2 it could not be understood."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except ConfigError as error:
        print(f"kvlane: {error.message}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `kvlane policies | head`: whoever reads has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end.
        return 0
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvlane", description="A KV-cache-aware request router for vLLM on Ray Serve."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    up = commands.add_parser("up", help="everything on this machine: Ray, engine replicas, router, and a demo answer")
    _add_config(up)
    up.add_argument("--engine", choices=("vllm", "sim"), help="engine of the replicas (default: vllm)")
    up.add_argument("--model", metavar="ID_OR_PATH", help="model to serve (default: a tiny one with random weights)")
    up.add_argument(
        "--replicas",
        type=int,
        metavar="N",
        help="replicas of the model (default: the configuration's, else 2, and no more than GPUs)",
    )
    _add_router_flags(up)
    up.add_argument("--once", action="store_true", help="exit after the demo answers")
    up.set_defaults(run=_up)

    serve = commands.add_parser("serve", help="the router alone, joining a running Ray cluster")
    _add_config(serve)
    _add_router_flags(serve)
    serve.set_defaults(run=_serve)

    deploy = commands.add_parser("deploy", help="the engine replicas alone, onto a running Ray cluster")
    _add_config(deploy)
    deploy.add_argument("--no-wait", action="store_true", help="return before the replicas are ready")
    deploy.set_defaults(run=_deploy)

    check = commands.add_parser("check", help="validate a configuration file and print it normalized")
    check.add_argument("file")
    check.set_defaults(run=_check)

    policies = commands.add_parser("policies", help="list the installed policies and their options")
    policies.set_defaults(run=_policies)

    key = commands.add_parser("key", help="make API keys for auth.keys_file, and list those of such a file")
    keys_commands = key.add_subparsers(required=True, metavar="COMMAND")
    new = keys_commands.add_parser("new", help="print a new key to standard error and its entry to standard output")
    new.add_argument("--name", required=True, metavar="TENANT", help="whose it is; stands in logs and metrics")
    new.add_argument("--model", action="append", default=[], metavar="MODEL", help="for this model (again: and this)")
    new.add_argument("--expires", metavar="YYYY-MM-DD", help="the day, in UTC, at whose beginning it ceases")
    new.set_defaults(run=_new_key)
    listed = keys_commands.add_parser("list", help="validate a keys file and list what is in it")
    listed.add_argument("file")
    listed.set_defaults(run=_list_keys)

    shown = commands.add_parser("version", help="print the version")
    shown.set_defaults(run=_version)

    worker = commands.add_parser("worker")  # not for people: see router.workers
    worker.set_defaults(run=_worker)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="configuration in TOML; flags and KVLANE_… variables override")


def _add_router_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", metavar="NAME", help="routing policy; see `kvlane policies`")
    parser.add_argument("--http", metavar="HOST:PORT", help="address of the HTTP ingress")
    parser.add_argument("--grpc", metavar="HOST:PORT", help="address of the gRPC ingress")
    parser.add_argument("--workers", type=int, metavar="N", help="router processes")


def _router_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    flags: dict[str, Any] = {"policy.name": arguments.policy, "workers": arguments.workers}
    for ingress in ("http", "grpc"):
        address = getattr(arguments, ingress)
        if address is not None:
            host, _, port = address.rpartition(":")
            if not host or not port.isdigit():
                raise ConfigError(f"--{ingress} {address}: expected HOST:PORT")
            flags |= {f"{ingress}.host": host.strip("[]"), f"{ingress}.port": int(port)}
    return {name: value for name, value in flags.items() if value is not None}


def _load(arguments: argparse.Namespace, flags: dict[str, Any]) -> Config:
    return config_files.load(arguments.config, flags=flags)


def _up(arguments: argparse.Namespace) -> int:
    from router import up  # Ray takes a second to import; the other commands need not wait for it

    config = _load(arguments, _router_flags(arguments))
    config = up.with_engine(config, arguments.engine, arguments.model, arguments.replicas)
    return up.run(config, once=arguments.once)


def _serve(arguments: argparse.Namespace) -> int:
    # A reload that is asked for before there is anything to reload would end the process.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    from router import workers

    file = WatchedFile(arguments.config) if arguments.config is not None else None  # Before it is read.
    config = _load(arguments, _router_flags(arguments))
    workers.log_to_stderr(config)
    compiled.note(logging.getLogger(__name__))
    return workers.serve(
        config, read_again=lambda: _load(arguments, _router_flags(arguments)), file=file, ready=workers.say
    )


def _deploy(arguments: argparse.Namespace) -> int:
    from router import up

    return up.deploy(_load(arguments, {}), wait=not arguments.no_wait)


def _check(arguments: argparse.Namespace) -> int:
    sys.stdout.write(config_files.dump(config_files.load(arguments.file)))
    return 0


def _policies(_: argparse.Namespace) -> int:
    for title, installed in (
        ("Policies (policy.name, policy.shadow)", registry.policies),
        ("\nScorers (policy.options.scorers of the policy 'weighted')", registry.scorers),
    ):
        print(title)
        for spec in installed.installed():
            about = (inspect.getdoc(spec.plugin) or "").partition("\n")[0]
            print(f"\n{spec.name}  ({spec.dist})\n    {about}")
            for option in msgspec.structs.fields(spec.options):
                print(f"    {option.encode_name}: {expected(option.type) or 'a value'}, {_default(option)}")
        for plugin in installed.broken():
            print(f"\n{plugin.name}  ({plugin.dist})\n    cannot be used: {plugin.cause}")
    return 0


def _default(option: msgspec.structs.FieldInfo) -> str:
    if option.required:
        return "required"
    factory: Any = option.default_factory
    return f"default {(option.default if factory is msgspec.NODEFAULT else factory())!r}"


def _new_key(arguments: argparse.Namespace) -> int:
    try:
        expires = None if arguments.expires is None else datetime.date.fromisoformat(arguments.expires)
    except ValueError:
        raise ConfigError(f"--expires {arguments.expires}: expected YYYY-MM-DD") from None
    text, entry = keys.new(arguments.name, arguments.model, expires)
    sys.stdout.write(entry)
    sys.stdout.flush()  # Before the key, which is worth nothing without it.
    print(f"# The key, shown this once; what stands above is for auth.keys_file:\n{text}", file=sys.stderr)
    return 0


def _list_keys(arguments: argparse.Namespace) -> int:
    for key in keys.read(arguments.file).values():
        models = "all models" if key.models is None else ", ".join(sorted(key.models)) or "no model"
        expires = (
            datetime.datetime.fromtimestamp(key.expires_at, datetime.UTC) if key.expires_at < math.inf else "never"
        )
        print(f"{key.tenant}  {key.id}  {models}  expires {expires}")
    return 0


def _version(_: argparse.Namespace) -> int:
    print(f"kvlane {version('kvlane')}")
    print(compiled.told())
    return 0


def _worker(_: argparse.Namespace) -> int:
    from router import workers

    return workers.worker()


if __name__ == "__main__":
    sys.exit(main())
