"""The check of a whole artifact, document and numbers, by the least that it takes."""

from __future__ import annotations

import os
from pathlib import Path

from klora_runtime.artifact.document import Document, read_document
from klora_runtime.artifact.numbers import damage, refuse_damaged
from klora_runtime.artifact.safetensors_file import SafetensorsFile
from klora_runtime.errors import ArtifactError, FileFormatError
from klora_runtime.signature import signed_digest


def load_whole_document(
    path: str | os.PathLike[str], signed_by: str | os.PathLike[str] | None = None
) -> Document:
    """Read an artifact and check all of it: its document, and its numbers without keeping them.

    A compressed artifact is decoded, which needs torch.

    Args:
        path: the file.
        signed_by: see :func:`klora_runtime.load_fusion`.

    Raises:
        ArtifactError: the file breaks the format, tensors are damaged, or it is not signed as
            ``signed_by`` asks; ``issues`` lists every problem found.
        ConfigError, KloraError: see :func:`klora_runtime.load_fusion`.
    """
    place = Path(path)
    sha256 = None if signed_by is None else signed_digest(place, signed_by)
    try:
        with SafetensorsFile(place, "artifact") as file:
            document = read_document(file)
            if not document.is_compressed:
                refuse_damaged(place, (_damage(file, name) for name in file.tensors))
            if sha256 is not None:
                _require_digest(file, sha256)
    except ArtifactError:
        raise
    except FileFormatError as error:
        raise ArtifactError(str(error)) from error
    if document.is_compressed:
        from klora_runtime.artifact.file import load_fusion  # it imports torch

        load_fusion(place, check="full", signed_by=signed_by)
    return document


def _damage(file: SafetensorsFile, name: str) -> str | None:
    """Return the damage of a tensor of an open file; see :func:`damage`."""
    info = file.tensors[name]
    return damage(name, info.dtype, info.shape, memoryview(file.data(name)))


def _require_digest(file: SafetensorsFile, sha256: str) -> None:
    """Compare the digest of the document, as it was read, and of all numbers with a known one."""
    found = file.begun_digest()
    for name in sorted(file.tensors, key=lambda name: file.tensors[name].start):
        found.update(file.data(name))
    file.require_digest(sha256, found)
