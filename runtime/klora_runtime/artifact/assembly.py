"""Builds a fusion from a document and the tensors of its file, and takes a fusion apart again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from klora_runtime.artifact import numbers
from klora_runtime.artifact.delta import Dense, LowRank, Stored
from klora_runtime.artifact.document import Document, SlotInFile, StoredTensor
from klora_runtime.artifact.factors import FORMS
from klora_runtime.artifact.file_tensor import FileTensor
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.artifact.making import made
from klora_runtime.artifact.schedule import EntryOf
from klora_runtime.artifact.tensor_file import dtype_of, identity
from klora_runtime.lazy_torch import torch

T = TypeVar("T")


def tensor_name(tensor: torch.Tensor | FileTensor) -> str:
    """Return a tensor's name in an artifact: a digest of dtype, shape and bytes, 32 hex digits."""
    return numbers.tensor_name(identity(tensor))


def fusion_of(document: Document, tensors: Mapping[str, torch.Tensor]) -> Fusion:
    """Return the fusion that a document and its tensors make.

    Args:
        tensors: the file's tensors by name.

    Raises:
        ArtifactError: a packed tensor is damaged; only reading its bytes shows that.
    """
    packed: Mapping[tuple[int, str], Stored] = {}
    if any(slot.quantised for entry in document.entries for slot in entry.factors.values()):
        from klora_runtime.artifact.q.codec import unpacked  # plain artifacts do not need it

        packed = unpacked(document, tensors)
    return _as(
        Fusion,
        document,
        entries=tuple(
            _as(
                Entry,
                entry,
                factors={
                    name: _plain(slot, tensors) if slot.quantised is None else packed[index, name]
                    for name, slot in entry.factors.items()
                },
            )
            for index, entry in enumerate(document.entries)
        ),
    )


def document_of(fusion: Fusion) -> tuple[Document, dict[str, torch.Tensor | FileTensor]]:
    """Return the document of a fusion and its tensors by name.

    Raises:
        ValueError: the numbers of a compressed delta do not fit its compression, or files cannot
            hold the dtype of a tensor.
    """
    tensors: dict[str, torch.Tensor | FileTensor] = {}

    def kept(tensor: torch.Tensor | FileTensor) -> StoredTensor:
        name = tensor_name(tensor)
        tensors.setdefault(name, tensor)
        return StoredTensor(name, dtype_of(tensor), tuple(tensor.shape))

    packed = {acts: kept(tensor) for acts, tensor in _packed(fusion).items()}

    def slot(stored: Stored, acts: bool) -> SlotInFile:
        kind = "dense" if isinstance(stored.delta, Dense) else "lowrank"
        if stored.quantised is not None:
            return SlotInFile(kind, stored.scale, {"packed": packed[acts]}, stored.quantised)
        parts = zip(FORMS[kind, "plain"].tensors, stored.delta.parts, strict=True)
        return SlotInFile(kind, stored.scale, {part: kept(tensor) for part, tensor in parts})

    entries: list[EntryOf[SlotInFile]] = [
        _as(
            EntryOf,
            entry,
            factors={
                name: slot(stored, entry.timeline.uses(name))
                for name, stored in entry.factors.items()
            },
        )
        for entry in fusion.entries
    ]
    return _as(Document, fusion, entries=tuple(entries)), tensors


def _plain(slot: SlotInFile, tensors: Mapping[str, torch.Tensor]) -> Stored:
    form = Dense if slot.kind == "dense" else LowRank
    parts = (tensors[slot.tensors[part].name] for part in FORMS[slot.kind, "plain"].tensors)
    return made(Stored, scale=slot.scale, delta=form(*parts), quantised=None)


def _packed(fusion: Fusion) -> dict[bool, torch.Tensor]:
    """Return the tensors that hold the compressed deltas: True -> of those that act, False -> rest.

    So a reader need not decode what never acts. If both would hold equal bytes, they would have one
    name; then one tensor holds all.
    """
    compressed = [
        (entry.factors[name], entry.shape, entry.timeline.uses(name))
        for entry in fusion.entries
        for name in sorted(entry.factors)
        if entry.factors[name].quantised is not None
    ]
    if not compressed:
        return {}
    from klora_runtime.artifact.q.codec import check_shape, pack_factors  # plain ones need none

    for stored, shape, _ in compressed:
        check_shape(stored, shape)
    packed = {
        acts: pack_factors([stored for stored, _, own in compressed if own is acts])
        for acts in {own for _, _, own in compressed}
    }
    if len(packed) == 2 and torch.equal(packed[True], packed[False]):
        return dict.fromkeys(packed, pack_factors([stored for stored, _, _ in compressed]))
    return packed


def _as(kind: type[T], value: Any, **changed: Any) -> T:
    """Convert a value to another class with the same fields, some of them changed."""
    own = vars(value)
    return made(kind, **{name: own[name] for name in value.__dataclass_fields__} | changed)
