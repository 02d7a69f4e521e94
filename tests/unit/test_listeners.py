"""The sockets that workers share, and who of them listens on which."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import msgspec
import pytest

from router.errors import ConfigError
from router.listeners import MAX_PORT, Listeners, admin_port, share
from router.options import AdminOptions, Config, GrpcOptions, HttpOptions

Make = Callable[..., Listeners]


@pytest.fixture
def make() -> Iterator[Make]:
    with ExitStack() as stack:

        def listeners(config: Config, before: Listeners | None = None) -> Listeners:
            made = Listeners(config, before)
            stack.callback(made.close)
            return made

        yield listeners


def config(workers: int = 2, **fields: Any) -> Config:
    parts: dict[str, Any] = {"http": HttpOptions(port=0), "grpc": GrpcOptions(port=0)} | fields
    return Config(workers=workers, **parts)


def port_of(listeners: Listeners) -> int:
    assert listeners.http is not None
    return listeners.http.port


def accepts(port: int) -> bool:
    return connects("127.0.0.1", port)


def test_every_worker_has_a_socket_at_each_address(make: Make) -> None:
    found = make(config(3, admin=AdminOptions(enabled=True, port=0)))
    assert found.http is not None
    assert found.grpc is not None
    assert [len(found.http.slots), len(found.grpc.slots), len(found.admin)] == [3, 3, 3]
    ports = {sock.getsockname()[1] for slot in found.http.slots for sock in slot}
    assert ports == {found.http.port}
    assert found.slots == 3
    settled = [found.settled(config(3, admin=AdminOptions(enabled=True, port=0)), worker) for worker in range(3)]
    assert {each.http.port for each in settled} == {found.http.port}
    assert len({each.admin.port for each in settled}) == 3
    assert all(each.workers == 1 for each in settled)


def test_nobody_is_accepted_before_a_worker_listens_and_nobody_is_reset_when_it_ceases(make: Make) -> None:
    found = make(config(1))
    assert not accepts(port_of(found))
    assert found.http is not None
    ((sock,),) = found.http.slots
    with sock.dup() as workers:
        workers.listen()
        client = socket.create_connection(("127.0.0.1", port_of(found)), timeout=5)
    with client, sock.dup() as successors:  # The first has closed its socket, and the client waits in the queue.
        successors.settimeout(5)
        accepted, _ = successors.accept()
        accepted.sendall(b"served")
        accepted.close()
        assert client.recv(10) == b"served"


def test_a_port_that_somebody_listens_on_is_refused_even_where_it_could_be_shared(make: Make) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f":{port}: Address already in use"):
            make(config(http=HttpOptions(port=port)))


def test_a_host_that_cannot_be_found_is_refused(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 203\.0\.113\.1:0"):
        make(config(http=HttpOptions(host="203.0.113.1", port=0)))


def test_a_name_that_cannot_be_one_is_refused(make: Make) -> None:
    with pytest.raises(ConfigError, match="not the name of a host"):
        make(config(http=HttpOptions(host=f"{'a' * 64}.example", port=0)))


def test_of_a_hosts_addresses_those_that_this_machine_lacks_are_left_out(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(*_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0)) for host in ("203.0.113.1", "127.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    made = make(config(1, grpc=GrpcOptions(enabled=False)))
    assert made.http is not None
    assert [sock.getsockname()[0] for sock in made.http.slots[0]] == ["127.0.0.1"]


def test_a_host_can_change_while_its_port_stays(make: Make) -> None:
    old = make(config(1))
    assert old.http is not None
    old.http.slots[0][0].listen()
    new = make(config(1, http=HttpOptions(host="0.0.0.0", port=old.http.port)), old)
    assert new.dropped == [old.http]
    assert new.http is not None
    assert new.http.slots[0][0].getsockname() == ("0.0.0.0", old.http.port)


def test_a_slot_that_cannot_be_bound_is_none(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    old = make(config(1))

    def exhausted(*_: Any) -> socket.socket:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(socket, "socket", exhausted)
        with pytest.raises(ConfigError, match="Too many open files"):
            make(config(2), old)
    assert old.slots == 1


def test_a_new_configuration_takes_the_sockets_of_the_same_addresses_over(make: Make) -> None:
    old = make(config(2))
    new = make(config(3), old)
    assert new.http is old.http
    assert new.grpc is old.grpc
    assert new.slots == 3
    assert new.dropped == []
    fewer = make(config(1), new)
    assert fewer.slots == 3  # Those too many are listened on by whoever is there.


def test_an_address_that_is_not_in_the_new_configuration_is_to_be_dropped(make: Make) -> None:
    old = make(config())
    new = make(config(http=HttpOptions(host="127.0.0.2", port=0), grpc=GrpcOptions(enabled=False)), old)
    assert new.http is not old.http
    assert new.dropped == [old.http, old.grpc]
    assert new.grpc is None


def test_a_configuration_that_cannot_be_bound_leaves_the_one_before_as_it_was(make: Make) -> None:
    old = make(config(1))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError):
            make(config(1, grpc=GrpcOptions(port=port)), old)
    assert old.http is not None
    old.http.slots[0][0].listen()
    assert accepts(port_of(old))


def test_an_abandoned_configuration_closes_only_what_was_bound_for_it(make: Make) -> None:
    old = make(config(1))
    new = make(config(1, grpc=GrpcOptions(host="127.0.0.2", port=0)), old)
    new.abandon()
    assert new.grpc is not None
    assert new.grpc.slots[0][0].fileno() == -1
    assert old.http is not None
    assert old.http.slots[0][0].fileno() >= 0


def test_each_worker_has_an_admin_port_of_its_own() -> None:
    given = Config(admin=AdminOptions(enabled=True, port=9100), workers=3)
    assert [admin_port(given, worker) for worker in range(3)] == [9100, 9101, 9102]
    anywhere = msgspec.structs.replace(given, admin=AdminOptions(enabled=True, port=0))
    assert admin_port(anywhere, 2) == 0
    last = msgspec.structs.replace(given, admin=AdminOptions(enabled=True, port=MAX_PORT))
    assert admin_port(last, 0) == MAX_PORT
    with pytest.raises(ConfigError, match=r"admin\.port"):
        admin_port(last, 1)


@pytest.mark.parametrize(
    ("slots", "ready", "started", "shares"),
    [
        (2, [0, 1], [], {0: (0,), 1: (1,)}),
        (2, [1], [0], {1: (0, 1)}),
        (2, [], [0, 1], {0: (0,), 1: (1,)}),
        (2, [], [1], {1: (0, 1)}),
        (4, [0, 1], [], {0: (0, 2), 1: (1, 3)}),
        (3, [0, 2], [1], {0: (0,), 2: (1, 2)}),
        (2, [], [], {}),
    ],
)
def test_every_slot_has_one_listener_as_long_as_there_is_any_worker(
    slots: int, ready: list[int], started: list[int], shares: dict[int, tuple[int, ...]]
) -> None:
    assert share(slots, ready, started) == shares


def test_what_was_bound_anew_is_open_before_a_worker_listens(make: Make) -> None:
    first = make(config())
    second = make(config(http=HttpOptions(port=0, host="127.0.0.2"), admin=AdminOptions(enabled=True, port=0)), first)
    assert second.http is not None
    ports = [(second.http.asked[0], second.http.port), *(("127.0.0.1", admin.port) for admin in second.admin)]
    assert not any(connects(*port) for port in ports)
    second.open()
    assert all(connects(*port) for port in ports)
    assert second.grpc is not None
    assert second.grpc is first.grpc
    assert not connects("127.0.0.1", second.grpc.port), "what was there before is its workers' to open"


def test_nobody_waits_where_only_grpcs_own_server_listens(make: Make) -> None:
    first = make(config(grpc=GrpcOptions(port=0, edge="h2")))
    assert first.grpc is not None
    port = first.grpc.port
    for slot in first.grpc.slots:
        slot[0].listen()  # As its workers do.
    second = make(config(grpc=GrpcOptions(port=port, edge="aio")), first)
    assert second.grpc is not None
    assert second.grpc.port == port
    assert first.grpc in second.dropped
    second.open()
    first.grpc.close()
    assert not connects("127.0.0.1", port)
    third = make(config(grpc=GrpcOptions(port=port, edge="h2")), second)
    third.open()
    assert connects("127.0.0.1", port)


@pytest.mark.parametrize("edges", [("h2", "aio"), ("aio", "h2")])
def test_another_edge_has_the_same_port_where_any_free_one_was_asked_for(make: Make, edges: tuple[str, str]) -> None:
    options = [config(grpc=GrpcOptions(port=0, edge=edge)) for edge in (*edges, edges[1])]  # type: ignore[arg-type]
    first = make(options[0])
    second = make(options[1], first)
    third = make(options[2], second)
    assert first.grpc is not None
    assert second.grpc is not None
    assert second.grpc is not first.grpc
    assert second.grpc.port == first.grpc.port
    assert third.grpc is second.grpc


def test_slots_that_an_abandoned_configuration_added_are_nobodys(make: Make) -> None:
    first = make(config(2))
    second = make(config(3), first)
    second.abandon()
    assert (first.slots, second.slots) == (2, 3)
    assert make(config(2), first).slots == 3, "those that were there are taken over with what waits in them"


def test_where_an_address_was_taken_meanwhile_none_is_opened(make: Make) -> None:
    first = make(config())
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        taken = AdminOptions(enabled=True, host="127.0.0.1", port=other.getsockname()[1])
        second = make(config(1, http=HttpOptions(host="127.0.0.2", port=0), admin=taken), first)
        assert second.http is not None
        copy = second.http.slots[0][0].dup()  # As a worker inherits it.
        other.listen()
        with pytest.raises(OSError, match="in use"):
            second.open()
        assert not connects("127.0.0.2", second.http.port)
        copy.close()


def connects(host: str, port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(5)
        return client.connect_ex((host, port)) == 0
