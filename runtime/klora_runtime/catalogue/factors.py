"""The factors of one LoRA of a catalogue, read from its files once for all pairs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from klora_runtime.artifact.delta import Delta
from klora_runtime.artifact.references import (
    file_of_source,
    problems_of,
    read_source,
    stored_of,
)
from klora_runtime.artifact.schedule import Reference
from klora_runtime.catalogue.document import CataloguedLora
from klora_runtime.catalogue.folder import LoraFolder
from klora_runtime.errors import ArtifactError, KloraError, shown
from klora_runtime.lazy_torch import torch


@dataclass(frozen=True, eq=False)
class Factors:
    """The deltas of one LoRA in memory."""

    deltas: Sequence[Delta]
    """One for each layer of the LoRA's table."""

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(delta.nbytes for delta in self.deltas)


def read_factors(lora: CataloguedLora, folder: LoraFolder, device: torch.device) -> Factors:
    """Read the factors of a LoRA.

    Args:
        lora: the LoRA.
        folder: where its files are.
        device: where the factors are kept.

    Raises:
        ArtifactError: no file of the folder has its digest, or the file lacks a tensor.
        KloraError: the factors of its form are computed, which takes the compiler.
    """
    if lora.keys is None:
        raise KloraError(computed(lora))
    with ExitStack() as stack:
        files = {
            half: stack.enter_context(file_of_source(folder.file(source), source.file))
            for half, source in lora.sources.items()
        }
        tensors = {
            half: read_source(file, lora.sources[half].sha256) for half, file in files.items()
        }
        deltas, issues = [], []
        for place, keys in zip(lora.table.places, lora.keys, strict=True):
            reference = Reference(1.0, keys.half, keys.down, keys.up, keys.rows)
            file, name = files[keys.half], ".".join(place.path)
            found = list(problems_of(name, place.shape, reference, file))
            issues += found
            if not found:
                stored = stored_of(place.shape, reference, tensors[keys.half], device)
                deltas.append(stored.delta)
        if issues:
            raise ArtifactError("the LoRA lacks tensors that the catalogue names:", issues)
        return Factors(deltas)


def computed(lora: CataloguedLora) -> str:
    """Return why the runtime cannot read the factors of a LoRA."""
    return (
        f"the factors of {shown(lora.name)} are computed from its file, which takes the compiler. "
        "Write an artifact: klora catalogue get FILE SUBJECT STYLE --loras FOLDER -o OUT"
    )
