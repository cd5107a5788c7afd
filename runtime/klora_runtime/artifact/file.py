"""Reading and writing the one file that is shipped; the format itself is ``runtime/FORMAT.md``.

The file is a safetensors file with one metadata key. Its value is canonical JSON, so that equal
fusions are equal bytes. Tensors are named by their own digest: a tensor that was altered or
swapped no longer fits its name, and a tensor used twice is stored once.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from klora_runtime.artifact.canonical import canonical_json, parse_json
from klora_runtime.artifact.checks import (
    FORMAT_NAME,
    FORMAT_VERSION,
    CheckedDocument,
    check_document,
)
from klora_runtime.artifact.delta import is_finite
from klora_runtime.artifact.factors import factors_json, reference_json
from klora_runtime.artifact.fusion import Entry, Fusion, Source
from klora_runtime.artifact.q.packed import check_shape, pack_factors
from klora_runtime.artifact.references import fill
from klora_runtime.artifact.replacing import replacing
from klora_runtime.artifact.safetensors_file import MAX_HEADER_BYTES, SafetensorsFile
from klora_runtime.artifact.tensor_file import TensorFile, tensor_digest, write_tensors
from klora_runtime.devices.names import as_device
from klora_runtime.errors import ArtifactError, FileFormatError, shown

METADATA_KEY = "klora"
_OUTER_KEYS = frozenset({"digest", "fusion"})
_DEFLATED = "deflate:"
_NAME_DIGITS = 32


def load_fusion(
    path: str | os.PathLike[str],
    *,
    check: Literal["structure", "full"] = "structure",
    device: str | torch.device = "cpu",
    sources: Mapping[str, str | os.PathLike[str]] | None = None,
) -> Fusion:
    """Read an artifact: its data in one piece, whatever the number of layers.

    Args:
        path: a ``.klora.safetensors`` file.
        check: ``structure`` checks the header, the JSON's digest and every reference, shape and
            range; ``full`` also reads every tensor, compares it with its digest and looks for NaN
            and infinity.
        device: where the factors are kept: in host memory, or on the GPU of the pipelines that
            they are for, which saves sending them again whenever they are applied; see
            :func:`klora_runtime.devices.names.as_device`.
        sources: of a thin artifact: source name -> the LoRA file that it was compiled from.
            Without them it is read and cannot be applied (:attr:`Fusion.is_thin`).

    Returns:
        The fusion, its factors in the dtypes of the file, or in float32 where they are compressed.

    Raises:
        ArtifactError: the file breaks the format, or a source is not the one that it was compiled
            from; ``issues`` lists every problem found.
        ConfigError: ``sources`` has a name that the artifact does not have, or it is not thin;
            there is no such device.
    """
    place, where = Path(path), as_device(device)
    try:
        with TensorFile(place, "artifact") as file:
            plan = _checked(file)
            tensors = file.block(where)
    except ArtifactError:
        raise
    except FileFormatError as error:
        raise ArtifactError(str(error)) from error
    if check == "full":
        _check_tensors(place, tensors)
    try:
        fusion = plan.fusion(tensors)
    except ArtifactError as error:
        raise ArtifactError(f"artifact {shown(place)}: {error} Get the file again.") from error
    return fill(fusion, sources, where) if sources else fusion


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Whether a file says that it is an artifact; it may still be a broken one."""
    try:
        with SafetensorsFile(Path(path), "artifact") as file:
            return METADATA_KEY in file.metadata
    except FileFormatError:
        return False


def save_fusion(fusion: Fusion, path: str | os.PathLike[str], *, overwrite: bool = False) -> int:
    """Write ``fusion`` as an artifact, whole or not at all.

    The bytes go to a new file beside ``path``, which then takes its place in one step: a
    process that dies half-way leaves an old file as it was. A file that the reader would
    refuse never gets there.

    Args:
        overwrite: replace an existing file.

    Returns:
        Bytes written.

    Raises:
        ArtifactError: ``path`` exists and ``overwrite`` is false, it cannot be written, or the
            fusion breaks the format.
    """
    place = Path(path)
    with replacing(place, overwrite=overwrite, error=ArtifactError) as new:
        try:
            document, tensors = _serialise(fusion)
            metadata = {METADATA_KEY: _text(document, deflated=_is_small(fusion))}
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"the fusion cannot be written: {shown(error)}.") from error
        write_tensors(new, tensors, metadata)
        try:
            with SafetensorsFile(new, "new artifact") as written:
                _checked(written)
        except FileFormatError as error:
            raise ArtifactError(
                f"{shown(place)} was not written, because it could not be read:",
                error.issues or [str(error)],
            ) from error
        return new.stat().st_size


