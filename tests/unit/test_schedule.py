"""Hours of the week: how an operator writes them, and when they are."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.autoscaling import Hours
from router import schedule
from router.options import HoursOptions


def options(days: str = "mon-fri", start: str = "07:30", end: str = "19:00", zone: str = "UTC") -> HoursOptions:
    return HoursOptions(days=days, start=start, end=end, timezone=zone, min_replicas=2)


def hours(written: HoursOptions) -> Hours:
    read = schedule.parse(written)
    return Hours(read.days, read.start, read.end, read.timezone, read.min_replicas)


def at(text: str, zone: str = "UTC", fold: int = 0) -> float:
    """Seconds since 1970 of that local time; `fold` 1 is the second of a time that comes twice."""
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone), fold=fold).timestamp()


@pytest.mark.parametrize(
    ("text", "days"),
    [
        ("mon", (0,)),
        ("mon-fri", (0, 1, 2, 3, 4)),
        ("sat,sun", (5, 6)),
        ("Sat, Sun", (5, 6)),
        ("fri-mon", (0, 4, 5, 6)),
        ("mon-sun", (0, 1, 2, 3, 4, 5, 6)),
        ("mon-mon", (0,)),
        ("wed, mon-tue", (0, 1, 2)),
        ("monday", ()),
        ("", ()),
        ("mon-", ()),
        ("mon,", ()),
        ("mon-fri-sun", ()),
    ],
)
def test_days_are_read(text: str, days: tuple[int, ...]) -> None:
    assert schedule.parse_days(text) == days


@pytest.mark.parametrize(
    ("text", "minute"),
    [
        ("00:00", 0),
        ("07:30", 450),
        ("23:59", 1439),
        ("24:00", 1440),
        ("24:01", None),
        ("7:30", None),
        ("07:60", None),
        ("07:30:00", None),
        ("", None),
    ],
)
def test_times_are_read(text: str, minute: int | None) -> None:
    assert schedule.parse_time(text) == minute


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        (options(days="monday"), "days: expected days such as 'mon-fri' or 'sat, sun', got 'monday'"),
        (options(start="7"), "from: expected a time of day from '00:00' to '24:00', got '7'"),
        (options(end="25:00"), "to: expected a time of day from '00:00' to '24:00', got '25:00'"),
        (options(end="07:30"), "to: '07:30' is `from` too; the whole day is from '00:00' to '24:00'"),
        (options(start="24:00"), "from: '24:00' is the next day's '00:00'"),
        (options(zone="Berlin"), "timezone: no time zone is called 'Berlin'; expected a name such as 'Europe/Berlin'"),
        (options(zone="../etc"), "timezone: no time zone is called '../etc'; expected a name such as 'Europe/Berlin'"),
        (options(zone="Europe"), "timezone: no time zone is called 'Europe'; expected a name such as 'Europe/Berlin'"),
    ],
)
def test_what_cannot_be_read_is_named(written: HoursOptions, problem: str) -> None:
    assert list(schedule.problems(written)) == [problem]
    with pytest.raises(ValueError, match=problem.split(":")[0]):
        schedule.parse(written)


@pytest.mark.parametrize(
    ("moment", "within"),
    [
        ("2026-11-23T07:29:59", False),  # A Monday.
        ("2026-11-23T07:30", True),
        ("2026-11-23T18:59:59", True),
        ("2026-11-23T19:00", False),
        ("2026-11-21T12:00", False),  # A Saturday.
    ],
)
def test_hours_of_one_day_begin_and_end_to_the_second(moment: str, within: bool) -> None:
    assert hours(options()).cover(at(moment)) is within


@pytest.mark.parametrize(
    ("moment", "within"),
    [
        ("2026-11-20T21:59", False),  # A Friday.
        ("2026-11-20T22:00", True),
        ("2026-11-21T05:59", True),  # The night from Friday.
        ("2026-11-21T06:00", False),
        ("2026-11-21T22:00", False),  # The night from Saturday is not meant.
        ("2026-11-23T03:00", False),  # Nor is the one from Sunday.
    ],
)
def test_hours_over_midnight_belong_to_the_day_on_which_they_begin(moment: str, within: bool) -> None:
    assert hours(options(days="mon-fri", start="22:00", end="06:00")).cover(at(moment)) is within


def test_a_whole_day_has_no_gap_at_midnight() -> None:
    whole = hours(options(days="mon-sun", start="00:00", end="24:00"))
    assert all(whole.cover(at("2026-11-23T00:00") + second) for second in range(-5, 6))


def test_clock_changes_are_followed() -> None:
    berlin = "Europe/Berlin"
    day = hours(options(days="mon-sun", start="07:00", end="08:00", zone=berlin))
    assert day.cover(at("2026-07-01T05:30"))
    assert day.cover(at("2026-12-01T06:30"))
    assert not day.cover(at("2026-12-01T05:30"))
    # In the night to 29 March 2026 there is no 02:30, and in the night to 25 October 2026 there are two.
    night = hours(options(days="mon-sun", start="02:30", end="03:30", zone=berlin))
    assert [night.cover(at("2026-03-29T00:59") + 60 * minute) for minute in range(3)] == [False, True, True]
    assert not night.cover(at("2026-03-29T03:30", berlin))
    twice = hours(options(days="mon-sun", start="02:00", end="03:00", zone=berlin))
    assert all(twice.cover(at("2026-10-25T02:30", berlin, fold)) for fold in (0, 1))


def test_a_host_without_the_time_zone_keeps_the_replicas_warm() -> None:
    assert Hours((0,), 0, 1, "Nowhere/Land", 1).cover(0.0)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    st.sets(st.integers(0, 6), min_size=1),
    st.integers(0, 1439),
    st.integers(1, 1440),
    st.sampled_from(["UTC", "Europe/Berlin", "America/St_Johns", "Pacific/Apia"]),
    st.integers(1_500_000_000, 2_000_000_000),
)
def test_hours_and_the_rest_of_the_days_share_the_week(
    days: set[int], start: int, end: int, zone: str, moment: int
) -> None:
    if start in (end, end % 1440):
        return
    chosen = Hours(tuple(days), start, end, zone, 1)
    everyday = Hours(tuple(range(7)), start, end, zone, 1)
    rest = Hours(tuple(range(7)), end % 1440, start or 1440, zone, 1)
    assert everyday.cover(moment) is not rest.cover(moment)
    assert not chosen.cover(moment) or everyday.cover(moment)
