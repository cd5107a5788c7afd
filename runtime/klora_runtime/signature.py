"""Signatures of files by OpenSSF model signing: a bundle beside the file, and its check.

The library ``model_signing`` is imported only where a signature is made or asked for.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from klora_runtime.errors import ArtifactError, ConfigError, KloraError, shown

#: End of a bundle's name: ``fox.klora.safetensors.sig`` signs ``fox.klora.safetensors``.
SUFFIX = ".sig"

#: How the digest of a file is signed.
_WAY = {"method": "files", "hash_type": "sha256"}


def signature_of(file: Path) -> Path:
    """Return the place of a file's signature."""
    return file.with_name(file.name + SUFFIX)


def signed_digest(file: Path, signed_by: str | os.PathLike[str]) -> str:
    """Check the signature of an artifact, and return the digest that it signs.

    The library digests the file as it is now. A caller that reads the file later compares the
    digest with the bytes that it read.

    Args:
        file: the artifact; its signature lies beside it.
        signed_by: the signer's public key, or the certificate that the signer's own one is from or
            is; a PEM file.

    Returns:
        SHA-256 of the file, 64 hexadecimal digits.

    Raises:
        ArtifactError: there is no signature, it is none of this key, or it signs other bytes.
        ConfigError: ``signed_by`` is no public key and no certificate.
        KloraError: model-signing is not installed.
    """
    library, key, bundle = signing_library("signed_by"), Path(signed_by), signature_of(file)
    verifier = _verifier(library, key)
    if not bundle.is_file():
        raise ArtifactError(
            f"artifact {shown(file)} has no signature: there is no file {shown(bundle)}. Get it "
            "from the author."
        )
    stated = _stated(bundle)
    digests = _Digests(library)
    verifier.set_hashing_config(digests)
    try:
        verifier.verify(file, bundle)
    except Exception as error:  # in the types of several libraries
        if digests.found is None:
            raise ArtifactError(
                f"artifact {shown(file)} is not signed by {shown(key)}: its signature was made "
                "with another key, or altered. Ask the author for the right key."
            ) from error
        raise _other_bytes(file, key, stated, digests.found) from error
    assert digests.found is not None
    return digests.found


def signing_library(what: str) -> Any:
    """Return model_signing, or say what needs it.

    Raises:
        KloraError: it is not installed, or what it needs.
    """
    try:
        import model_signing
    except ModuleNotFoundError as error:
        raise KloraError(
            f"{what} needs model-signing, and {error.name} is not installed. Install it: pip "
            "install model-signing pyopenssl"
        ) from error
    return model_signing


class _Digests:
    """What digests a file for the library, once the key is right; it keeps the digest."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self.found: str | None = None

    def hash(self, model_path: Path, *, files_to_hash: Any = None) -> Any:
        config = self._library.hashing.Config().set_allow_symlinks(True)
        manifest = config.hash(model_path, files_to_hash=files_to_hash)
        (file,) = manifest.resource_descriptors()
        self.found = file.digest.digest_hex
        return manifest

    def add_ignored_paths(self, *, model_path: Path, paths: Iterable[Any]) -> None:
        """Ignore nothing: one file has no paths inside."""


def _verifier(library: Any, key: Path) -> Any:
    try:
        text = key.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"signed_by: {shown(key)} cannot be read: {error.strerror}. Name a public key or a "
            "certificate."
        ) from error
    if b"PRIVATE KEY" in text:
        raise ConfigError(f"signed_by: {shown(key)} is a private key; name the public one.")
    verifier = library.verifying.Config()
    try:
        if b"BEGIN CERTIFICATE" in text:
            return verifier.use_certificate_verifier(certificate_chain=[key])
        return verifier.use_elliptic_key_verifier(public_key=key)
    except Exception as error:  # in the types of several libraries
        raise ConfigError(
            f"signed_by: {shown(key)} is no certificate, and no public key of the curves P-256, "
            "P-384 and P-521, in PEM. Name one."
        ) from error


def _stated(bundle: Path) -> Mapping[str, Any]:
    """Return what a bundle says that it signs; only the words of errors rely on it.

    Raises:
        ArtifactError: it is no bundle, or one that the library complains of on standard output.
    """
    try:
        whole = json.loads(bundle.read_bytes())
        stated = json.loads(base64.b64decode(whole["dsseEnvelope"]["payload"]))
        by_key = whole["verificationMaterial"].get("publicKey", {"hint": True})
        if by_key["hint"] and stated["subject"][0]["name"]:
            serialization = stated["predicate"]["serialization"]
            return {"name": stated["subject"][0]["name"], **{k: serialization[k] for k in _WAY}}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise ArtifactError(
        f"{shown(bundle)} is no signature by model-signing 1.0 or newer. Get it again."
    )


def _other_bytes(file: Path, key: Path, stated: Mapping[str, Any], found: str) -> ArtifactError:
    """Return the error for a good signature of other bytes."""
    if any(stated[each] != way for each, way in _WAY.items()):
        return ArtifactError(
            f"{shown(signature_of(file))} signs no SHA-256 of one file. Ask the author to sign it "
            "with klora sign."
        )
    if stated["name"] != file.name:
        return ArtifactError(
            f"{shown(signature_of(file))} signs another file, {shown(stated['name'])}. Get the "
            f"signature of {shown(file.name)}."
        )
    return ArtifactError(
        f"artifact {shown(file)} was changed after it was signed by {shown(key)}; it has sha256 "
        f"{found}. Get the file again."
    )
