"""Reading and writing the file of a catalogue; ``runtime/CATALOGUE.md`` specifies it.

It is a safetensors file with one metadata key. The JSON and the tensors about pairs are read at
once, the numbers of a LoRA when they are first needed. Each tensor is compared with its digest.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Self, TypeVar

from klora_runtime.artifact.replacing import replacing
from klora_runtime.artifact.tensor_file import TensorFile, tensor_digest, write_tensors
from klora_runtime.catalogue.checks import PAIR_TENSORS, tensor_of_lora
from klora_runtime.catalogue.document import METADATA_KEY, Document, document_text, read_document
from klora_runtime.errors import ArtifactError, FileFormatError, shown
from klora_runtime.lazy_torch import torch
from klora_runtime.linking.numbers import Numbers

N = TypeVar("N", int, "torch.Tensor")

#: Rows of a LoRA's tensor before its Top-K sums.
_ROWS = ("scaling", "norm", "frobenius", "l1")

#: Numbers of LoRAs are at most this large: squares of it are float64 too.
_MOST = 1e100


@dataclass(frozen=True, eq=False)
class Pairs:
    """What is known of P pairs."""

    pairs: torch.Tensor
    """(P, 3) int32: numbers of content, style and kind; sorted."""
    gamma: torch.Tensor
    """(P, components) float64; -1 where it is undefined, 0 for pairs that are refused."""
    choices: torch.Tensor
    """(P, 16) uint8: digest of the choices; 0 for pairs that are refused."""

    def place_of(self, content: int, style: int) -> int | None:
        """Return the row of a pair; None if there is none."""
        wanted = _key(content, style)
        place = int(torch.searchsorted(self._keys, wanted))
        found = place < len(self._keys) and int(self._keys[place]) == wanted
        return place if found else None

    @cached_property
    def _keys(self) -> torch.Tensor:
        """(P,) int64: one number for each pair, ascending."""
        wide = self.pairs.to(torch.int64)
        return _key(wide[:, 0], wide[:, 1])


def _key(content: N, style: N) -> N:
    return content * 2**32 + style


class CatalogueFile:
    """An open catalogue, whose numbers are read when they are needed. Threads may share it.

    Args:
        path: the file.

    Raises:
        ArtifactError: the file breaks the format; ``issues`` lists every problem found.
    """

    def __init__(self, path: Path) -> None:
        self._lock = Lock()
        self._known: dict[int, Numbers] = {}
        try:
            self._file = TensorFile(path, "catalogue")
            try:
                self._where = f"catalogue {shown(path)}"
                self.document = read_document(self._file.metadata, self._file.tensors, self._where)
                self.pairs = self._pairs()
            except BaseException:
                self.close()
                raise
        except ArtifactError:
            raise
        except FileFormatError as error:
            raise ArtifactError(str(error)) from error

    def close(self) -> None:
        """Close the file."""
        self._file.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def numbers(self, lora: int) -> Numbers:
        """Return the numbers of a LoRA.

        Raises:
            ArtifactError: they are damaged.
        """
        known = self._known.get(lora)
        if known is not None:
            return known
        stated = self.document.loras[lora]
        values = self._tensor(tensor_of_lora(lora), stated.digest)
        scaling, norm, frobenius, l1, *sums = values.unbind()
        by_partner = dict(zip(stated.partners, sums, strict=True))
        known = Numbers(stated.table, stated.ranks, scaling, norm, frobenius, l1, by_partner)
        if not bool((values.abs() <= _MOST).all()) or bool((values[1:] < 0.0).any()):
            raise ArtifactError(f"{self._where}: the numbers of {shown(stated.name)} are no norms.")
        with self._lock:
            return self._known.setdefault(lora, known)

    def _pairs(self) -> Pairs:
        found = {name: self._tensor(name, self.document.digests[name]) for name in PAIR_TENSORS}
        pairs, gamma = found["pairs"], found["gamma"]
        ends = (len(self.document.loras), len(self.document.loras), len(self.document.kinds))
        if len(pairs):
            outside = (pairs.amin(0) < 0) | (pairs.amax(0) >= torch.tensor(ends))
            if bool(outside.any()):
                raise ArtifactError(f"{self._where}: its pairs name LoRAs that it does not hold.")
        if not bool((gamma.abs() <= _MOST).all()):
            raise ArtifactError(f"{self._where}: its gammas are out of range.")
        return Pairs(pairs, gamma, found["choices"])

    def _tensor(self, name: str, digest: str) -> torch.Tensor:
        try:
            found = self._file.tensor(name)
        except FileFormatError as error:
            raise ArtifactError(str(error)) from error
        if tensor_digest(found) != digest:
            raise ArtifactError(
                f"{self._where}: its tensor {name} was altered. Get the file again, or make it "
                "anew."
            )
        return found


def save_catalogue(
    document: Document,
    numbers: Sequence[Numbers],
    pairs: Pairs,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> int:
    """Write a catalogue, completely or not at all.

    Args:
        document: its JSON; its digests are filled in here.
        numbers: the numbers of each LoRA of the document.
        pairs: the pairs.
        path: the file.
        overwrite: replace an existing file.

    Returns:
        The number of bytes written.

    Raises:
        ArtifactError: the file cannot be written or read back.
    """
    tensors: dict[str, torch.Tensor] = {name: getattr(pairs, name) for name in PAIR_TENSORS}
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    loras = []
    for number, (lora, own) in enumerate(zip(document.loras, numbers, strict=True)):
        rows = [getattr(own, name) for name in _ROWS] + [own.sums[key] for key in lora.partners]
        tensors[tensor_of_lora(number)] = stacked = torch.stack(rows)
        loras.append(replace(lora, digest=tensor_digest(stacked)))
    text = document_text(replace(document, loras=tuple(loras), digests=digests))
    with replacing(Path(path), overwrite=overwrite, error=ArtifactError) as new:
        write_tensors(new, tensors, {METADATA_KEY: text})
        CatalogueFile(new).close()  # what the reader refuses never arrives
        return new.stat().st_size
