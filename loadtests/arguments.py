"""Command lines of the load tests: how arguments are read, and how complaints about them are told."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raises `ValueError`, so that all complaints are told in the same way."""
        raise ValueError(message)


def many(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Values by commas, at least one."""

    def parse(text: str) -> list[Any]:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if not parts:
            raise argparse.ArgumentTypeError("nothing is named")
        return [kind(part) for part in parts]

    return parse


def number(
    kind: Callable[[str], float],
    *,
    least: float | None = None,
    above: float | None = None,
    below: float = math.inf,
    most: float = math.inf,
) -> Callable[[str], float]:
    """A finite number within bounds."""
    bounds = [f"at least {least}"] if least is not None else []
    bounds += [f"above {above}"] if above is not None else []
    bounds += [f"below {below}"] if below < math.inf else []
    bounds += [f"at most {most}"] if most < math.inf else []
    what = " ".join(["an integer" if kind is int else "a number", " and ".join(bounds)]).strip()

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        low = (least is None or value >= least) and (above is None or value > above)
        if not (math.isfinite(value) and low and value < below and value <= most):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse
