"""The check of a whole artifact, document and numbers, by the least that it takes."""

from __future__ import annotations

import os
from pathlib import Path

from klora_runtime.artifact.document import Document, read_document
from klora_runtime.artifact.numbers import damage, refuse_damaged
from klora_runtime.artifact.safetensors_file import SafetensorsFile
from klora_runtime.errors import ArtifactError, FileFormatError


def load_whole_document(path: str | os.PathLike[str]) -> Document:
    """Read an artifact and check all of it: its document, and its numbers without keeping them.

    A compressed artifact is decoded, which needs torch.

    Raises:
        ArtifactError: the file breaks the format, or tensors are damaged; ``issues`` lists every
            problem found.
    """
    place = Path(path)
    try:
        with SafetensorsFile(place, "artifact") as file:
            document = read_document(file)
            if not document.is_compressed:
                refuse_damaged(place, (_damage(file, name) for name in file.tensors))
    except ArtifactError:
        raise
    except FileFormatError as error:
        raise ArtifactError(str(error)) from error
    if document.is_compressed:
        from klora_runtime.artifact.file import load_fusion  # it imports torch

        load_fusion(place, check="full")
    return document


def _damage(file: SafetensorsFile, name: str) -> str | None:
    """Return the damage of a tensor of an open file; see :func:`damage`."""
    info = file.tensors[name]
    return damage(name, info.dtype, info.shape, memoryview(file.data(name)))
