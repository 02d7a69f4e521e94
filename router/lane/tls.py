"""TLS on socket lanes: which certificates, what they must prove, and when their files are read again.

Both sides are kvlane's own, so only TLS 1.3 is spoken. What counts is the CA: it signs routers and replicas of this
installation and nothing else, so whoever shows a certificate of it belongs to them. Host names are not looked at unless
one is asked for: replicas are reached by addresses that the directory gives, which change with every pod, and a router
still has to prove that it knows the replica's secret. Rule: nobody falls back to plain bytes. `LaneTls` owns one
side's context; a lane that is open keeps what it was opened with.
"""

from __future__ import annotations

import logging
import os
import ssl
from typing import Final, Literal

import msgspec

from router.errors import ConfigError

log = logging.getLogger(__name__)

SHUTDOWN_TIMEOUT_S: Final = 5.0
"""For the last bytes of a lane and the peer's farewell."""

_Stamp = tuple[tuple[int, int, int], ...]


class TlsFiles(msgspec.Struct, frozen=True):
    """Paths of PEM files; empty where there is none."""

    cert: str = ""
    """The chain that this side shows."""
    key: str = ""
    ca: str = ""
    """Who must have signed the other side's certificate."""
    prefix: str = "lane.tls_"
    """How the options are named, up to ``cert_file``; for messages."""


class LaneTls:
    """One side's TLS: a context that holds what the files hold now."""

    def __init__(self, side: Literal["router", "replica"], files: TlsFiles, server_name: str = "") -> None:
        """Reads the files. With `server_name` a replica's certificate must be for that name.

        Raises `ConfigError` for files that cannot be used.
        """
        self.server_name = server_name
        self._side = side
        self._files = files
        self._stamp: _Stamp = self._look()
        self._refused: _Stamp = ()
        self._context = self._load()

    def context(self) -> ssl.SSLContext:
        """For one new lane. Files that changed are read again; while they cannot be used the last good ones serve."""
        try:
            stamp = self._look()
            if stamp not in (self._stamp, self._refused):
                # One that was refused is not tried again: a certificate is replaced before or after its key.
                self._refused = stamp
                self._context = self._load()
                self._stamp, self._refused = stamp, ()
                log.info("TLS of lanes: new certificates are in use")
        except ConfigError as error:
            log.error("TLS of lanes: the new files are not used, the last good ones are: %s", error.message)
        return self._context

    def _look(self) -> _Stamp:
        """What tells one state of the files from another; also where a mounted secret's link is turned."""
        return tuple(_stat(path, f"{self._files.prefix}{name}_file") for name, path in self._paths())

    def _paths(self) -> list[tuple[str, str]]:
        files = self._files
        return [(name, path) for name, path in (("cert", files.cert), ("key", files.key), ("ca", files.ca)) if path]

    def _load(self) -> ssl.SSLContext:
        server = self._side == "replica"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        if server:
            context.num_tickets = 0  # Lanes live for days; nobody resumes.
            context.verify_mode = ssl.CERT_REQUIRED if self._files.ca else ssl.CERT_NONE
        else:
            context.check_hostname = bool(self.server_name)
        self._load_files(context)
        return context

    def _load_files(self, context: ssl.SSLContext) -> None:
        files, prefix = self._files, self._files.prefix
        try:
            if files.cert:
                # An empty password: an encrypted key is refused instead of asking for its password on the terminal.
                context.load_cert_chain(files.cert, files.key, password="")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{prefix}cert_file: {files.cert} and {files.key} are no certificate chain with its key: "
                f"{_cause(error)}"
            ) from error
        try:
            if files.ca:
                context.load_verify_locations(files.ca)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{prefix}ca_file: {files.ca} holds no certificate: {_cause(error)}") from error


def _stat(path: str, option: str) -> tuple[int, int, int]:
    try:
        found = os.stat(path)
        with open(path, "rb"):  # Whether it may be read, which a look does not tell.
            return found.st_ino, found.st_size, found.st_mtime_ns
    except OSError as error:
        raise ConfigError(f"{option}: cannot read {path}: {error.strerror}") from error


def explain(error: BaseException) -> str:
    """Why TLS with the other side came to nothing, in one line; the same words on both sides."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate does not hold: {error.verify_message.rstrip('.')}"
    if isinstance(error, ssl.SSLError):
        return _REASONS.get(_reason(error)) or f"the handshake failed: {_cause(error)}"
    return f"the handshake was broken off: {str(error) or type(error).__name__}"


_NO_TLS: Final = "it does not speak TLS"
_REASONS: Final = {
    **dict.fromkeys(("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"), _NO_TLS),
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it showed no certificate",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it wants to see a certificate",
    **dict.fromkeys(
        (
            "TLSV1_ALERT_UNKNOWN_CA",
            "SSLV3_ALERT_BAD_CERTIFICATE",
            "SSLV3_ALERT_CERTIFICATE_EXPIRED",
            "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
            "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE",
            "TLSV1_ALERT_DECRYPT_ERROR",
        ),
        "it does not take this side's certificate",
    ),
}
"""OpenSSL's words for what goes wrong between two that are set up differently."""


def _cause(error: Exception) -> str:
    """OpenSSL's own words without the place in its source."""
    if isinstance(error, ssl.SSLError):
        return (_reason(error) or str(error)).replace("_", " ").lower()
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _reason(error: ssl.SSLError) -> str:
    return getattr(error, "reason", None) or ""  # Not all that the standard library makes have one.
