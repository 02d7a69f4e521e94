"""A private CA and certificates of it, made on the spot: for measuring what TLS costs, and for tests."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class Pair(NamedTuple):
    """Paths of a chain and its key."""

    cert: str
    key: str


class Authority:
    """A CA with its files in one directory."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._name = _named(name)
        self._key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(self._name, self._name, self._key).add_extension(x509.BasicConstraints(True, None), True)
        self.ca = str(directory / f"{name}.pem")
        _write(self.ca, builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, *addresses: str, days: int = 2) -> Pair:
        """A certificate for that name, files `name`.pem and `name`.key, and addresses it is good for too.

        A negative number of `days` makes one that has run out. Files are replaced whole, as mounted secrets are.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.DNSName(name), *(x509.IPAddress(ipaddress.ip_address(address)) for address in addresses)]
        builder = _builder(_named(name), self._name, key, days)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
        pair = Pair(str(self._directory / f"{name}.pem"), str(self._directory / f"{name}.key"))
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        _write(pair.key, private)
        _write(pair.cert, builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        return pair


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int = 2
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    began, ends = now - datetime.timedelta(days=3), now + datetime.timedelta(days=days)
    return builder.serial_number(x509.random_serial_number()).not_valid_before(began).not_valid_after(ends)


def _write(path: str, data: bytes) -> None:
    fresh = Path(f"{path}.new")
    fresh.write_bytes(data)
    fresh.chmod(0o600)
    fresh.replace(path)
