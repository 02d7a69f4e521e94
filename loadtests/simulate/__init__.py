"""The offline simulator: the router's own code against simulated engines on a virtual clock."""

from loadtests.simulate.measure import Result
from loadtests.simulate.runs import Knobs, goodput, run, saturation_rps

__all__ = ["Knobs", "Result", "goodput", "run", "saturation_rps"]
