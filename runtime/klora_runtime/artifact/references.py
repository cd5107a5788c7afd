"""Thin fusions: fusions whose factors are in the LoRA files that they were compiled from.

For each slot of each layer, the schedule names the keys of one file and a range of rows. Filled
from the same files (compared by SHA-256), it equals a full artifact's fusion to the bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from klora_runtime.artifact.delta import LowRank, Stored
from klora_runtime.artifact.digests import file_digest
from klora_runtime.artifact.dtypes import FLOAT8, REAL
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.artifact.schedule import Reference
from klora_runtime.artifact.tensor_file import TensorFile, without_float8
from klora_runtime.errors import ArtifactError, ConfigError, FileFormatError, shown
from klora_runtime.hub.choosing import LORA
from klora_runtime.hub.fetching import Origin, located
from klora_runtime.lazy_torch import torch

_READ = REAL + FLOAT8


def fill(
    fusion: Fusion,
    sources: Mapping[str, str | os.PathLike[str]],
    device: torch.device | None = None,
) -> Fusion:
    """Return a thin fusion filled with its factors.

    Args:
        fusion: a thin fusion, as :func:`klora_runtime.load_fusion` returns it without sources.
        sources: source name -> the safetensors file that it was compiled from, or its name on the
            Hub, see :func:`klora_runtime.load_fusion`; the file's name does not matter.
        device: where the factors are kept; None for the host.

    Returns:
        The fusion that compiling without ``--thin`` gives.

    Raises:
        ConfigError: ``sources`` names an unknown source, or the fusion is not thin.
        ArtifactError: a source is missing, cannot be read, or is another file; ``issues`` lists
            every such source.
        KloraError: the Hub does not give a file.
    """
    if not isinstance(sources, Mapping):
        raise ConfigError(
            f"sources={shown(repr(sources))}: expected source names with a file each, such as "
            '{"content": "fox.safetensors"}.'
        )
    strange = [name for name in sources if name not in fusion.sources]
    if strange:
        known = ", ".join(map(shown, fusion.sources))
        raise ConfigError(f"there is no source {shown(strange[0])}; this fusion has {known}.")
    if not fusion.is_thin:
        raise ConfigError(
            f"this fusion holds its factors; leave out {', '.join(sources)}. Only a thin "
            "fusion needs sources."
        )
    needed = sorted({ref.source for entry in fusion.entries for ref in entry.references.values()})
    _refuse_missing(fusion, [name for name in needed if name not in sources])
    paths = {name: Path(located(sources[name], LORA)) for name in needed}
    _refuse_other_files(fusion, paths)
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(file_of_source(path, name)) for name, path in paths.items()
        }
        issues = [issue for entry in fusion.entries for issue in _problems(entry, files)]
        if issues:
            raise ArtifactError("the sources lack tensors that the fusion names:", issues)
        tensors = {
            name: read_source(file, fusion.sources[name].sha256) for name, file in files.items()
        }
        entries = tuple(_filled(entry, tensors, device) for entry in fusion.entries)
        return replace(fusion, entries=entries)


def complete(fusion: Fusion, sources: Mapping[str, str | os.PathLike[str]] | None = None) -> Fusion:
    """Return a fusion that can be applied: the fusion itself if it has its factors, else filled.

    Raises:
        ConfigError, ArtifactError: see :func:`fill`.
    """
    return fill(fusion, sources or {}) if sources or fusion.is_thin else fusion


def _refuse_missing(fusion: Fusion, missing: list[str]) -> None:
    if not missing:
        return
    options = " ".join(f"--source {name}=PATH" for name in missing)
    mapping = ", ".join(f'"{name}": PATH' for name in missing)
    raise ArtifactError(
        "this fusion is thin: its factors are in the LoRA files that it was compiled from. Name "
        f"them: {options}; in Python sources={{{mapping}}}.",
        [f"{shown(name)}: {_wanted(fusion, name)}" for name in missing],
    )


def _refuse_other_files(fusion: Fusion, files: Mapping[str, Path]) -> None:
    issues = []
    for name, path in files.items():
        found = _digest(path)
        if found != fusion.sources[name].sha256:
            wanted = _wanted(fusion, name)
            issues.append(f"{shown(name)}: expected {wanted}; {shown(path)} has sha256 {found}")
    if issues:
        raise ArtifactError("these are not the files that the fusion was compiled from:", issues)


def _wanted(fusion: Fusion, name: str) -> str:
    source = fusion.sources[name]
    text = f"{shown(source.file)} of {source.bytes} bytes with sha256 {source.sha256}"
    origin = Origin.of_notes(source.notes)
    return text if origin is None else f"{text}, {shown(origin)}"


def _digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        raise ArtifactError(f"source {shown(path)} cannot be read: {error.strerror}.") from error


def file_of_source(path: Path, name: str) -> TensorFile:
    """Return the open file of a source.

    Raises:
        ArtifactError: it is no safetensors file.
    """
    try:
        return TensorFile(path, f"source {shown(name)}")
    except FileFormatError as error:
        raise ArtifactError(str(error)) from error


def _problems(entry: Entry, files: Mapping[str, TensorFile]) -> Iterator[str]:
    """Yield the references of an entry that the files do not satisfy.

    The digests of the files match, so the artifact is at fault.
    """
    for slot, reference in entry.references.items():
        where = f"{entry.path}, {slot}"
        yield from problems_of(where, entry.shape, reference, files[reference.source])


def problems_of(
    where: str, shape: tuple[int, ...], reference: Reference, file: TensorFile
) -> Iterator[str]:
    """Yield why a file does not hold the factors of a reference.

    Args:
        where: how to name the reference.
        shape: shape of the parameter.
        reference: the reference.
        file: the file of its source.
    """
    infos = [file.tensors.get(key) for key in (reference.down, reference.up)]
    for key, info in zip((reference.down, reference.up), infos, strict=True):
        if info is None:
            yield f"{where}: no tensor {shown(key)} in the file"
        elif info.dtype not in _READ:
            yield f"{where}: tensor {shown(key)} is {info.dtype}, expected one of {_READ}"
    down, up = infos
    if down is None or up is None:
        return
    if not _make(shape, reference, down.shape, up.shape):
        shapes = f"down {list(down.shape)} and up {list(up.shape)}"
        yield f"{where}: {shapes} do not make {list(shape)}"


def _make(
    shape: tuple[int, ...], reference: Reference, down: tuple[int, ...], up: tuple[int, ...]
) -> bool:
    """Return whether tensors of these shapes give a delta of a shape, apart from trailing ones."""
    if len(down) < 2 or len(up) < 2 or down[0] == 0:
        return False
    last = up[0] if reference.rows is None else max(end for _, end in reference.rows)
    rows = up[0] if reference.rows is None else sum(end - begin for begin, end in reference.rows)
    tails = _core(down) == (down[0], *_core(shape)[1:]) and set(up[2:]) <= {1}
    return tails and up[1] == down[0] and last <= up[0] and rows == shape[0]


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without the trailing ones of a 1x1 kernel."""
    return shape if any(size > 1 for size in shape[2:]) else shape[:2]


