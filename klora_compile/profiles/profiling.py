"""From LoRA files to profiles: read, measure, and say what is wrong with those that cannot be."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from klora_compile.halves import Halves, files_of
from klora_compile.measuring.norms import frobenius_norms
from klora_compile.measuring.places import place_of
from klora_compile.measuring.statistics import MEASURE_VERSION, Statistics
from klora_compile.profiles.once import kind_of, measured, statistics_key
from klora_compile.profiles.profile import PROFILE_VERSION, Profile, profile_from
from klora_compile.profiles.store import Store
from klora_compile.reading.adapter import Adapter, read_adapter
from klora_compile.reading.files.lora_file import open_lora
from klora_compile.reading.provenance import source_stated
from klora_compile.settings.read_options import ReadOptions
from klora_compile.slots import HIGH, LOW, SECOND_DENOISER
from klora_runtime.artifact.canonical import canonical_json
from klora_runtime.errors import KloraError
from klora_runtime.lazy_torch import torch

#: A LoRA in one file or folder, or in two files.
Files = Path | Halves[Path]


@dataclass(frozen=True)
class Task:
    """One LoRA to profile; it can be sent to another process."""

    lora: Files
    options: ReadOptions
    device: str
    """Name of the device that measures."""
    store: Path
    """Folder of the store, which is only read here."""
    partners: tuple[int, ...]
    """Ranks of possible partners; ascending."""
    counts: tuple[int, ...] = ()
    """Numbers of largest weights to sum besides, for rules with a fixed one."""


@dataclass(frozen=True)
class Result:
    """What became of a task."""

    lora: Files
    profiles: tuple[Profile, ...] = ()
    """One for each file; empty if they were known and lack nothing, or the LoRA is refused."""
    statistics: tuple[tuple[Statistics, ...], ...] = ()
    """For each profile the statistics of its layers."""
    refused: str | None = None
    """Why the LoRA cannot be profiled."""

    @property
    def word(self) -> str:
        """``known``, ``measured`` or ``refused``."""
        return "refused" if self.refused else ("measured" if self.profiles else "known")


def profiled(task: Task) -> Result:
    """Profile one LoRA, unless the store already knows everything about it.

    Errors of the LoRA become its result, so that the others go on.
    """
    try:
        opened = [_opened(path) for path in files_of(task.lora)]
    except (OSError, KloraError) as error:
        return Result(task.lora, refused=str(getattr(error, "strerror", None) or error))
    parts = _parts(task, opened)
    try:
        found = [_part(task, part) for part in parts]
    except KloraError as error:
        return Result(task.lora, refused=str(error))
    except MemoryError:
        return Result(task.lora, refused="it does not fit into memory")
    new = [each for each in found if each is not None]
    return Result(
        task.lora,
        tuple(profile for profile, _ in new),
        tuple(statistics for _, statistics in new),
    )


def keep(store: Store, result: Result) -> None:
    """Put a result into the store; a LoRA that is no longer refused leaves the quarantine.

    Raises:
        KloraError: the store cannot be written.
    """
    paths = ",".join(str(path.absolute()) for path in files_of(result.lora))
    if result.refused is None:
        store.release(paths)
    else:
        store.quarantine(paths, result.refused)
    for profile, statistics in zip(result.profiles, result.statistics, strict=True):
        store.keep_statistics(profile.statistics, statistics)
        store.keep_profile(profile)


def wanted(rank: int, numel: int, partners: Collection[int], counts: Collection[int]) -> set[int]:
    """Return every K of a layer's Top-K sums."""
    return {min(k, numel) for k in (*(rank * each for each in partners), *counts)}


def lacks(
    profile: Profile,
    statistics: Sequence[Statistics],
    partners: Collection[int],
    counts: Collection[int] = (),
) -> bool:
    """Return whether statistics lack sums that partners need."""
    return any(
        not wanted(layer.rank, math.prod(layer.place.shape), partners, counts) <= own.top_k.keys()
        for layer, own in zip(profile.layers, statistics, strict=True)
    )


