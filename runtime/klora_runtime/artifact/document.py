"""The JSON of an artifact as a value, in both directions: everything but the factors' numbers.

    file  <-- safetensors_file -->  text  <-- here -->  Document  <-- assembly -->  Fusion

A document holds the schedule, the sources and the scores, and names the tensors of the file that
hold the numbers of each slot. Nothing here needs torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klora_runtime.artifact.canonical import canonical_json, parse_json
from klora_runtime.artifact.checks import (
    FORMAT_NAME,
    FORMAT_VERSION,
    SOURCE_KEYS,
    check_document,
)
from klora_runtime.artifact.deflated import deflated, inflated
from klora_runtime.artifact.digests import text_digest
from klora_runtime.artifact.dtypes import DTYPES
from klora_runtime.artifact.factors import FORMS
from klora_runtime.artifact.making import made
from klora_runtime.artifact.q.form import Quantised
from klora_runtime.artifact.safetensors_file import SafetensorsFile, TensorInfo
from klora_runtime.artifact.schedule import (
    EntryOf,
    Reference,
    Rule,
    ScheduleOf,
    Slot,
    Source,
)
from klora_runtime.artifact.timeline import CLOCKS, Timeline
from klora_runtime.errors import ArtifactError, FileFormatError, shown

#: The one metadata key of an artifact.
METADATA_KEY = "klora"

_OUTER_KEYS = frozenset({"digest", "fusion"})


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file whose numbers are not read."""

    name: str
    """The tensor's digest, 32 hexadecimal digits."""
    dtype: str
    """A key of :data:`~klora_runtime.artifact.dtypes.DTYPES`."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * DTYPES[self.dtype].nbytes


@dataclass(frozen=True)
class SlotInFile:
    """The stored delta of one slot of one entry, as the JSON describes it."""

    kind: str
    """``lowrank`` or ``dense``."""
    scale: float
    """See :class:`~klora_runtime.artifact.delta.Stored`."""
    tensors: Mapping[str, StoredTensor]
    """Part -> tensor: ``down`` and ``up``, or ``delta``, or ``packed``, which slots share."""
    quantised: Quantised | None = None
    """How the file encodes the delta; None if it is not compressed."""

    @property
    def encoding(self) -> str:
        """``plain`` or ``q``."""
        return "plain" if self.quantised is None else "q"

    @property
    def rank(self) -> int | None:
        """Rank of the factors; None for a dense delta."""
        if self.kind != "lowrank":
            return None
        return len(self.quantised.levels) if self.quantised else self.tensors["down"].shape[0]

    def sizes(self) -> Mapping[Hashable, int]:
        """Return name of each tensor -> its bytes in the file."""
        return {tensor.name: tensor.nbytes for tensor in self.tensors.values()}


@dataclass(frozen=True, repr=False)
class Document(ScheduleOf[SlotInFile]):
    """A fusion as its file describes it, without the numbers."""

    @property
    def is_compressed(self) -> bool:
        """Whether some deltas are compressed."""
        return any(slot.quantised for entry in self.entries for slot in entry.factors.values())

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Name -> tensor, for all tensors of the file."""
        return {
            tensor.name: tensor
            for entry in self.entries
            for slot in entry.factors.values()
            for tensor in slot.tensors.values()
        }


