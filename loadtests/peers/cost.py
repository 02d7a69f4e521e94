"""What the processes of a system take: CPU time and memory, of the processes that were started and all of theirs."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from loadtests.processes import descendants, peak_rss_mb

_TICKS: Final = os.sysconf("SC_CLK_TCK")


def family(pids: Sequence[int]) -> list[int]:
    """The processes, and those that they and theirs started."""
    return [each for pid in pids for each in (pid, *descendants(pid))]


class FamilyCost:
    """The CPU time of processes and their descendants since this was made.

    All threads count, ended ones too. A child that ended meanwhile counts once its parent has waited for it.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        self._began = self._now()

    def _now(self) -> float:
        return sum(_cpu_s(pid) for pid in family(self._pids))

    def cpu_s(self) -> float:
        """User and system time in seconds."""
        return self._now() - self._began


def _cpu_s(pid: int) -> float:
    """Of a process and the children that it has waited for; 0 for one that has just ended.

    The kernel's clock of a process (`clock_getcpuclockid(3)`) is exact; /proc counts in ticks of 10 ms, which are as
    much as a short load takes in all. Children that were waited for are only counted there.
    """
    try:
        own = time.clock_gettime(~pid << 3 | 2)
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return 0.0
    return own + (int(fields[13]) + int(fields[14])) / _TICKS


def family_rss_mb(pids: Sequence[int]) -> float:
    """The most memory that each has held, added up, in MiB; pages that they share count for each of them."""
    total = 0.0
    for pid in family(pids):
        try:
            total += peak_rss_mb(pid)
        except OSError:
            continue  # It has ended meanwhile.
    return total
