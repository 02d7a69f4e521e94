"""Certificates for tests, made by the openssl command."""

from __future__ import annotations

import functools
import shutil
import ssl
import subprocess
from pathlib import Path
from typing import Any

_NEW = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=30)


class Certificate:
    """A self-signed one for localhost, with its key; for a server or for a client."""

    def __init__(self, folder: Path, name: str, days: int = 2) -> None:
        self.cert, self.key = folder / f"{name}.pem", folder / f"{name}.key"
        subject = ("-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost", "-days", str(days))
        openssl(*_NEW, *subject, "-keyout", str(self.key), "-out", str(self.cert))

    @property
    def options(self) -> dict[str, Any]:
        """Of an ingress that serves it."""
        return {"tls_cert_file": str(self.cert), "tls_key_file": str(self.key)}

    @functools.lru_cache(maxsize=16)  # noqa: B019
    def client(self, own: Certificate | None = None) -> ssl.SSLContext:
        """A client that trusts this one alone, and shows a certificate of its own where it has one."""
        context = ssl.create_default_context(cafile=str(self.cert))
        if own is not None:
            context.load_cert_chain(own.cert, own.key)
        return context

    def replace(self, other: Certificate) -> None:
        """The other one's files come in the place of these."""
        for mine, new in ((self.cert, other.cert), (self.key, other.key)):
            fresh = mine.with_suffix(".new")
            shutil.copy(new, fresh)
            fresh.replace(mine)
