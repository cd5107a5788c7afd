"""Key pairs and certificates of signers, as PEM files."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

_FROM = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True)
class Signer:
    """A signer's files."""

    key: Path
    public: Path
    certificate: Path
    """From the issuer, or from the signer alone."""

    @classmethod
    def into(
        cls,
        folder: Path,
        name: str,
        *,
        issuer: Signer | None = None,
        password: str | None = None,
        signs: bool = True,
    ) -> Signer:
        """Write them; ``signs`` says whether the certificate is for signatures."""
        key = ec.generate_private_key(ec.SECP256R1())
        secret = password.encode() if password else None
        lock = (
            serialization.BestAvailableEncryption(secret)
            if secret
            else serialization.NoEncryption()
        )
        files = cls(*(folder / f"{name}{end}" for end in (".pem", ".pub", ".crt")))
        pem = serialization.Encoding.PEM
        files.key.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, lock))
        spki = serialization.PublicFormat.SubjectPublicKeyInfo
        files.public.write_bytes(key.public_key().public_bytes(pem, spki))
        by = name if issuer is None else issuer.key.stem
        builder = (
            x509.CertificateBuilder()
            .subject_name(_called(name))
            .issuer_name(_called(by))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(_FROM)
            .not_valid_after(_FROM + datetime.timedelta(days=3650))
            .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), True)
        )
        if signs:
            builder = builder.add_extension(_usage(issues=issuer is None), True)
        own = key if issuer is None else _loaded(issuer.key)
        files.certificate.write_bytes(builder.sign(own, hashes.SHA256()).public_bytes(pem))
        return files


def _loaded(path: Path) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def _called(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])


def _usage(*, issues: bool) -> x509.KeyUsage:
    names = "content_commitment key_encipherment data_encipherment key_agreement crl_sign"
    others = dict.fromkeys([*names.split(), "encipher_only", "decipher_only"], False)
    return x509.KeyUsage(digital_signature=True, key_cert_sign=issues, **others)
