"""How large the frames from replicas are, and how many outputs their steps bring.

Rule: only some frames are looked at, and of those plain numbers are added up; `router.observe` makes metrics of them.
"""

from __future__ import annotations

from typing import Final

SAMPLE: Final = 7
"""One step frame of so many counts. No power of two, since engines do things every so many steps."""
_BITS: Final = 33
"""Above those of the longest frame."""


class FrameMeter:
    """Sampled frames of all lanes of a router; each lane adds its own."""

    __slots__ = ("batches", "bytes", "outputs", "sizes")

    def __init__(self) -> None:
        self.sizes = [0] * _BITS
        """Frames by how many bits the number of their bytes has."""
        self.bytes = 0
        self.batches = [0] * _BITS
        """Step frames, likewise by their number of outputs."""
        self.outputs = 0

    def frame(self, size: int) -> None:
        """A frame of so many bytes."""
        self.sizes[size.bit_length()] += 1
        self.bytes += size

    def step(self, outputs: int) -> None:
        """A step frame with so many outputs."""
        self.batches[outputs.bit_length()] += 1
        self.outputs += outputs
