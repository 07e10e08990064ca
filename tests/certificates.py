"""Certificates for tests: an authority of one's own, and what it signs.

authority = Authority(tmp_path / "ours")
server = authority.sign("127.0.0.1")  # the file of a certificate and its key
context.load_verify_locations(authority.file)
"""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

PEM = serialization.Encoding.PEM


class Authority:
    """Signs certificates that count for a day; `file` is what those who trust it are given."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, folder.name)])
        self.file = folder / "authority.pem"
        is_authority = x509.BasicConstraints(ca=True, path_length=0)
        certificate = self._sign(self._name, self._key, is_authority)
        self.file.write_bytes(certificate.public_bytes(PEM))

    def sign(self, address: str) -> Path:
        """A certificate for who answers (or asks) at this IP address."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, address)])
        address_name = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
        plain = serialization.NoEncryption()
        file = self._folder / f"{address}.pem"
        file.write_bytes(
            key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, plain)
            + self._sign(name, key, address_name).public_bytes(PEM)
        )
        return file

    def _sign(
        self, name: x509.Name, key: ec.EllipticCurvePrivateKey, more: x509.ExtensionType
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        number = x509.random_serial_number()
        builder = x509.CertificateBuilder(self._name, name, key.public_key(), number)
        builder = builder.not_valid_before(now).not_valid_after(now + timedelta(days=1))
        return builder.add_extension(more, critical=False).sign(self._key, hashes.SHA256())
