"""What one decision of each installed policy and one call of each scorer cost: ``python -m loadtests.policy_cost``.

The pool is busy and every replica holds some of the prompt, which is the dearest case. The figure is CPU time, the best
of several rounds: the one that others on the machine disturbed least.
"""

from __future__ import annotations

import argparse
import random
import time
import timeit
from collections.abc import Callable

import msgspec

from router.policies import registry
from router.testing import make_prefix, make_replica, make_request
from router.types import Outlook, Snapshot

_ROUNDS = 15


def busy_pool(size: int) -> Snapshot:
    """Replicas with queues of all lengths, each holding some of a prompt of 1,024 tokens."""
    chance = random.Random(0)
    replicas = tuple(
        make_replica(
            f"llm#engine#{chance.getrandbits(32):08x}",
            chance.randrange(32),
            kv_usage=chance.random(),
            queued_prefill_tokens=chance.randrange(10_000),
            outlook=Outlook(chance.random(), 0.01, 1e-4, 1e-9, 0.005),
        )
        for _ in range(size)
    )
    prefix = make_prefix({view.replica: chance.randrange(1, 17) for view in replicas})
    return Snapshot("model", replicas, prefix)


def micros(work: Callable[[], object]) -> float:
    """Microseconds that one call takes."""
    timer = timeit.Timer(work, timer=time.process_time)
    calls, took = timer.autorange()
    number = max(1, int(calls * 0.05 / took))
    return min(timer.repeat(_ROUNDS, number)) / number * 1e6


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, nargs="+", default=[8, 64])
    sizes: list[int] = parser.parse_args().replicas
    pools = [busy_pool(size) for size in sizes]
    request = make_request(session_id="session", lora="adapter")
    print(f"{'µs per decision':24}" + "".join(f"{size:>8} replicas" for size in sizes))
    for kind, found in (("policy", registry.policies), ("scorer", registry.scorers)):
        for spec in found.installed():
            cells = []
            for pool in pools:
                plugin = spec.plugin(msgspec.convert({}, spec.options), random.Random(0))
                call = plugin.choose if kind == "policy" else plugin.score
                cells.append(f"{micros(lambda call=call, pool=pool: call(request, pool)):17.1f}")  # type: ignore[misc]
            print(f"{kind} {spec.name:17}" + "".join(cells))


if __name__ == "__main__":
    main()
