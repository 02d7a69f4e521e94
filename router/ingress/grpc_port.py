"""The gRPC server's port: its arguments, its address, and TLS.

Rule: whatever cannot be used is a `ConfigError` that names the option at fault.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import grpc
import grpc.aio

from router.errors import ConfigError
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


def bind(server: grpc.aio.Server, options: GrpcOptions) -> int:
    """Opens the configured port, with TLS where it is configured; returns its number. Raises `ConfigError`."""
    to = address(options)
    credentials = _credentials(options)
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


def tls_context(options: GrpcOptions) -> ssl.SSLContext | None:
    """TLS where it is configured, for HTTP/2 alone. Raises `ConfigError` on files that cannot be used."""
    if not options.tls_cert_file and not options.tls_key_file:
        if options.tls_client_ca_file:
            raise ConfigError("grpc.tls_client_ca_file needs grpc.tls_cert_file and grpc.tls_key_file")
        return None
    if not options.tls_cert_file or not options.tls_key_file:
        raise ConfigError("grpc.tls_cert_file and grpc.tls_key_file go together")
    for option in ("tls_cert_file", "tls_key_file", "tls_client_ca_file"):
        if path := getattr(options, option):
            _read(path, f"grpc.{option}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    try:
        # An empty password: an encrypted key is refused here instead of asking for its password on the terminal.
        context.load_cert_chain(options.tls_cert_file, options.tls_key_file, password="")
    except ssl.SSLError as error:
        raise ConfigError(
            f"TLS: {options.tls_cert_file} and {options.tls_key_file} are no certificate chain with its key: {error}"
        ) from error
    if options.tls_client_ca_file:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(options.tls_client_ca_file)
        except ssl.SSLError as error:
            raise ConfigError(f"TLS: {options.tls_client_ca_file} holds no certificate: {error}") from error
    return context


def _credentials(options: GrpcOptions) -> grpc.ServerCredentials | None:
    """The same for grpc, which says of files that it cannot use no more than that it cannot bind."""
    if tls_context(options) is None:
        return None
    chain = _read(options.tls_cert_file, "grpc.tls_cert_file")
    key = _read(options.tls_key_file, "grpc.tls_key_file")
    roots = _read(options.tls_client_ca_file, "grpc.tls_client_ca_file") if options.tls_client_ca_file else None
    return grpc.ssl_server_credentials([(key, chain)], root_certificates=roots, require_client_auth=roots is not None)


def _read(path: str, option: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ConfigError(f"{option}: cannot read {path}: {error.strerror}") from error


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