@dataclass(frozen=True)
class _Opened:
    """A file, or a folder with one."""

    path: Path
    """As it was named."""
    weights: Path
    """The file with the weights."""
    digest: str
    """Digest of that file, and of the configuration beside it."""


def _opened(path: Path) -> _Opened:
    with open_lora(path) as file:
        stated = (file.sha256, "" if file.config is None else file.config[0], file.prompt or "")
        digest = hashlib.sha256("\n".join(stated).encode()).hexdigest()
        return _Opened(path, file.path, digest)


@dataclass(frozen=True)
class _Part:
    """One file of a LoRA."""

    file: _Opened
    options: ReadOptions
    half: str | None
    key: str
    lora: str


def _parts(task: Task, opened: Sequence[_Opened]) -> list[_Part]:
    lora = hashlib.sha256("\n".join(each.digest for each in opened).encode()).hexdigest()
    halves: Sequence[str | None] = (HIGH, LOW) if isinstance(task.lora, Halves) else (None,)
    found = []
    for number, half in enumerate(halves):
        file = opened[min(number, len(opened) - 1)]  # one file may be both halves
        options = task.options
        if half is not None:
            options = replace(options, denoiser=SECOND_DENOISER if half == LOW else None)
        stated = [
            *(PROFILE_VERSION, MEASURE_VERSION, kind_of(_device(task.device)), file.digest),
            *(half, lora, options_stated(options)),
        ]
        key = hashlib.sha256(canonical_json(stated).encode()).hexdigest()
        found.append(_Part(file, options, half, key, lora))
    return found


def _part(task: Task, part: _Part) -> tuple[Profile, tuple[Statistics, ...]] | None:
    """Return the profile and statistics of one file; None if the store lacks nothing of it."""
    store = Store(task.store)
    known = store.profile(part.key)
    before = None if known is None else store.statistics(known.statistics)
    if known is not None and before is not None and len(before) == len(known.layers):
        moved = known.path != str(part.file.weights.absolute())
        partners = (*task.partners, *known.ranks)
        if not lacks(known, before, partners, task.counts) and not moved:
            return None
    adapter = read_adapter(part.file.path, part.options)
    statistics = _measured(task, adapter, before)
    profile = profile_from(
        adapter,
        source_stated(adapter),
        key=part.key,
        statistics=statistics_key(adapter.layers.values(), _device(task.device)),
        norms=frobenius_norms(adapter.layers.values()),
        half=part.half,
        lora=part.lora,
        options=options_stated(part.options),
    )
    return profile, statistics


def _measured(
    task: Task, adapter: Adapter, before: Sequence[Statistics] | None
) -> tuple[Statistics, ...]:
    """Measure what is not known of an adapter's layers."""
    layers = list(adapter.layers.values())
    known = list(before) if before is not None and len(before) == len(layers) else None
    found: dict[str, Statistics] = {}
    tasks = []
    partners = {*task.partners, *(layer.rank for layer in layers)}
    for number, layer in enumerate(layers):
        asked = wanted(layer.rank, layer.numel, partners, task.counts)
        if known is not None and asked <= known[number].top_k.keys():
            found[layer.name] = known[number]
        else:
            tasks.append((layer, tuple(sorted(asked))))
    old = {} if known is None else dict(zip((v.name for v in layers), known, strict=True))
    for layer, each in measured(tasks, torch.device(_device(task.device))):
        sums = {**(old[layer.name].top_k if layer.name in old else {}), **each.top_k}
        found[layer.name] = Statistics(each.l1, sums, each.frobenius)
    return tuple(found[layer.name] for layer in layers)


def options_stated(options: ReadOptions) -> dict[str, Any]:
    """Return options of reading as JSON values."""
    stated = {each.name: getattr(options, each.name) for each in fields(options)}
    return stated | {"base": None if options.base is None else str(Path(options.base).absolute())}


def _device(name: str) -> str:
    found = place_of(name)
    return found if isinstance(found, str) else str(found)
