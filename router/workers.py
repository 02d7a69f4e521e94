"""Router processes: one in the foreground, or several on the same ports under a supervisor.

Job: run `App` until a signal, and keep the asked number of workers alive. Rule: a worker reads its whole configuration
from its standard input, so that no secret and no state crosses by other ways, and it ends when that pipe closes.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import msgspec
import uvloop

from router.app import SHUTDOWN_GRACE_S, App
from router.errors import ConfigError
from router.options import Config

log = logging.getLogger(__name__)

READY = b"ready "
"""What a child's line on standard output begins with once it serves."""
RESTART_DELAY_S = 1.0
STOP_MARGIN_S = 10.0
MAX_PORT = 65535


class Order(msgspec.Struct, frozen=True):
    """What a child process is told on its standard input, as one line of JSON."""

    config: Config
    reuse_port: bool = False
    """Whether it shares its ports with siblings. Alone, a second router on the same port shall fail, not share."""


def serve(config: Config, *, ready: Callable[[str], None]) -> int:
    """Serves until SIGINT or SIGTERM; returns the exit status. `ready` takes the line that tells the addresses."""
    return _run(Order(config), ready, parent_pipe=False)


def worker() -> int:
    """A child's main: an `Order` on standard input, one line `ready …` on standard output; ends with its parent."""
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)
    log_to_stderr(order.config)
    return _run(order, say, parent_pipe=True)


def spawn_arguments() -> list[str]:
    """The command line of a child that runs `worker`."""
    return [sys.executable, "-m", "router", "worker"]


def _run(order: Order, ready: Callable[[str], None], *, parent_pipe: bool) -> int:
    main = _foreground if order.config.workers == 1 else _supervise
    return uvloop.run(main(order, ready, parent_pipe))


def log_to_stderr(config: Config) -> None:
    """One line per record, on standard error."""
    logging.basicConfig(
        level=config.log.level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )


def say(line: str) -> None:
    """Prints a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def _foreground(order: Order, ready: Callable[[str], None], parent_pipe: bool) -> int:
    stop = _stop_event(parent_pipe)
    # Joining Ray puts a handler over ours that prints a stack trace and does not stop.
    app = App(order.config, reuse_port=order.reuse_port, joined=lambda: _stop_on_signals(stop))
    await app.start()
    announce = asyncio.create_task(_announce(app, ready))
    await stop.wait()
    log.info("stopping: streams in flight may end")
    announce.cancel()
    await asyncio.gather(announce, return_exceptions=True)
    await app.stop()
    return 0


async def _announce(app: App, ready: Callable[[str], None]) -> None:
    await app.wait_ready()
    ready(_address_line(app.config, app.http_port, app.grpc_port, app.admin_port))


def _address_line(config: Config, http_port: int, grpc_port: int, admin_port: int) -> str:
    words = ["ready"]
    if config.http.enabled:
        words.append(f"http=http://{config.http.host}:{http_port}")
    if config.grpc.enabled:
        words.append(f"grpc={config.grpc.host}:{grpc_port}")
    if config.admin.enabled:
        words.append(f"admin=http://{config.admin.host}:{admin_port}")
    return " ".join(words)


def _stop_event(parent_pipe: bool) -> asyncio.Event:
    """Set by SIGINT and SIGTERM, and with `parent_pipe` when the parent is gone."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    _stop_on_signals(stop)
    if parent_pipe:
        # Nothing more comes on it, so readable means closed; and closed it stays readable.
        def closed() -> None:
            loop.remove_reader(sys.stdin.fileno())
            stop.set()

        loop.add_reader(sys.stdin.fileno(), closed)
    return stop


def _stop_on_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)


async def _supervise(order: Order, ready: Callable[[str], None], parent_pipe: bool) -> int:
    stop, config = _stop_event(parent_pipe), order.config
    with ExitStack() as held:
        http, grpc = config.http, config.grpc
        if http.enabled:
            http = msgspec.structs.replace(http, port=held.enter_context(_reserved(http.host, http.port)))
        if grpc.enabled:
            grpc = msgspec.structs.replace(grpc, port=held.enter_context(_reserved(grpc.host, grpc.port)))
        fixed = msgspec.structs.replace(config, workers=1, http=http, grpc=grpc)
        waiting = set(range(config.workers))

        def told_ready(number: int) -> None:
            if waiting:
                waiting.discard(number)
                if not waiting:
                    ready(_address_line(fixed, http.port, grpc.port, config.admin.port))

        stopped = asyncio.create_task(stop.wait())
        keepers = [asyncio.create_task(_keep_worker(n, config_of(n, fixed), told_ready)) for n in range(config.workers)]
        done, _ = await asyncio.wait([stopped, *keepers], return_when=asyncio.FIRST_COMPLETED)
        status = next((keeper.result() for keeper in keepers if keeper in done), 0)
        for task in (stopped, *keepers):
            task.cancel()
        await asyncio.gather(stopped, *keepers, return_exceptions=True)
    return status


def config_of(worker: int, config: Config) -> Config:
    """A worker's own configuration: admin ports are not shared, so that each worker can be asked what it did."""
    admin = config.admin
    if not admin.enabled or not admin.port:
        return config
    if admin.port + worker > MAX_PORT:
        raise ConfigError(f"admin.port: {admin.port} leaves no port for worker {worker}")
    return msgspec.structs.replace(config, admin=msgspec.structs.replace(admin, port=admin.port + worker))


async def _keep_worker(number: int, config: Config, ready: Callable[[int], None]) -> int:
    """Runs one worker, again when it dies, until cancelled; then ends it and waits.

    Returns the status of one that ends before it was ever ready: another try would end the same way.
    """
    once_ready = False
    while True:
        process = await asyncio.create_subprocess_exec(
            *spawn_arguments(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C at the terminal reaches the supervisor alone
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(msgspec.json.encode(Order(config, reuse_port=True)) + b"\n")
            async for line in process.stdout:
                if line.startswith(READY):
                    once_ready = True
                    ready(number)
            status = await process.wait()
        finally:
            if process.returncode is None:
                await _end(process)
        log.error("worker %d ended with status %d", number, status)
        if not once_ready:
            return status or 1
        await asyncio.sleep(RESTART_DELAY_S)


async def _end(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(SHUTDOWN_GRACE_S + STOP_MARGIN_S):
            await process.wait()
    except TimeoutError:
        log.error("worker process %d did not stop in time and is killed", process.pid)
        process.kill()
        await process.wait()


@contextmanager
def _reserved(host: str, port: int) -> Iterator[int]:
    """Holds a port for the workers: bound, not listening, so it gets no connections itself."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            holder.bind((host, port))
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
        yield holder.getsockname()[1]
