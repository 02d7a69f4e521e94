"""Router processes: under a supervisor that shares one port among several, or one alone.

Job: the main functions of the supervisor, of its workers, and of a router alone. Rule: a child reads its whole
configuration from its standard input, so that no secret and no state crosses by other ways, and it ends when that pipe
closes.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import msgspec
import uvloop

from router import node
from router.control import Order, address_line
from router.listeners import Listeners
from router.options import Config
from router.signals import stop_asked
from router.supervisor import Supervisor
from router.watched import WatchedFile


def serve(
    config: Config, *, read_again: Callable[[], Config], file: WatchedFile | None, ready: Callable[[str], None]
) -> int:
    """Serves until SIGINT or SIGTERM, at SIGHUP and when the `file` changes with what `read_again` returns; returns
    the exit status.

    `ready` takes the line that tells the addresses. Raises `ConfigError`.
    """
    return uvloop.run(_supervise(config, read_again, file, ready, parent_pipe=False))


def worker() -> int:
    """A child's main: an `Order` on standard input; ends with its parent.

    Not under a supervisor, it prints a line `ready …` on standard output once it serves.
    """
    # Unbuffered, so that nothing behind the line is taken, and the pipe's end can be waited for.
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as stdin:
        order = msgspec.json.decode(stdin.readline(), type=Order)
    log_to_stderr(order.config)
    if order.seat is None and order.config.workers > 1:
        return uvloop.run(_supervise(order.config, None, None, say, parent_pipe=True))
    from router import serving  # The supervisor needs none of it.

    if order.seat is None:
        return uvloop.run(serving.alone(order.config, say))
    return uvloop.run(serving.seated(order.config, order.seat))


def log_to_stderr(config: Config) -> None:
    """One line per record, on standard error, with the process it is of."""
    logging.basicConfig(
        level=config.log.level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("hpack").setLevel(logging.INFO)  # Below that it tells every header, keys among them.


def say(line: str) -> None:
    """Prints a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def _supervise(
    config: Config,
    read_again: Callable[[], Config] | None,
    file: WatchedFile | None,
    ready: Callable[[str], None],
    *,
    parent_pipe: bool,
) -> int:
    supervisor = Supervisor(config, read_again, file)

    def tell(listeners: Listeners) -> None:
        settled = listeners.settled(config)
        ready(address_line(settled, settled.http.port, settled.grpc.port, settled.admin.port))

    stop = stop_asked(parent_pipe=parent_pipe)
    async with node.beside(config.membership, supervisor.renew):
        return await supervisor.run(tell, stop)
