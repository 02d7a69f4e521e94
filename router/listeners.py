"""The sockets that the workers of one router listen on, and who listens on which.

Job: bind them once, in the supervisor, and keep them through every worker's end. Rule: a listening socket is never
closed while anybody serves its address. The kernel spreads connections over the sockets of an address
(SO_REUSEPORT), and those that wait in one's queue, or are half open, would be reset with it. So each socket is a slot
that workers take over from each other with everything that waits there.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import msgspec

from router.errors import ConfigError
from router.options import Config

MAX_PORT: Final = 65535


class Address:
    """One address, with a slot for each worker."""

    def __init__(self, host: str, port: int, *, ours: bool = False) -> None:
        """Binds nothing yet. Raises `ConfigError` for an address that another process listens on; not where the port
        is `ours` already, at another host."""
        self.asked = host, port
        self.port = port
        """The one bound, where any free one was asked for."""
        self.slots: list[list[socket.socket]] = []
        """Of each slot a socket per address that the host's name stands for."""
        with _refusals(host, port):
            found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self._found = _present(dict.fromkeys((family, where) for family, _, _, _, where in found))
        if port and not ours:
            self._check_free()

    def _check_free(self) -> None:
        """Sharing is for workers: a second router on the same port shall fail."""
        for family, where in self._found:
            with _refusals(*self.asked), socket.socket(family, socket.SOCK_STREAM) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                _only_its_family(trial)
                trial.bind(where)

    def extend(self, slots: int) -> None:
        """Binds until there are so many slots. Raises `ConfigError`."""
        while len(self.slots) < slots:
            with ExitStack() as undo:
                slot = [self._bound(family, where, undo) for family, where in self._found]
                undo.pop_all()
            self.slots.append(slot)

    def _bound(self, family: int, where: Any, undo: ExitStack) -> socket.socket:
        with _refusals(*self.asked):
            sock = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            _only_its_family(sock)
            sock.bind((where[0], self.port, *where[2:]))
        self.port = sock.getsockname()[1]
        return sock

    def numbers(self) -> tuple[tuple[int, ...], ...]:
        """The descriptors of all slots."""
        return tuple(tuple(sock.fileno() for sock in slot) for slot in self.slots)

    def close(self) -> None:
        """Lets go of the sockets; whoever listens on one still has it."""
        for slot in self.slots:
            for sock in slot:
                sock.close()