def tensor_name(tensor: torch.Tensor) -> str:
    """Name of a tensor in an artifact: digest over its dtype, shape and bytes, 32 hex digits."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    text = f"{dtype} {list(tensor.shape)} {tensor_digest(tensor)}"
    return hashlib.sha256(text.encode()).hexdigest()[:_NAME_DIGITS]


def _checked(file: SafetensorsFile) -> CheckedDocument:
    return check_document(_document(file), file.tensors, f"artifact {shown(file.path)}")


def _document(file: SafetensorsFile) -> Any:
    if set(file.metadata) != {METADATA_KEY}:
        found = ", ".join(shown(key) for key in file.metadata) or "none"
        raise ArtifactError(
            f"{shown(file.path)} is not a klora artifact: expected exactly the metadata key "
            f"'{METADATA_KEY}', found {found}. A plain LoRA has to be compiled first: "
            "klora compile CONTENT STYLE -o OUT.klora.safetensors"
        )
    where = f"artifact {shown(file.path)}"
    try:
        text = _inflated(file.metadata[METADATA_KEY])
        canonical = _canonical(text)
        outer = parse_json(text) if canonical is None else canonical[0]
        if not isinstance(outer, dict) or outer.keys() != _OUTER_KEYS:
            raise ArtifactError(f"{where}: its JSON needs exactly the keys digest and fusion.")
        expected = _digest(canonical_json(outer["fusion"]) if canonical is None else canonical[1])
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where}: its JSON cannot be read: {shown(error)}.") from error
    if outer["digest"] != expected:
        raise ArtifactError(
            f"{where}: its JSON was altered: digest {shown(outer['digest'])} is stated, "
            f"{expected} was computed. Get the file again from its source."
        )
    if canonical is None:
        raise ArtifactError(
            f"{where}: its JSON was rewritten: it is not in canonical form (sorted keys, no "
            "spaces, ASCII, shortest numbers). Get the file again from its source."
        )
    return outer["fusion"]


def _canonical(text: str) -> tuple[dict[str, Any], str] | None:
    """The values of a text in canonical form, and its part ``fusion``; None for any other text."""
    try:
        outer = parse_json(text, canonical=True)
        if not isinstance(outer, dict) or outer.keys() != _OUTER_KEYS:
            return None
        inner = canonical_json(outer["fusion"])  # most of the text, so it is written once
        whole = f'{{"digest":{canonical_json(outer["digest"])},"fusion":{inner}}}'
    except (ValueError, RecursionError):
        return None
    return (outer, inner) if text == whole else None


def _is_small(fusion: Fusion) -> bool:
    """Whether the JSON would be a large part of the file: factors compressed, or elsewhere."""
    return fusion.is_thin or any(
        stored.quantised is not None
        for entry in fusion.entries
        for stored in entry.factors.values()
    )


def _text(document: object, *, deflated: bool) -> str:
    text = canonical_json(document)
    if not deflated:
        return text
    return _DEFLATED + base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def _inflated(text: str) -> str:
    """The JSON of a file's metadata, which may be compressed.

    Raises:
        ValueError: it is damaged, or longer than a header may be.
    """
    if not text.startswith(_DEFLATED):
        return text
    try:
        stream = zlib.decompressobj()
        raw = base64.b64decode(text.removeprefix(_DEFLATED), validate=True)
        found = stream.decompress(raw, MAX_HEADER_BYTES)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"its compressed text is damaged: {error}") from error
    if not stream.eof or stream.unused_data:
        raise ValueError(f"its compressed text is cut, or longer than {MAX_HEADER_BYTES} bytes")
    return found.decode("ascii")


def json_digest(fusion: object) -> str:
    """SHA-256 of the canonical JSON of ``fusion``, 64 hexadecimal digits."""
    return _digest(canonical_json(fusion))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _check_tensors(place: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    issues = []
    for name, tensor in tensors.items():
        if tensor_name(tensor) != name:
            issues.append(f"tensor {name}: its bytes do not match its digest")
        elif not is_finite(tensor):
            issues.append(f"tensor {name}: holds NaN or infinity")
    if issues:
        raise ArtifactError(
            f"artifact {shown(place)}: {len(issues)} of {len(tensors)} tensors are damaged; "
            "get the file again from its source.",
            issues,
        )


def _serialise(fusion: Fusion) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    tensors: dict[str, torch.Tensor] = {}
    storages: set[int] = set()  # safetensors refuses two tensors in one memory

    def keep(tensor: torch.Tensor) -> str:
        name = tensor_name(tensor)
        if name not in tensors:
            plain = tensor.detach().cpu().contiguous()
            storage = plain.untyped_storage().data_ptr()
            tensors[name] = plain.clone() if storage in storages else plain
            storages.add(storage)
        return name

    compressed = []
    for entry in fusion.entries:
        for _, stored in sorted(entry.factors.items()):
            if stored.quantised is not None:
                check_shape(stored, entry.shape)
                compressed.append(stored)
    packed = (keep(pack_factors(compressed)),) if compressed else ()

    def entry_json(entry: Entry) -> dict[str, object]:
        return {
            "component": entry.component,
            "module": entry.module,
            "parameter": entry.parameter,
            "shape": list(entry.shape),
            "fate": entry.fate,
            "timeline": [{"from": start, **row} for start, row in entry.timeline.rows()],
            "factors": {
                slot: factors_json(
                    stored, packed if stored.quantised else tuple(map(keep, stored.delta.tensors))
                )
                for slot, stored in entry.factors.items()
            }
            | {slot: reference_json(each) for slot, each in entry.references.items()},
            "scores": dict(entry.scores),
        }

    inner: dict[str, object] = {
        "format": {"name": FORMAT_NAME, "version": FORMAT_VERSION},
        "tool": fusion.tool,
        "sources": {name: _source_json(source) for name, source in fusion.sources.items()},
        "slots": {
            name: {"role": slot.role, "sources": list(slot.sources), "derived": slot.derived}
            for name, slot in fusion.slots.items()
        },
        "rule": {
            "name": fusion.rule.name,
            "parameters": dict(fusion.rule.parameters),
            "derived": dict(fusion.rule.derived),
        },
        "fits": {"family": fusion.family, "fingerprint": fusion.fingerprint},
        "entries": [entry_json(entry) for entry in fusion.entries],
    }
    return {"digest": json_digest(inner), "fusion": inner}, tensors


def _source_json(source: Source) -> dict[str, object]:
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
