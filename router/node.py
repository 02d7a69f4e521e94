"""This router's own node in the Ray cluster: `ray start` as a child that is kept running, for a container beside Ray.

Job: a node without CPUs, which the router's processes need to be part of the cluster. Rule: no stream depends on it.
While it is away the workers go on with the lanes that they have; once it is back, others that belong to the new node
take over from them, as at a reload. `Node` owns the child, and ends it after the workers.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from router.membership import node_address
from router.membership.node_address import Address
from router.options import MembershipOptions

log = logging.getLogger(__name__)

RESTART_MIN_S: Final = 1.0
RESTART_MAX_S: Final = 30.0
"""Between two starts of a node that ends again and again."""
STEADY_S: Final = 60.0
"""A node that was up so long is started again soon."""
CONNECT_LIMIT_S: Final = 5.0
LOOK_S: Final = 0.5
STOP_LIMIT_S: Final = 5.0
"""For Ray's processes to end; then they are killed."""
LEAVE_S: Final = 2
"""For the head to hear that the node leaves, so that it need not find out."""
OBJECT_STORE_BYTES: Final = 75 << 20
"""Ray's least; routers put nothing there."""
LAST_LINES: Final = 5
"""Of what a node says that ends, for the log."""
LAST_WORDS_LIMIT_S: Final = 1.0

_TIED_RAY: Final = (
    "import ctypes, signal; ctypes.CDLL(None).prctl(1, signal.SIGTERM); from ray.scripts.scripts import main; main()"
)
"""Ray's command line, which gets SIGTERM when this process dies (1 is PR_SET_PDEATHSIG)."""


def command(options: MembershipOptions) -> list[str]:
    """What starts the node and stays with it. Raises `OSError` where its address cannot be told."""
    words = [sys.executable, "-c", _TIED_RAY, "start", "--block", "--disable-usage-stats"]
    words += [f"--address={options.ray_address}", f"--node-ip-address={node_address.node_ip(options)}"]
    words += ["--num-cpus=0", "--num-gpus=0", f"--object-store-memory={OBJECT_STORE_BYTES}"]
    words += ["--include-log-monitor=false", f"--labels={node_address.ROLE}={node_address.ROUTER}"]
    words += [f"--{name}={port}" for name, port in node_address.PORTS.items()]
    if options.node_tmp_dir:
        words.append(f"--temp-dir={options.node_tmp_dir}")
    return words


class Node:
    """Keeps the node up."""

    def __init__(self, options: MembershipOptions, renewed: Callable[[], None]) -> None:
        """`renewed` is called when another node is up in the place of one that has ended."""
        self._options = options
        self._renewed = renewed
        self._process: Process | None = None
        self._ups = 0

    async def run(self) -> None:
        """Until cancelled; `close` ends the node then."""
        loop = asyncio.get_running_loop()
        delay_s, told = RESTART_MIN_S, False
        while True:
            if not await _answers(node_address.head(self._options)):
                if not told:
                    told = True
                    log.warning("no Ray cluster answers at %s; the node waits for it", self._options.ray_address)
                await asyncio.sleep(RESTART_MIN_S)
                continue
            began, told = loop.time(), False
            await self._live()
            delay_s = RESTART_MIN_S if loop.time() - began > STEADY_S else delay_s
            log.info("the Ray node is started again in %g s", delay_s)
            await asyncio.sleep(delay_s)
            delay_s = min(RESTART_MAX_S, 2 * delay_s)

    async def _live(self) -> None:
        """One life of the node."""
        try:
            here = Address(node_address.node_ip(self._options), node_address.NODE_MANAGER)
            if await _answers(here):  # What answers there later would be taken for the node.
                log.error("the Ray node cannot be started: port %d of %s is in use", here.port, here.host)
                return
            self._process = process = await _started(command(self._options))
        except OSError as error:
            log.error("the Ray node cannot be started: %s", error)
            return
        log.info("joining the Ray cluster at %s as process %d", self._options.ray_address, process.pid)
        watch = asyncio.create_task(self._watch(here), name="watch of the Ray node")
        lines: deque[str] = deque(maxlen=LAST_LINES)
        reading = asyncio.create_task(_read(process, lines), name="output of the Ray node")
        try:
            status = await process.wait()
            await asyncio.wait([reading], timeout=LAST_WORDS_LIMIT_S)
        finally:
            for task in (watch, reading):
                task.cancel()
            await asyncio.gather(watch, reading, return_exceptions=True)
        log.error("the Ray node has ended with status %d; streams go on: %s", status, " | ".join(lines))

    async def _watch(self, here: Address) -> None:
        """Says when the node is up."""
        while not await _answers(here):
            await asyncio.sleep(LOOK_S)
        self._ups += 1
        log.info("the Ray node is up at %s", here.host)
        if self._ups > 1:
            log.info("workers of the new Ray node take over from those of the one before")
            self._renewed()

    async def close(self) -> None:
        """Has the node leave the cluster and waits for its end."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            async with asyncio.timeout(STOP_LIMIT_S):
                await process.wait()
        except TimeoutError:
            log.warning("the Ray node did not leave in time and is killed")
            process.kill()  # Its own children end with it, by their parent-death signal.
            await process.wait()


@asynccontextmanager
async def beside(options: MembershipOptions, renewed: Callable[[], None]) -> AsyncIterator[None]:
    """Keeps a node up meanwhile where the options ask for one, and buries orphans where nobody else would. `renewed` is
    the node's."""
    node = Node(options, renewed)
    tasks = [asyncio.create_task(node.run(), name="Ray node")] if options.join else []
    if os.getpid() == 1:
        tasks.append(asyncio.create_task(bury_orphans(), name="burial of orphans"))
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await node.close()


async def bury_orphans(interval_s: float = 1.0) -> None:
    """Takes notice of ended processes that fell to this one, a container's first, because their parents had ended.

    The event loop takes notice of its own children within moments, so what two looks in a row find is nobody's.
    """
    before = 0
    while True:
        await asyncio.sleep(interval_s)
        before = _bury(before)


def _bury(before: int) -> int:
    """Takes notice of one that was there already; returns which is to be looked at again."""
    pid = _ended()
    if pid and pid == before:
        os.waitpid(pid, os.WNOHANG)
        return 0
    return pid


def _ended() -> int:
    """Some child that has ended and that nobody has taken notice of; 0 for none."""
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return 0
    return found.si_pid if found is not None else 0


async def _started(words: list[str]) -> Process:
    environment = {**os.environ, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(LEAVE_S)}
    return await asyncio.create_subprocess_exec(
        *words,
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=environment,
        start_new_session=True,  # a Ctrl-C at the terminal ends the streams first
    )


async def _read(process: Process, lines: deque[str]) -> None:
    """Takes what it says, by chunks, so that no line is too long."""
    assert process.stdout is not None
    while chunk := await process.stdout.read(1 << 16):
        lines.extend(text for line in chunk.decode(errors="replace").splitlines() if (text := line.strip()))


async def _answers(address: Address | None) -> bool:
    """Whether anybody accepts connections there."""
    if address is None:
        return False
    try:
        async with asyncio.timeout(CONNECT_LIMIT_S):
            _, writer = await asyncio.open_connection(*address)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True
