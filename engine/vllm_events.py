"""The socket on which vLLM's engine core publishes its KV events, on this machine.

Rule: every message goes to the listener as it came, with its number, or the listener is told once why there will be no
more. Batches that are missing can be asked for again where the publisher keeps them. This module owns the sockets,
their private folder and vLLM's settings of them; what is in a batch it does not know.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

_HIGH_WATER: Final = 100_000
"""Batches that may wait between vLLM and us, one per engine step: minutes of a blocked event loop. More would be
dropped, and seen as a gap."""
_KEPT_BATCHES: Final = 2_000
"""Batches that vLLM keeps to replay, 40 kB each at most as a rule: those of a minute or so of steps."""
_END_OF_REPLAY: Final = b"\xff" * 8
_HANDSHAKE_S: Final = 10.0
_LONGEST_PATH: Final = 100
"""Bytes; a Unix socket's path takes 107."""
_EVENTS: Final = 15
_POLLIN: Final = 1
"""libzmq's ZMQ_EVENTS and ZMQ_POLLIN; enumerations, as pyzmq has them, would cost what is saved here."""
_FOLLOWABLE: Final = "a publisher that binds an ipc:// or tcp://*: endpoint on this machine"


class KvEventSocket:
    """The subscriber's end. `received` gets each batch's number and payload, replayed ones too; `replayed` is called at
    the end of each replay, `lost` at most once."""

    def __init__(
        self,
        received: Callable[[int, bytes], None],
        lost: Callable[[str], None],
        replayed: Callable[[], None] | None = None,
    ) -> None:
        self._received = received
        self._lost = lost
        self._replayed = replayed or _nothing
        self._folder: Path | None = None
        self._context: Any = None
        self._socket: Any = None
        self._replay: Any = None

    def settings(self) -> dict[str, Any]:
        """vLLM's `kv_events_config` for a private socket in a folder that only this user can enter; call once."""
        self._folder = Path(tempfile.mkdtemp(prefix="kvlane-kv-", dir=_short_folder()))
        return {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": f"ipc://{self._folder}/events",
            "hwm": _HIGH_WATER,
            "max_queue_size": _HIGH_WATER,
            "replay_endpoint": f"ipc://{self._folder}/replay",
            "buffer_steps": _KEPT_BATCHES,
        }

    async def open(self, endpoint: str, topic: str, replay_endpoint: str = "") -> None:
        """Subscribes to a running publisher. Raises `OSError` where nobody answers, within seconds.

        Returns once the connection stands, so that what the engine stores from now on comes through. With a
        `replay_endpoint`, `replay` works.
        """
        import zmq

        self._context = zmq.Context()
        socket = self._socket = self._context.socket(zmq.SUB)
        socket.setsockopt(zmq.RCVHWM, _HIGH_WATER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt_string(zmq.SUBSCRIBE, topic)
        monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        try:
            socket.connect(endpoint)
            if not await asyncio.to_thread(monitor.poll, _HANDSHAKE_S * 1e3):
                raise OSError(f"no KV event publisher answers at {endpoint}")
        finally:
            socket.disable_monitor()
            monitor.close(0)
        loop = asyncio.get_running_loop()
        if replay_endpoint:
            self._replay = self._context.socket(zmq.DEALER)
            self._replay.setsockopt(zmq.RCVHWM, 0)  # What were dropped here would be missing for good.
            self._replay.setsockopt(zmq.LINGER, 0)
            self._replay.connect(replay_endpoint)
            loop.add_reader(self._replay.fileno(), self.drain)
        loop.add_reader(socket.fileno(), self.drain)
        self.drain()

    def replay(self, start: int) -> None:
        """Asks for the batches from number `start` on, as far as the publisher still has them; `open` must have been
        given where. `replayed` is called after the last one.
        """
        import zmq

        if self._replay is not None:
            self._replay.send_multipart((b"", start.to_bytes(8, "big")), zmq.NOBLOCK)

    def drain(self) -> None:
        """Takes all batches that have come by now. Raises nothing of its own."""
        import zmq

        # The descriptors tell of changes only, so nothing may be left behind.
        try:
            while (socket := self._socket) is not None and (frames := _next(socket)) is not None:
                self._take(frames)
            while (socket := self._replay) is not None and (frames := _next(socket)) is not None:
                # An empty frame comes first here: the publisher takes us for a REQ socket.
                if len(frames) == 4 and frames[2] == _END_OF_REPLAY:
                    self._replayed()
                else:
                    self._take(frames[1:])
        except zmq.ZMQError as error:
            self.close()
            self._lost(f"the KV events' socket failed: {error}")

    def _take(self, frames: list[bytes]) -> None:
        if len(frames) == 3 and len(frames[1]) == 8:
            self._received(int.from_bytes(frames[1], "big"), frames[2])
        else:
            self.close()
            self._lost(f"a message that is no KV event batch: frames of {[len(frame) for frame in frames]} bytes")

    def close(self) -> None:
        """Stops listening and removes the socket's folder. May be called more than once."""
        for socket in (self._socket, self._replay):
            if socket is not None:
                with suppress(RuntimeError):  # No loop runs any more: it has let go of the descriptor.
                    asyncio.get_running_loop().remove_reader(socket.fileno())
                socket.close(0)
        self._socket = self._replay = None
        if self._context is not None:
            self._context.term()
            self._context = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def connectable(endpoint: str) -> str:
    """Where to connect for what vLLM's publisher binds. Raises `ValueError` for endpoints that cannot be followed."""
    if endpoint.startswith("ipc://"):
        return endpoint
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    if endpoint.startswith("tcp://") and port.isdecimal() and port != "0":
        if host in ("*", "0.0.0.0"):
            return f"tcp://127.0.0.1:{port}"
        if host == "[::]":
            return f"tcp://[::1]:{port}"
    raise ValueError(f"the KV events of kv_events_config cannot be followed: {endpoint!r} is not {_FOLLOWABLE}")


def _short_folder() -> str:
    """A folder whose path leaves room for the socket's; `mkdtemp` makes a private one in it."""
    usual = tempfile.gettempdir()
    return usual if len(usual) + 40 <= _LONGEST_PATH else "/tmp"


def _next(socket: Any) -> list[bytes] | None:
    """The next message; None where none is here."""
    import zmq

    # Asked first: the last look of each step finds nothing, and an exception costs more than to ask.
    if not socket.get(_EVENTS) & _POLLIN:
        return None
    try:
        frames: list[bytes] = socket.recv_multipart(zmq.NOBLOCK)
    except zmq.Again:
        return None
    return frames


def _nothing() -> None:
    """For those who ask for no replays."""
