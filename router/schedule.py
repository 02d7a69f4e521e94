"""Hours of the week as an operator writes them: days, times and a time zone, checked and brought into numbers.

Pure. Whether an hour is one of them is for the autoscaler to say (`engine.autoscaling`), with each clock change.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final
from zoneinfo import ZoneInfo

import msgspec

from router.options import HoursOptions

DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY_MINUTES: Final = 24 * 60

_TIME = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])|24:00")


class Hours(msgspec.Struct, frozen=True):
    """Hours of the week with their minimum of warm replicas."""

    days: tuple[int, ...]
    """On which they begin; 0 is Monday."""
    start: int
    """Minute of the day, from 0."""
    end: int
    """Minute of the day up to 1440, not itself within; below `start` it is on the next day."""
    timezone: str
    min_replicas: int


def problems(options: HoursOptions) -> Iterator[str]:
    """One line for each field that cannot be read, its name first."""
    if not parse_days(options.days):
        yield f"days: expected days such as 'mon-fri' or 'sat, sun', got {options.days!r}"
    times = {"from": parse_time(options.start), "to": parse_time(options.end)}
    for name, minute in times.items():
        if minute is None:
            text = options.start if name == "from" else options.end
            yield f"{name}: expected a time of day from '00:00' to '24:00', got {text!r}"
    if times["from"] is not None and times["from"] == times["to"]:
        yield f"to: {options.end!r} is `from` too; the whole day is from '00:00' to '24:00'"
    if times["from"] == DAY_MINUTES:
        yield "from: '24:00' is the next day's '00:00'"
    if not known_timezone(options.timezone):
        yield f"timezone: no time zone is called {options.timezone!r}; expected a name such as 'Europe/Berlin'"


def parse(options: HoursOptions) -> Hours:
    """The hours in numbers. Raises `ValueError` where `problems` finds any."""
    for problem in problems(options):
        raise ValueError(problem)
    start, end = parse_time(options.start), parse_time(options.end)
    assert start is not None
    assert end is not None
    return Hours(parse_days(options.days), start, end, options.timezone, options.min_replicas)


def parse_days(text: str) -> tuple[int, ...]:
    """The days in ``mon-fri``, ``sat, sun`` or ``fri-mon, wed``, in their order; empty where it means none."""
    found: set[int] = set()
    for part in text.lower().split(","):
        first, dash, last = (name.strip() for name in part.partition("-"))
        if first not in DAYS or (dash and last not in DAYS):
            return ()
        begin = DAYS.index(first)
        count = (DAYS.index(last) - begin) % 7 + 1 if dash else 1
        found.update((begin + step) % 7 for step in range(count))
    return tuple(sorted(found))


def parse_time(text: str) -> int | None:
    """The minute of the day of ``07:30``; None where it is no time."""
    if _TIME.fullmatch(text) is None:
        return None
    hour, minute = text.split(":")
    return int(hour) * 60 + int(minute)


def known_timezone(name: str) -> bool:
    """Whether this machine's time zone database has it."""
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # ZoneInfoNotFoundError is a KeyError; OSError: a folder's name.
        return False
    return True