def read_source(file: TensorFile, sha256: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a file, whose digest is compared again: it may have changed."""
    from klora_runtime.devices.names import HOST  # it imports torch

    try:
        return file.block(HOST, sha256=sha256)
    except FileFormatError as error:
        raise ArtifactError(str(error)) from error


def _filled(
    entry: Entry, tensors: Mapping[str, Mapping[str, torch.Tensor]], device: torch.device | None
) -> Entry:
    read = {
        slot: stored_of(entry.shape, reference, tensors[reference.source], device)
        for slot, reference in entry.references.items()
    }
    return replace(entry, factors={**entry.factors, **read}, references={})


def stored_of(
    shape: tuple[int, ...],
    reference: Reference,
    tensors: Mapping[str, torch.Tensor],
    device: torch.device | None,
) -> Stored:
    """Return the delta of a reference.

    Args:
        shape: shape of the parameter.
        reference: the reference.
        tensors: the tensors of its file, by key.
        device: where the factors are kept; None for the host.
    """
    read = (tensors[key] for key in (reference.down, reference.up))
    down, up = (without_float8(tensor).to(device=device) for tensor in read)
    if reference.rows is not None:
        up = torch.cat([up[begin:end] for begin, end in reference.rows])
    rank = len(down)
    down = down.reshape(rank, *shape[1:])
    up = up.reshape(shape[0], rank, *(1 for _ in shape[2:]))
    return Stored(reference.scale, LowRank(down, up))
