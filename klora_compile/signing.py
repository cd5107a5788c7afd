"""Signing of a file by OpenSSF model signing, with a key pair or a certificate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from klora_runtime.artifact.replacing import replacing
from klora_runtime.errors import ConfigError, shown
from klora_runtime.signature import signature_of, signing_library


def sign(
    file: Path,
    key: Path,
    *,
    certificate: Path | None = None,
    chain: Sequence[Path] = (),
    password: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Sign a file, and write the signature beside it.

    Args:
        file: the file.
        key: the private key, of the curve P-256, P-384 or P-521; a PEM file.
        certificate: the signer's certificate, with the usage ``digitalSignature``.
        chain: the certificates that it is from, up to the root.
        password: the password of an encrypted key.
        overwrite: replace an existing signature.

    Returns:
        The signature's path.

    Raises:
        ConfigError: the key or the certificate cannot be used.
        KloraError: the signature exists and ``overwrite`` is false, or cannot be written; or
            model-signing is not installed.
    """
    library = signing_library("signing")
    if file.is_symlink():
        raise ConfigError(f"{shown(file)} is a link; name the file itself.")
    signer = _signer(library, key, certificate, chain, password)
    place = signature_of(file)
    with replacing(place, overwrite=overwrite) as new:
        signer.sign(file, new)
        if certificate is not None:
            _refuse_useless(library, file, new, certificate, chain)
    return place


def _signer(
    library: Any, key: Path, certificate: Path | None, chain: Sequence[Path], password: str | None
) -> Any:
    config = library.signing.Config()
    try:
        if certificate is None:
            # The library hands the password on as it is, and bytes are expected there.
            secret: Any = None if password is None else password.encode()
            return config.use_elliptic_key_signer(private_key=key, password=secret)
        return config.use_certificate_signer(
            private_key=key,
            signing_certificate=certificate,
            certificate_chain=chain or [certificate],  # it refuses an empty chain
        )
    except OSError as error:
        raise ConfigError(f"{shown(error.filename)} cannot be read: {error.strerror}.") from error
    except Exception as error:  # in the types of several libraries
        also = "" if certificate is None else f", or {shown(certificate)} is not of this key"
        raise ConfigError(
            f"{shown(key)} is no private key of the curves P-256, P-384 and P-521 in PEM, or its "
            f"password is wrong{also}. Name others."
        ) from error


def _refuse_useless(
    library: Any, file: Path, signature: Path, certificate: Path, chain: Sequence[Path]
) -> None:
    """Refuse a certificate whose signatures nobody could verify."""
    config = library.verifying.Config()
    try:
        config.use_certificate_verifier(certificate_chain=[*chain, certificate])
        config.verify(file, signature)
    except Exception as error:  # in the types of several libraries
        raise ConfigError(
            f"{shown(certificate)} is no certificate to sign with. Make one with keyUsage "
            "digitalSignature, and name the certificates that it is from with --chain."
        ) from error