def load_document(path: str | os.PathLike[str]) -> Document:
    """Read and check an artifact, except its numbers.

    Raises:
        ArtifactError: the file breaks the format; ``issues`` lists every problem found.
    """
    try:
        with SafetensorsFile(Path(path), "artifact") as file:
            return read_document(file)
    except ArtifactError:
        raise
    except FileFormatError as error:
        raise ArtifactError(str(error)) from error


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Return whether a file claims to be an artifact; it may still be broken."""
    try:
        with SafetensorsFile(Path(path), "artifact") as file:
            return METADATA_KEY in file.metadata
    except FileFormatError:
        return False


def read_document(file: SafetensorsFile) -> Document:
    """Read and check the document of an open file; see :func:`load_document`."""
    where = f"artifact {shown(file.path)}"
    if set(file.metadata) != {METADATA_KEY}:
        found = ", ".join(shown(key) for key in file.metadata) or "none"
        raise ArtifactError(
            f"{shown(file.path)} is not a klora artifact: expected exactly the metadata key "
            f"'{METADATA_KEY}', found {found}. A plain LoRA has to be compiled first: "
            "klora compile CONTENT STYLE -o OUT.klora.safetensors"
        )
    value = _opened(file.metadata[METADATA_KEY], where)
    check_document(value, file.tensors, where)
    return Document(
        sources={name: source_of(source) for name, source in value["sources"].items()},
        slots={
            name: Slot(slot["role"], tuple(slot["sources"]), slot["derived"])
            for name, slot in value["slots"].items()
        },
        rule=Rule(**value["rule"]),
        family=value["fits"]["family"],
        entries=tuple(_entry(entry, file.tensors) for entry in value["entries"]),
        tool=value["tool"],
        families=tuple(value["fits"].get("families", ())),
        clock=value.get("clock", CLOCKS[0]),
    )


def document_text(document: Document) -> str:
    """Return the value of the file's metadata key for a document.

    Raises:
        ValueError, TypeError: JSON cannot hold a value of the document, or a source's note has the
            name of another key.
    """
    inner = canonical_json(
        {
            "format": {"name": FORMAT_NAME, "version": FORMAT_VERSION},
            "tool": document.tool,
            "sources": {name: source_json(source) for name, source in document.sources.items()},
            "slots": {
                name: {"role": slot.role, "sources": list(slot.sources), "derived": slot.derived}
                for name, slot in document.slots.items()
            },
            "rule": {
                "name": document.rule.name,
                "parameters": dict(document.rule.parameters),
                "derived": dict(document.rule.derived),
            },
            "fits": _fits_json(document),
            "entries": [_entry_json(entry) for entry in document.entries],
            **({} if document.clock == CLOCKS[0] else {"clock": document.clock}),
        }
    )
    text = _enveloped(text_digest(inner), inner)
    if not _is_large(document):
        return text
    return deflated(text)


def _fits_json(document: Document) -> dict[str, Any]:
    fits: dict[str, Any] = {"family": document.family, "fingerprint": document.fingerprint}
    if document.families:
        fits["families"] = list(document.families)
    return fits


# --- around the JSON: digest and deflate ------------------------------------------------------


def _opened(text: str, where: str) -> Any:
    """Return the value of ``fusion`` after checking its digest and its spelling."""
    try:
        text = inflated(text)
        canonical = _canonical(text)
        outer = parse_json(text) if canonical is None else canonical[0]
        if not isinstance(outer, dict) or outer.keys() != _OUTER_KEYS:
            raise ArtifactError(f"{where}: its JSON needs exactly the keys digest and fusion.")
        inner = canonical_json(outer["fusion"]) if canonical is None else canonical[1]
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where}: its JSON cannot be read: {shown(error)}.") from error
    computed = text_digest(inner)
    if outer["digest"] != computed:
        raise ArtifactError(
            f"{where}: its JSON was altered: digest {shown(outer['digest'])} is stated, "
            f"{computed} was computed. Get the file again from its source."
        )
    if canonical is None:
        raise ArtifactError(
            f"{where}: its JSON was rewritten: it is not in canonical form (sorted keys, no "
            "spaces, ASCII, shortest numbers). Get the file again from its source."
        )
    return outer["fusion"]


def _canonical(text: str) -> tuple[dict[str, Any], str] | None:
    """Return the value of a canonical text and the text of ``fusion``; None for any other text."""
    try:
        outer = parse_json(text, canonical=True)
        if not isinstance(outer, dict) or outer.keys() != _OUTER_KEYS:
            return None
        inner = canonical_json(outer["fusion"])  # most of the text, so it is written once
        whole = _enveloped(outer["digest"], inner)
    except (ValueError, RecursionError):
        return None
    return (outer, inner) if text == whole else None


def _enveloped(digest: object, inner: str) -> str:
    return f'{{"digest":{canonical_json(digest)},"fusion":{inner}}}'


def _is_large(document: Document) -> bool:
    """Return whether the JSON is a large part of the file: factors are compressed or absent."""
    return document.is_thin or any(
        slot.quantised is not None for entry in document.entries for slot in entry.factors.values()
    )


# --- parts: from checked JSON to values, and from values to JSON -------------------------------


def source_of(value: Mapping[str, Any]) -> Source:
    """Return the source of checked JSON."""
    return Source(
        file=value["file"],
        sha256=value["sha256"],
        bytes=value["bytes"],
        layout=value["layout"],
        ranks=tuple(value["ranks"]),
        trigger_words=tuple(value["trigger_words"]),
        license=value["license"],
        notes={key: note for key, note in value.items() if key not in SOURCE_KEYS},
    )


def source_json(source: Source) -> dict[str, object]:
    """Return the JSON of a source.

    Raises:
        ValueError: a note has the name of another key.
    """
    stated: dict[str, object] = {
        "file": source.file,
        "sha256": source.sha256,
        "bytes": source.bytes,
        "layout": source.layout,
        "ranks": list(source.ranks),
        "trigger_words": list(source.trigger_words),
        "license": source.license,
    }
    clashes = sorted(stated.keys() & source.notes.keys())
    if clashes:
        raise ValueError(f"notes of source {shown(source.file)} may not be called {clashes}")
    return {**stated, **source.notes}


def _entry(value: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> EntryOf[SlotInFile]:
    rows, factors = value["timeline"], value["factors"]
    slots = [key for key in rows[0] if key != "from"]
    references = {name for name, stored in factors.items() if stored["kind"] == "reference"}
    return made(
        EntryOf,
        component=value["component"],
        module=value["module"],
        parameter=value["parameter"],
        shape=tuple(value["shape"]),
        fate=value["fate"],
        timeline=made(
            Timeline,
            starts=tuple([float(row["from"]) for row in rows]),
            coefficients={slot: tuple([float(row[slot]) for row in rows]) for slot in slots},
        ),
        factors={
            name: _slot_in_file(stored, tensors)
            for name, stored in factors.items()
            if name not in references
        },
        scores=value["scores"],
        references={name: _reference(factors[name]) for name in factors if name in references},
    )


def _entry_json(entry: EntryOf[SlotInFile]) -> dict[str, object]:
    return {
        "component": entry.component,
        "module": entry.module,
        "parameter": entry.parameter,
        "shape": list(entry.shape),
        "fate": entry.fate,
        "timeline": [{"from": start, **row} for start, row in entry.timeline.rows()],
        "factors": {
            **{name: _slot_json(slot) for name, slot in entry.factors.items()},
            **{name: _reference_json(each) for name, each in entry.references.items()},
        },
        "scores": dict(entry.scores),
    }


def _slot_in_file(value: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> SlotInFile:
    named = {part: value[part] for part in FORMS[value["kind"], value["encoding"]].tensors}
    quantised = None
    if value["encoding"] == "q":
        levels = tuple(value["levels"])
        quantised = Quantised(float(value["step"]), levels, float(value["error"]))
    parts = {}
    for part, name in named.items():
        info = tensors[name]
        parts[part] = made(StoredTensor, name=name, dtype=info.dtype, shape=info.shape)
    return made(
        SlotInFile,
        kind=value["kind"],
        scale=float(value["scale"]),
        tensors=parts,
        quantised=quantised,
    )


def _slot_json(slot: SlotInFile) -> dict[str, object]:
    how = slot.quantised
    return {
        "kind": slot.kind,
        "encoding": slot.encoding,
        "scale": slot.scale,
        **{part: tensor.name for part, tensor in slot.tensors.items()},
        **({"step": how.step, "levels": list(how.levels), "error": how.error} if how else {}),
    }


def _reference(value: Mapping[str, Any]) -> Reference:
    rows = None if value["rows"] is None else tuple((begin, end) for begin, end in value["rows"])
    return Reference(float(value["scale"]), value["source"], value["down"], value["up"], rows)


def _reference_json(reference: Reference) -> dict[str, object]:
    return {
        "kind": "reference",
        "encoding": "plain",
        "scale": reference.scale,
        "source": reference.source,
        "down": reference.down,
        "up": reference.up,
        "rows": None if reference.rows is None else [list(pair) for pair in reference.rows],
    }
