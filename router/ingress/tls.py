"""TLS of a listening port: certificate, key and the CA of its clients, and how these change while it listens.

Rule: files that cannot be used are refused whole: at the start with a `ConfigError` that names the option, later by
leaving those in use as they are. Each connection takes the context of the moment in which it arrives, so a rotation
touches none that is open; tickets of the time before it are worth nothing, and a CA that was taken away vouches for
nobody.
"""

from __future__ import annotations

import ssl
from collections import deque
from typing import Final, Protocol

from router.errors import ConfigError
from router.ingress.certificates import expires_at
from router.options import GrpcOptions, HttpOptions

FILES: Final = ("tls_cert_file", "tls_key_file", "tls_client_ca_file")


class Shaker(Protocol):
    """Who is told how a handshake goes."""

    def began(self, shaking: Handshake, incoming: ssl.MemoryBIO) -> None:
        """The TLS object of a connection was made; `incoming` takes what came before."""

    def failed(self, error: ssl.SSLError) -> None:
        """The handshake failed; what TLS has to say of it to the client is on its way."""


class Handshake(ssl.SSLObject):
    """Tells when its handshake fails. The loop's own TLS would drop the connection and the alert that says why."""

    shaker: Shaker | None = None

    def do_handshake(self) -> None:
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            shaker, self.shaker = self.shaker, None
            if shaker is None:
                raise
            shaker.failed(error)
            raise ssl.SSLWantReadError from None  # Has the loop send the alert; then the shaker ends the connection.
        self.shaker = None


class Context(ssl.SSLContext):
    """A server's context, whose handshakes are watched."""

    sslobject_class = Handshake
    shakers: deque[Shaker]
    """Of the connections that are about to begin, in their order."""

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        made = super().wrap_bio(incoming, outgoing, server_side, server_hostname, session)
        assert isinstance(made, Handshake)
        made.shaker = self.shakers.popleft()
        made.shaker.began(made, incoming)
        return made


class Tls:
    """Of one port."""

    def __init__(self, section: str, options: HttpOptions | GrpcOptions, protocols: list[str]) -> None:
        """Reads the files of the options in that section; `protocols` are for ALPN. Raises `ConfigError`."""
        self.section = section
        self.paths = tuple(path for name in FILES if (path := getattr(options, name)))
        self._options = options
        self._protocols = protocols
        self.load()

    def load(self) -> None:
        """Reads the files again. Raises `ConfigError`, and nothing changes then."""
        options = self._options
        chain, key, ca = (self._read(name) for name in FILES)
        context = self._context()
        self._expires_at = expires_at(chain)
        self.context = context
        self.pems = chain, key, ca if options.tls_client_ca_file else None
        """Chain, key, and the clients' CA where they need one."""

    def expiry(self) -> float:
        """When the first certificate of the chain expires, in seconds since 1970."""
        return self._expires_at

    def _read(self, option: str) -> bytes:
        path: str = getattr(self._options, option)
        if not path:
            return b""
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise ConfigError(f"{self.section}.{option}: cannot read {path}: {error.strerror}") from error

    def _context(self) -> Context:
        options = self._options
        context = Context(ssl.PROTOCOL_TLS_SERVER)
        context.shakers = deque()
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION  # Costs us more than the client, as often as it likes.
        context.set_alpn_protocols(self._protocols)
        cert, key, ca = options.tls_cert_file, options.tls_key_file, options.tls_client_ca_file
        try:
            # An empty password: an encrypted key is refused here instead of asking for its password on the terminal.
            context.load_cert_chain(cert, key, password="")
        except ssl.SSLError as error:
            raise ConfigError(f"TLS: {cert} and {key} are no certificate chain with its key: {error}") from error
        if ca:
            context.verify_mode = ssl.CERT_REQUIRED
            try:
                context.load_verify_locations(ca)
            except ssl.SSLError as error:
                raise ConfigError(f"TLS: {ca} holds no certificate: {error}") from error
        return context


def server_tls(section: str, options: HttpOptions | GrpcOptions, protocols: list[str]) -> Tls | None:
    """TLS where it is configured. Raises `ConfigError` on files that cannot be used."""
    if not options.tls_cert_file and not options.tls_key_file:
        if options.tls_client_ca_file:
            raise ConfigError(f"{section}.tls_client_ca_file needs {section}.tls_cert_file and {section}.tls_key_file")
        return None
    if not options.tls_cert_file or not options.tls_key_file:
        raise ConfigError(f"{section}.tls_cert_file and {section}.tls_key_file go together")
    return Tls(section, options, protocols)


_REASONS: Final = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "no_certificate",
    "CERTIFICATE_VERIFY_FAILED": "bad_certificate",
    "HTTP_REQUEST": "plaintext",
    "WRONG_VERSION_NUMBER": "plaintext",
    "PACKET_LENGTH_TOO_LONG": "plaintext",
    "RECORD_LAYER_FAILURE": "plaintext",
    "UNSUPPORTED_PROTOCOL": "old_version",
}


def reason_of(error: ssl.SSLError) -> str:
    """Why a handshake failed, as a word of a closed set; ``by_client`` where the client has ended it by an alert."""
    reason = error.reason or ""
    return _REASONS.get(reason) or ("by_client" if "ALERT" in reason else "protocol")
