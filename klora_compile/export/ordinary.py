"""An ordinary LoRA from a fusion: the average of its schedule over a window of progress.

All layers have the same rank, that of the widest layer, and an equal alpha; zeros pad the factors.
Some loaders use a file's most common alpha or rank for all layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from klora_compile.export.averaging import Loss, Window, loss_of
from klora_compile.export.kohya import kohya_spelling
from klora_compile.export.peft import peft_spelling
from klora_compile.export.settings import ExportSettings, Keys
from klora_compile.export.targets import Spelling, Target
from klora_compile.export.values import averaged, truncated
from klora_compile.reading.forms.full import DIFF, DIFF_BIAS
from klora_compile.reading.forms.lora import DOWN, UP
from klora_compile.reading.forms.parts import ALPHA
from klora_compile.threads import single_thread
from klora_runtime import __version__
from klora_runtime.artifact.canonical import canonical_json
from klora_runtime.artifact.delta import Delta, Dense, LowRank
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.errors import KloraError, shown
from klora_runtime.families.catalogue import FAMILIES

#: The metadata key for the origin of an export.
PROVENANCE_KEY = "klora_export"

_SPELLINGS: Mapping[Keys, Callable[[Fusion], Spelling]] = {
    "kohya": kohya_spelling,
    "peft": peft_spelling,
}
#: Denoisers; an ordinary LoRA adapts only one.
_DENOISERS = {name for family in FAMILIES.values() for name in family.denoisers}


@dataclass(frozen=True)
class OrdinaryLora:
    """The contents of one file."""

    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str]
    layers: int
    """Number of parameters of the file that it changes."""
    rank: int
    """Rank of every low-rank layer; 0 if there is none."""
    dtype: torch.dtype
    truncation: Loss | None
    """Loss of the average by a smaller rank; None if no rank was requested."""


def spelling_of(fusion: Fusion, settings: ExportSettings) -> Spelling:
    """Return the spelling of a fusion with these settings.

    Raises:
        KloraError: the fusion is for two denoisers, or the keys cannot express a layer.
    """
    denoisers = [name for name in fusion.components if name in _DENOISERS]
    if len(denoisers) > 1:
        raise KloraError(
            f"this artifact changes {' and '.join(map(shown, denoisers))}, and an ordinary "
            "LoRA can change one denoiser only. Compile one artifact for each and export both."
        )
    return _SPELLINGS[settings.keys](fusion)


def ordinary_lora(
    fusion: Fusion, spelling: Spelling, window: Window, settings: ExportSettings
) -> OrdinaryLora:
    """Return the average of a fusion over a window.

    Args:
        fusion: the fusion of an artifact.
        spelling: the result of :func:`spelling_of`.
        window: the window of progress.
        settings: settings of the export.

    Raises:
        KloraError: nothing acts in the window, the keys cannot express a delta, or the dtype cannot
            hold it.
    """
    dtype = _dtype(fusion, settings)
    deltas: list[tuple[Target, Delta]] = []
    squares = []
    with single_thread():
        for target in spelling.targets:
            delta = averaged(target, window, settings.gain)
            if delta is None:
                continue
            if settings.rank is not None and target.has_factors:
                norm = delta.norm() ** 2
                delta, lost = truncated(delta, settings.rank)
                squares.append((target.key, lost, norm))
            deltas.append((target, delta.balanced().to(dtype=dtype)))
    _check(deltas, spelling, window, dtype)
    rank = max((d.rank for _, d in deltas if isinstance(d, LowRank)), default=0)
    tensors: dict[str, torch.Tensor] = {}
    for target, delta in deltas:
        tensors |= _tensors(target, delta, rank, spelling)
    return OrdinaryLora(
        tensors=tensors,
        metadata=_metadata(fusion, spelling, window, settings, rank),
        layers=len(deltas),
        rank=rank,
        dtype=dtype,
        truncation=loss_of(squares) if squares else None,
    )


def _dtype(fusion: Fusion, settings: ExportSettings) -> torch.dtype:
    if settings.dtype is not None:
        found: torch.dtype = getattr(torch, settings.dtype)
        return found
    stored = [
        torch.float16 if stored.quantised is not None else tensor.dtype
        for entry in fusion.entries
        for stored in entry.acting.values()
        for tensor in stored.delta.tensors
    ]
    return functools.reduce(torch.promote_types, stored or [torch.float32])


def _check(
    deltas: Sequence[tuple[Target, Delta]],
    spelling: Spelling,
    window: Window,
    dtype: torch.dtype,
) -> None:
    if not deltas:
        raise KloraError(
            f"no layer acts between progress {window.start:g} and {window.stop:g}, so there is "
            "no LoRA to write. Use fewer phases."
        )
    unsayable = [
        f"{shown(target.key)}: its {target.parameter} {list(target.shape)} is not a product of "
        "factors"
        for target, delta in deltas
        if isinstance(delta, Dense) and DIFF not in spelling.endings
    ]
    if unsayable:
        raise KloraError(
            f"{len(unsayable)} layers are not low-rank, and PEFT keys can store only low-rank "
            "layers. Use --keys kohya (ComfyUI reads its `diff` keys), or --rank R, which "
            "approximates matrices by factors.",
            unsayable,
        )
    beyond = [shown(target.key) for target, delta in deltas if not delta.is_finite()]
    if beyond:
        raise KloraError(
            f"{str(dtype).removeprefix('torch.')} cannot hold the values of {len(beyond)} "
            "layers. Use --dtype float32 or bfloat16.",
            beyond,
        )


def _tensors(
    target: Target, delta: Delta, rank: int, spelling: Spelling
) -> Iterator[tuple[str, torch.Tensor]]:
    pointwise = target.pointwise and target.parameter == "weight"
    kernel = target.shape[2:] or ((1, 1) if pointwise else ())
    if isinstance(delta, Dense):
        ending = spelling.endings[DIFF_BIAS if target.parameter == "bias" else DIFF]
        yield f"{target.key}{ending}", delta.values.reshape(*target.shape[:2], *kernel)
        return
    down = torch.zeros(rank, target.shape[1], *kernel, dtype=delta.down.dtype)
    down[: delta.rank] = delta.down.reshape(-1, *down.shape[1:])
    up = torch.zeros(target.shape[0], rank, *(1 for _ in kernel), dtype=delta.up.dtype)
    up[:, : delta.rank] = delta.up.reshape(*delta.up.shape, *(1 for _ in kernel))
    yield f"{target.key}{spelling.endings[DOWN]}", down
    yield f"{target.key}{spelling.endings[UP]}", up
    if ALPHA in spelling.endings:
        yield f"{target.key}{spelling.endings[ALPHA]}", torch.tensor(float(rank))


def _metadata(
    fusion: Fusion, spelling: Spelling, window: Window, settings: ExportSettings, rank: int
) -> dict[str, str]:
    """Return metadata for tools, and the origin; no time and no path."""
    origin: dict[str, Any] = {
        "rule": {"name": fusion.rule.name, "parameters": dict(fusion.rule.parameters)},
        "sources": {
            name: {"file": source.file, "sha256": source.sha256, "license": source.license}
            for name, source in fusion.sources.items()
        },
        "progress": [window.start, window.stop],
        "gain": settings.gain,
        "rank": settings.rank,
    }
    found = {
        "format": "pt",
        "software": canonical_json({"name": "klora", "version": __version__}),
        PROVENANCE_KEY: canonical_json(origin),
        **spelling.metadata,
    }
    if ALPHA in spelling.endings:
        found |= {"ss_network_dim": str(rank), "ss_network_alpha": str(float(rank))}
    words = _trigger_words(fusion)
    return found | ({"modelspec.trigger_phrase": words} if words else {})


def _trigger_words(fusion: Fusion) -> str:
    words = [word for source in fusion.sources.values() for word in source.trigger_words]
    return ", ".join(dict.fromkeys(words))
