"""`python -m loadtests COMMAND`: the load tests that have a command line of their own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Final

COMMANDS: Final = {
    "peers": "loadtests.peers.command",
    "grpc-edges": "loadtests.grpc_edges",
    "simulate": "loadtests.simulate.command",
    "vllm": "loadtests.vllm.command",
    "fleet": "loadtests.fleet",
    "slow": "loadtests.slow",
    "soak": "loadtests.soak",
    "stalls": "loadtests.stalls",
    "stalls-answers": "loadtests.stalls_answers",
    "profile": "loadtests.profiles",
    "workers": "loadtests.workers",
}
"""Name to the module whose `main(argv) -> int` does it; only the one that is asked for is imported."""


def main(argv: Sequence[str]) -> int:
    usage = f"usage: python -m loadtests {{{','.join(COMMANDS)}}} ..."
    if argv and argv[0] in ("-h", "--help"):
        print(usage)
        return 0
    if not argv or argv[0] not in COMMANDS:
        print(usage, file=sys.stderr)
        return 2
    run: Callable[[Sequence[str]], int] = import_module(COMMANDS[argv[0]]).main
    return run(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
