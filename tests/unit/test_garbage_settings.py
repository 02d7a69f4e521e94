"""What the allocator is told, in a process of its own, since it stays so."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import gc
from pathlib import Path
from router import garbage

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

SIZE = 20 << 20
for settled in (False, True):
    if settled:
        garbage.settle()
    bytearray(SIZE)  # Freed at once; from now on glibc would keep what is of that size.
    before = resident()
    table, wedge = bytearray(SIZE), bytearray(256 << 10)  # Something else lies behind it.
    table[::4096] = bytes(len(table[::4096]))
    del table
    print(resident() - before > SIZE // 2, gc.get_threshold()[0])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_large_memory_goes_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["True", "700", "False", "20000"]
