"""Reading and writing artifacts; ``runtime/FORMAT.md`` specifies the format.

An artifact is a safetensors file with one metadata key. Its value is canonical JSON, so equal
fusions give equal bytes. A tensor's name is its digest: an altered or swapped tensor no longer
matches its name, and a tensor used twice is stored once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from klora_runtime.artifact.assembly import document_of, fusion_of
from klora_runtime.artifact.document import METADATA_KEY, Document, document_text, read_document
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.artifact.numbers import damage, refuse_damaged
from klora_runtime.artifact.references import fill
from klora_runtime.artifact.replacing import replacing
from klora_runtime.artifact.safetensors_file import SafetensorsFile
from klora_runtime.artifact.tensor_file import (
    TensorFile,
    flat_bytes,
    memory_of,
    name_in_files,
    write_tensors,
)
from klora_runtime.errors import ArtifactError, FileFormatError, shown
from klora_runtime.hub.choosing import ARTIFACT
from klora_runtime.hub.fetching import located
from klora_runtime.lazy_torch import torch
from klora_runtime.signature import signed_digest


def load_fusion(
    path: str | os.PathLike[str],
    *,
    check: Literal["structure", "full"] = "structure",
    device: str | torch.device = "cpu",
    sources: Mapping[str, str | os.PathLike[str]] | None = None,
    weight_name: str | None = None,
    signed_by: str | os.PathLike[str] | None = None,
) -> Fusion:
    """Read an artifact, its data in one block, whatever the number of layers.

    Args:
        path: a ``.klora.safetensors`` file, or its name on the Hugging Face Hub: ``OWNER/NAME``,
            ``OWNER/NAME/FILE``, ``hf://OWNER/NAME@REVISION/FILE``, or its https address.
        check: ``structure`` checks the header, the JSON's digest and every reference, shape and
            range; ``full`` also compares every tensor with its digest, looks for NaN and infinity,
            and decodes compressed deltas that never act.
        device: where the factors that act are kept: in host memory, or on the GPU of the
            pipelines, which saves a transfer each time they are applied. A name that torch knows
            (``cuda:1``), or ``auto`` for the first GPU, else the CPU. Factors that never act stay
            in host memory.
        sources: for a thin artifact, source name -> the LoRA file that it was compiled from.
            Without them the fusion is read but cannot be applied (:attr:`Fusion.is_thin`).
        weight_name: the file in a repository of the Hub that has several.
        signed_by: a public key or a certificate, a PEM file. The signature beside the artifact
            (``FILE.sig``, from ``klora sign``) must be of it; this is checked before anything is
            read, and needs ``model-signing``. None accepts a file that nobody signed.

    Returns:
        The fusion. Factors have the dtypes of the file, or float32 if they are compressed.

    Raises:
        ArtifactError: the file breaks the format, a source is not the file that it was compiled
            from, or the file is not signed as ``signed_by`` asks; ``issues`` lists every problem
            found.
        ConfigError: ``sources`` names an unknown source, or the artifact is not thin; or there is
            no such device; or ``signed_by`` is no key; or the name on the Hub means no file, or
            several.
        KloraError: the Hub does not give the file, or model-signing is not installed.
    """
    from klora_runtime.devices.names import as_device  # it imports torch

    place, where = Path(located(path, ARTIFACT, weight_name)), as_device(device)
    sha256 = None if signed_by is None else signed_digest(place, signed_by)
    try:
        with TensorFile(place, "artifact") as file:
            document = read_document(file)
            tensors = file.block(where, _needed(document), sha256)
    except ArtifactError:
        raise
    except FileFormatError as error:
        raise ArtifactError(str(error)) from error
    if check == "full":
        refuse_damaged(place, (_damage(name, tensor) for name, tensor in tensors.items()))
    try:
        fusion = fusion_of(document, tensors)
        if check == "full":
            _decode(fusion)
    except ArtifactError as error:
        raise ArtifactError(f"artifact {shown(place)}: {error} Get the file again.") from error
    return fill(fusion, sources, where) if sources else fusion


def save_fusion(fusion: Fusion, path: str | os.PathLike[str], *, overwrite: bool = False) -> int:
    """Write ``fusion`` as an artifact, completely or not at all.

    The bytes go to a new file beside ``path`` that then replaces it in one step: a process that
    dies half-way leaves the old file unchanged. The new file is read back first, so a file that the
    reader refuses never arrives.

    Args:
        overwrite: replace an existing file.

    Returns:
        The number of bytes written.

    Raises:
        ArtifactError: ``path`` exists and ``overwrite`` is false, ``path`` cannot be written, or
            the fusion breaks the format.
    """
    place = Path(path)
    with replacing(place, overwrite=overwrite, error=ArtifactError) as new:
        try:
            document, tensors = document_of(fusion)
            metadata = {METADATA_KEY: document_text(document)}
        except (TypeError, ValueError, RecursionError) as error:
            raise ArtifactError(f"the fusion cannot be written: {shown(error)}.") from error
        write_tensors(new, tensors, metadata)
        try:
            with SafetensorsFile(new, "new artifact") as written:
                read_document(written)
        except FileFormatError as error:
            raise ArtifactError(
                f"{shown(place)} was not written, because it could not be read:",
                error.issues or [str(error)],
            ) from error
        return new.stat().st_size


def _needed(document: Document) -> set[str]:
    """Return the names of the tensors of slots that act."""
    return {
        tensor.name
        for entry in document.entries
        for slot in entry.acting.values()
        for tensor in slot.tensors.values()
    }


def _decode(fusion: Fusion) -> None:
    """Decode what :func:`fusion_of` left packed."""
    for entry in fusion.entries:
        for stored in entry.factors.values():
            assert stored.delta is not None


def _damage(name: str, tensor: torch.Tensor) -> str | None:
    """Return the damage of a loaded tensor; see :func:`damage`."""
    dtype, data = name_in_files(tensor.dtype), flat_bytes(tensor)
    assert dtype is not None  # it comes from a file
    return damage(name, dtype, tuple(tensor.shape), memory_of(data))
