"""The offline simulator: the router's own index, accounts, load model and policies against simulated engines.

    python -m loadtests simulate --trace conversation --replicas 8 --load 0.8,1.0 --policies least-queue,cost --json OUT

How a run goes. The trace's arrivals, stretched to the rate, come to routers drawn at random. A router decides at once
and without delay; what replicas tell it after each engine step comes `--staleness-ms` later. Engines are `engine`'s
simulated cores with a profile's step times (`perf`) and KV blocks of 512 tokens; prefix blocks and KV blocks are the
same here. A stretch of steps that only decode is done at once, with the same times to the last bit as step by step,
but reported once, at its end.

What is measured. The first tenth of the requests warms caches and load models up and counts for nothing (`measure`).
A load of 1 is the rate at which least-queue gets requests done when all of them wait (`runs`). `--goodput` searches
for the highest rate at which 90% of the requests see their first token within 0.5 s plus twice what their prompt
takes, uncached and alone, and 50 ms per token after it on average. A seed decides where in its second an arrival
falls, which router it comes to, the errors of estimates and all that policies leave to chance; the same seed gives
the same figures.
"""

from loadtests.simulate.measure import Result
from loadtests.simulate.runs import Knobs, goodput, run, saturation_rps

__all__ = ["Knobs", "Result", "goodput", "run", "saturation_rps"]