class Listeners:
    """The addresses of one configuration; those that an earlier one had too are taken over from there."""

    def __init__(self, config: Config, before: Listeners | None = None) -> None:
        """Binds what is new. Raises `ConfigError`, and has bound nothing then."""
        http_before, grpc_before, admin_before = (
            (before.http, before.grpc, before.admin) if before else (None, None, [])
        )
        self._fresh: list[Address] = []
        self._aio = config.grpc.edge == "aio"
        """Then grpc's own server binds beside the slots, and who waited in the queue of one of these did so in vain."""
        self.http: Address | None = None
        self.grpc: Address | None = None
        self.admin: list[Address] = []
        try:
            if config.http.enabled:
                self.http = self._address(config.http.host, config.http.port, http_before, config.workers)
            if config.grpc.enabled:
                asked = config.grpc.host, config.grpc.port
                if grpc_before is not None and before is not None and before._aio is not self._aio:
                    self.grpc = self._bound_anew(*asked, grpc_before, config.workers)
                else:
                    self.grpc = self._address(*asked, grpc_before, config.workers)
            if config.admin.enabled:
                ports = [admin_port(config, worker) for worker in range(config.workers)]
                for worker, port in enumerate(ports):
                    there = admin_before[worker] if worker < len(admin_before) else None
                    self.admin.append(self._address(config.admin.host, port, there, 1))
        except ConfigError:
            for address in self._fresh:
                address.close()
            raise
        shared = [address for address in (self.http, self.grpc) if address is not None]
        self.slots = max((len(address.slots) for address in shared), default=0)
        """How many there are at the address that has the most; what a later configuration adds is not counted."""
        self.dropped = [each for each in (before.addresses() if before else ()) if each not in self.addresses()]
        """Those of the earlier configuration that nobody needs now; to be closed once its workers have ceased."""

    def _address(self, host: str, port: int, there: Address | None, slots: int) -> Address:
        if there is None or host != there.asked[0] or port not in (there.asked[1], there.port):
            there = Address(host, port, ours=there is not None and there.port == port)
            self._fresh.append(there)
        there.extend(slots)
        return there

    def _bound_anew(self, host: str, port: int, there: Address, slots: int) -> Address:
        """An address of its own, where that of before has the sockets of another kind of server."""
        kept = host == there.asked[0] and port in (there.asked[1], there.port)
        address = Address(host, there.port if kept else port, ours=kept or port == there.port)
        address.asked = host, port
        self._fresh.append(address)
        address.extend(slots)
        return address

    def addresses(self) -> list[Address]:
        return [address for address in (self.http, self.grpc, *self.admin) if address is not None]

    def open(self) -> None:
        """Who connects to what was bound anew waits from now on, and is not refused until a worker listens. Raises
        `OSError` where another process listens there by now."""
        opened: list[socket.socket] = []
        try:
            for address in self._fresh:
                for slot in address.slots if address is not self.grpc or not self._aio else ():
                    for sock in slot:
                        sock.listen()
                        opened.append(sock)
        except OSError:
            for sock in opened:
                sock.shutdown(socket.SHUT_RDWR)  # In workers that have it too.
            raise

    def abandon(self) -> None:
        """The configuration does not come about: closes what was bound for it alone."""
        for address in self._fresh:
            address.close()

    def close(self) -> None:
        for address in self.addresses():
            address.close()

    def settled(self, config: Config, worker: int = 0) -> Config:
        """A worker's own configuration, with the ports that were bound."""
        replace = msgspec.structs.replace
        http, grpc, admin = config.http, config.grpc, config.admin
        if self.http is not None:
            http = replace(http, port=self.http.port)
        if self.grpc is not None:
            grpc = replace(grpc, port=self.grpc.port)
        if self.admin:
            admin = replace(admin, port=self.admin[worker].port)
        return replace(config, workers=1, http=http, grpc=grpc, admin=admin)


def admin_port(config: Config, worker: int) -> int:
    """A worker's own, not shared, so that each worker can be asked what it did. Raises `ConfigError`."""
    port = config.admin.port
    if port and port + worker > MAX_PORT:
        raise ConfigError(f"admin.port: {port} leaves no port for worker {worker}")
    return port and port + worker


def share(slots: int, ready: Sequence[int], started: Sequence[int]) -> Mapping[int, tuple[int, ...]]:
    """Which worker listens on which slots.

    Each on its own, once it is ready. Until then another that is ready stands in for it; where none is, whoever has
    started listens, so that somebody can say that there is no replica.
    """
    found: dict[int, list[int]] = {}
    present = sorted(ready) or sorted(started)
    for slot in range(slots) if present else ():
        found.setdefault(slot if slot in present else present[slot % len(present)], []).append(slot)
    return {worker: tuple(slots) for worker, slots in found.items()}


def _present(found: Iterable[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """Those that this machine has, where it has any: names stand for IPv6 addresses even where there is no IPv6."""
    present = list(found)
    for each in tuple(present) if len(present) > 1 else ():
        family, where = each
        try:
            with socket.socket(family, socket.SOCK_STREAM) as trial:
                trial.bind((where[0], 0, *where[2:]))
        except OSError as error:
            if error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL) and len(present) > 1:
                present.remove(each)
    return present


@contextmanager
def _refusals(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    except UnicodeError as error:  # What a name that is none is refused with.
        raise ConfigError(f"cannot listen on {host}:{port}: not the name of a host") from error


def _only_its_family(sock: socket.socket) -> None:
    """An IPv6 socket takes no IPv4 clients, as with asyncio's own listeners: `::` and `0.0.0.0` are two addresses."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
