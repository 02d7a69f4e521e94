"""The gRPC server's port: its arguments, its address, and TLS as grpc's own server takes it.

Rule: whatever cannot be used is a `ConfigError` that names the option at fault.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import grpc
import grpc.aio

from router.errors import ConfigError
from router.ingress.tls import Tls
from router.options import GrpcOptions


def server_options(options: GrpcOptions, *, reuse_port: bool) -> list[tuple[str, int]]:
    """The channel arguments of the server."""
    return [
        ("grpc.so_reuseport", int(reuse_port)),
        ("grpc.max_receive_message_length", options.max_message_bytes),
        ("grpc.max_send_message_length", -1),  # The bound on answers is the stream's buffer.
        ("grpc.max_concurrent_streams", options.max_concurrent_streams),
        ("grpc.keepalive_time_ms", round(options.keepalive_time_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(options.keepalive_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.max_connection_idle_ms", round(options.idle_timeout_s * 1000)),
        ("grpc.max_allowed_incoming_connections", options.max_connections),
        # How often clients may ping while they wait for a first token; grpc's default, 5 minutes, cuts them off.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]


def bind(server: grpc.aio.Server, options: GrpcOptions, tls: Tls | None) -> int:
    """Opens the configured port, with TLS where it is configured; returns its number. Raises `ConfigError`."""
    to = address(options)
    credentials = None if tls is None else _credentials(tls)
    try:
        port = server.add_secure_port(to, credentials) if credentials else server.add_insecure_port(to)
    except RuntimeError as error:
        raise ConfigError(f"the gRPC ingress cannot listen on {to}: {error}") from error
    if port == 0:
        raise ConfigError(f"the gRPC ingress cannot listen on {to}")
    return port


def address(options: GrpcOptions) -> str:
    """Where to listen, as one word."""
    return f"[{options.host}]:{options.port}" if ":" in options.host else f"{options.host}:{options.port}"


def _credentials(tls: Tls) -> grpc.ServerCredentials:
    """TLS for grpc, which asks for the files at each handshake. It tells nobody of handshakes that fail."""
    given = tls.pems

    def changed() -> grpc.ServerCertificateConfiguration | None:  # Called in grpc's own threads.
        nonlocal given
        if given is tls.pems:
            return None
        given = tls.pems
        return _certificates(given)

    first = _certificates(given)
    fetcher = cast("Callable[[], grpc.ServerCertificateConfiguration]", changed)  # None stands for no news.
    return grpc.dynamic_ssl_server_credentials(first, fetcher, require_client_authentication=given[2] is not None)


def _certificates(pems: tuple[bytes, bytes, bytes | None]) -> grpc.ServerCertificateConfiguration:
    chain, key, ca = pems
    return grpc.ssl_server_certificate_configuration([(key, chain)], root_certificates=ca)


def peer_name(address: Any) -> str:
    """A client's address as grpc writes it."""
    if not isinstance(address, tuple):
        return "unix:"
    host, port = address[:2]
    return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"


def speaks_h2(transport: asyncio.BaseTransport) -> bool:
    """Whether TLS, where there is any, has agreed on HTTP/2, as gRPC demands."""
    tls = transport.get_extra_info("ssl_object")
    return tls is None or tls.selected_alpn_protocol() == "h2"
