"""The offline simulator: the router's own index, accounts, load model and policies against simulated engines.

    python -m loadtests simulate --trace conversation --replicas 8 --load 0.8,1.0 --policies least-queue,cost --json OUT

How a run goes. The trace's arrivals, stretched to the rate, come to routers drawn at random. A router decides at once
and without delay; what replicas tell it after each engine step comes `--staleness-ms` later, while what it does and
sees itself, its submits and the ends of its streams, it knows at once. Replay is open loop: a conversation's next turn
comes when the trace says so, whether or not the turn before it has been answered. Engines are `engine`'s
simulated cores with a profile's step times (`perf`) and KV blocks of 512 tokens; prefix blocks and KV blocks are the
same here. A stretch of steps that only decode is done at once, with the same times to the last bit as step by step,
but reported once, at its end.

What is measured. The first tenth of the requests warms caches and load models up and counts for nothing (`measure`).
A load of 1 is the rate at which least-queue gets requests done when all of them wait (`runs`). `--goodput` searches
for the highest rate at which 90% of the requests see their first token within 0.5 s plus twice what their prompt
takes, uncached and alone, and 50 ms per token after it on average. Where no rate is too much for
a trace, that is said instead. A seed decides what a generated trace contains, where within the granularity of a trace's
timestamps (three seconds in the conversations, else one) an arrival falls, which router it comes to, the errors of
estimates and all that policies leave to chance; the same seed gives the same figures.

What routers may be wrong about. `--model-error`: each term of the fleet's cost model (per token, per attention pair,
per step), drawn once per router and the same for all replicas. `--replica-error`: each replica's speed, drawn once per
router and replica. Neither touches a policy that does not ask a cost model: all the baselines, least-queue and the
like. `--token-error`: a prompt's length, drawn per request. The bounds (greedy, ideal) run with one router and without
delay or error, whatever is asked for, and their results say so.
"""

from loadtests.simulate.measure import Result
from loadtests.simulate.runs import Knobs, goodput, run, saturation_rps

__all__ = ["Knobs", "Result", "goodput", "run", "saturation_rps"]
