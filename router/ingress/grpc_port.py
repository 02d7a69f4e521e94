"""The gRPC server's port: its arguments, its address, and TLS.

Pure start-up. Rule: whatever cannot be used is a `ConfigError` that names the option at fault.
"""

from __future__ import annotations

import ssl

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
        # How often clients may ping while they wait for a first token; grpc's default, 5 minutes, cuts them off.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]


def bind(server: grpc.aio.Server, options: GrpcOptions) -> int:
    """Opens the configured port, with TLS where it is configured; returns its number. Raises `ConfigError`."""
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"{host}:{options.port}"
    credentials = _credentials(options)
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ConfigError(f"the gRPC ingress cannot listen on {address}: {error}") from error
    if port == 0:
        raise ConfigError(f"the gRPC ingress cannot listen on {address}")
    return port


def _credentials(options: GrpcOptions) -> grpc.ServerCredentials | None:
    """TLS where it is configured. Raises `ConfigError` on files that are missing or cannot be read."""
    if not options.tls_cert_file and not options.tls_key_file:
        if options.tls_client_ca_file:
            raise ConfigError("grpc.tls_client_ca_file needs grpc.tls_cert_file and grpc.tls_key_file")
        return None
    if not options.tls_cert_file or not options.tls_key_file:
        raise ConfigError("grpc.tls_cert_file and grpc.tls_key_file go together")
    chain = _read(options.tls_cert_file, "grpc.tls_cert_file")
    key = _read(options.tls_key_file, "grpc.tls_key_file")
    roots = _read(options.tls_client_ca_file, "grpc.tls_client_ca_file") if options.tls_client_ca_file else None
    _check_pem(options)
    return grpc.ssl_server_credentials([(key, chain)], root_certificates=roots, require_client_auth=roots is not None)


def _check_pem(options: GrpcOptions) -> None:
    """Raises `ConfigError` on files that are no PEM or do not belong together: gRPC only says that it cannot bind."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # An empty password: an encrypted key is refused here instead of asking for its password on the terminal.
        context.load_cert_chain(options.tls_cert_file, options.tls_key_file, password="")
    except ssl.SSLError as error:
        raise ConfigError(
            f"TLS: {options.tls_cert_file} and {options.tls_key_file} are no certificate chain with its key: {error}"
        ) from error
    if options.tls_client_ca_file:
        try:
            context.load_verify_locations(options.tls_client_ca_file)
        except ssl.SSLError as error:
            raise ConfigError(f"TLS: {options.tls_client_ca_file} holds no certificate: {error}") from error


def _read(path: str, option: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ConfigError(f"{option}: cannot read {path}: {error.strerror}") from error
