"""A wire between two hosts' ends that a test can cut, slow down, or break in one direction.

Run as a process: `python wire.py TAP-A TAP-B`. It makes both network devices and carries frames between them for as
long as its standard input is open; a line there sets what happens from then on, as JSON:
``{"cut": [from A, from B], "delay_s": seconds}``. The devices vanish with the process. Kernels without the
queueing disciplines for this (netem) do as well.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
FRAME_BYTES = 1 << 16
BURST = 64
"""Frames of one direction in a row."""


def tap(name: str) -> int:
    """A new network device; what is written to the descriptor arrives at it."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return device


class Wire:
    """Frames on their way, in both directions."""

    def __init__(self, ends: tuple[int, int]) -> None:
        self.ends = ends
        self.cut = [False, False]
        self.delay_s = 0.0
        self.on_the_way: deque[tuple[float, int, bytes]] = deque()
        """When each is due, where it goes, and the frame."""

    def take(self, side: int, now: float) -> None:
        """Frames that were sent at one end."""
        for _ in range(BURST):
            try:
                frame = os.read(self.ends[side], FRAME_BYTES)
            except (BlockingIOError, OSError):  # Nothing more, or the device is down.
                return
            if self.cut[side]:
                continue
            if self.delay_s or self.on_the_way:
                self.on_the_way.append((now + self.delay_s, 1 - side, frame))
            else:
                self.put(1 - side, frame)

    def put(self, side: int, frame: bytes) -> None:
        try:
            os.write(self.ends[side], frame)
        except OSError:
            pass  # That end is down or its queue is full: wires lose frames then.

    def deliver(self, now: float) -> None:
        """Those that are due."""
        while self.on_the_way and self.on_the_way[0][0] <= now:
            _, side, frame = self.on_the_way.popleft()
            self.put(side, frame)

    def wait_s(self, now: float) -> float | None:
        return max(0.0, self.on_the_way[0][0] - now) if self.on_the_way else None


def main() -> None:
    wire = Wire((tap(sys.argv[1]), tap(sys.argv[2])))
    print("ready", flush=True)
    orders = sys.stdin.fileno()
    while True:
        ready, _, _ = select.select([orders, *wire.ends], [], [], wire.wait_s(time.monotonic()))
        now = time.monotonic()
        wire.deliver(now)
        for side, end in enumerate(wire.ends):
            if end in ready:
                wire.take(side, now)
        if orders in ready:
            line = sys.stdin.readline()
            if not line:
                return
            order = json.loads(line)
            wire.cut, wire.delay_s = order["cut"], order["delay_s"]
            print("done", flush=True)


if __name__ == "__main__":
    main()
