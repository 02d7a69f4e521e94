"""Runs a module with its stacks sampled from inside: `python -m loadtests.sampled ARGUMENT …`.

For where no other process may look into it. `SAMPLED_MODULE` names the module, and `SAMPLED_FILE` where its collapsed
stacks are written at the end. The timer counts CPU time, so waiting is not seen, and a sample is taken when Python gets
to it: what runs in C is counted for its caller.
"""

from __future__ import annotations

import atexit
import os
import runpy
import signal
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Final

INTERVAL_S: Final = 0.005


MODULE, FILE = "SAMPLED_MODULE", "SAMPLED_FILE"


def main() -> None:
    module, file = os.environ.pop(MODULE), os.environ.pop(FILE)
    seen: Counter[tuple[str, ...]] = Counter()

    def sample(_: int, frame: FrameType | None) -> None:
        frames = []
        while frame is not None:
            code = frame.f_code
            frames.append(f"{code.co_qualname} ({code.co_filename})")
            frame = frame.f_back
        if not any("<frozen importlib" in each for each in frames):  # Start-up is no load.
            seen[tuple(reversed(frames))] += 1

    def write() -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        Path(file).write_text("".join(f"{';'.join(frames)} {count}\n" for frames, count in seen.items()))

    atexit.register(write)
    signal.signal(signal.SIGPROF, sample)
    signal.setitimer(signal.ITIMER_PROF, INTERVAL_S, INTERVAL_S)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
