"""One LoRA file as values: every key used, or the whole file refused with all reasons."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from klora_compile.reading.key_layouts import ParsedKey, Part, parse_key
from klora_compile.reading.scale import MAX_ALPHA, MIN_ALPHA, AdapterConfig
from klora_runtime.artifact import METADATA_KEY as ARTIFACT_KEY
from klora_runtime.errors import FileFormatError, LoraError, shown
from klora_runtime.safetensors_file import SafetensorsFile

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_HASH_BLOCK = 2**20

#: Metadata keys that hold a trigger phrase or a licence, as written by the common trainers.
_TRIGGER_KEYS = ("modelspec.trigger_phrase", "trigger_words", "trigger_word", "instance_prompt")
_LICENSE_KEYS = ("modelspec.license", "license", "source_licence")


@dataclass(frozen=True)
class Layer:
    """One layer of an adapter: delta = alpha / rank * up @ down."""

    component: str
    module: str
    """Dotted diffusers module path (CLIP without ``text_model.``)."""
    down: torch.Tensor
    """(rank, in), or (rank, in, height, width) for kernels above 1x1; values and dtype of the file:
    float32, float16 or bfloat16."""
    up: torch.Tensor
    """(out, rank) or (out, rank, 1, 1)."""
    alpha: float
    alpha_source: str
    """``tensor``, ``metadata`` or ``rank``: what :attr:`alpha` was taken from."""

    @property
    def name(self) -> str:
        """Component, dot, module path."""
        return f"{self.component}.{self.module}"

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def scaling(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the delta: (out, in), or (out, in, height, width)."""
        return (int(self.up.shape[0]), *map(int, self.down.shape[1:]))

    @property
    def numel(self) -> int:
        """Elements of the delta."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Adapter:
    """One LoRA as read."""

    path: Path
    sha256: str
    """Of the whole file."""
    nbytes: int
    layout: str
    """``peft``, ``kohya``, or both joined by ``+``."""
    keys: int
    """Number of keys in the file, all of them used."""
    layers: Mapping[str, Layer]
    """Layer name -> layer, sorted by name."""
    trigger_words: tuple[str, ...]
    license: str | None

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks, ascending."""
        return tuple(sorted({layer.rank for layer in self.layers.values()}))


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read a LoRA file.

    Args:
        path: a ``.safetensors`` file with diffusers/PEFT or kohya keys; see ``key_layouts``.

    Raises:
        LoraError: the file cannot be read, a key is of no known layout or form, half a pair is
            missing, a shape, dtype or value is impossible. ``issues`` lists every problem.
    """
    place = Path(path)
    where = f"LoRA file {shown(place)}"
    try:
        with SafetensorsFile(place, "LoRA file") as file:
            groups, layouts = _grouped(file, where)
            config = AdapterConfig(file.metadata, place, where)
            layers = _layers(groups, file, config, where)
            return Adapter(
                path=place,
                sha256=_sha256(place),
                nbytes=file.size,
                layout="+".join(sorted(layouts)),
                keys=len(file.tensors),
                layers=layers,
                trigger_words=_words(file.metadata),
                license=_first(file.metadata, _LICENSE_KEYS),
            )
    except LoraError:
        raise
    except FileFormatError as error:
        raise LoraError(str(error)) from error


_Group = dict[Part, str]


def _grouped(
    file: SafetensorsFile, where: str
) -> tuple[dict[str, tuple[ParsedKey, _Group]], set[str]]:
    if ARTIFACT_KEY in file.metadata:
        raise LoraError(
            f"{where} is an artifact of klora already; compile the LoRAs it was made of, or "
            "apply it as it is."
        )
    if not file.tensors:
        raise LoraError(f"{where} holds no tensors.")
    groups: dict[str, tuple[ParsedKey, _Group]] = {}
    layouts: set[str] = set()
    issues = []
    for key in sorted(file.tensors):
        parsed = parse_key(key)
        if isinstance(parsed, str):
            issues.append(f"{shown(key)}: {parsed}")
            continue
        layouts.add(parsed.layout)
        _, group = groups.setdefault(parsed.layer, (parsed, {}))
        if parsed.part in group:
            issues.append(
                f"{shown(key)}: is the {parsed.part.value} of {shown(parsed.layer)}, and so is "
                f"{shown(group[parsed.part])}"
            )
        group[parsed.part] = key
    if issues:
        raise LoraError(
            f"{where}: {len(issues)} of {len(file.tensors)} keys cannot be used, and klora reads "
            "a file whole or not at all. Convert it to diffusers/PEFT or kohya keys "
            "(SD1.x, SD2.x).",
            issues,
        )
    return groups, layouts


def _layers(
    groups: Mapping[str, tuple[ParsedKey, _Group]],
    file: SafetensorsFile,
    config: AdapterConfig,
    where: str,
) -> dict[str, Layer]:
    layers: dict[str, Layer] = {}
    issues: list[str] = []
    for name in sorted(groups):
        parsed, group = groups[name]
        missing = [part.value for part in (Part.DOWN, Part.UP) if part not in group]
        if missing:
            issues.append(f"{shown(name)}: has no {' and no '.join(missing)}")
            continue
        form = config.refused_form(parsed.component)
        if form is not None:
            issues.append(f"{shown(name)}: is {form} by its metadata, which is not supported")
            continue
        down, up = file.tensor(group[Part.DOWN]), file.tensor(group[Part.UP])
        problems = _pair_problems(down, up)
        if Part.ALPHA in group and math.prod(file.tensors[group[Part.ALPHA]].shape) != 1:
            problems.append("alpha is not one number")
        alpha, source = 0.0, "rank"
        if not problems:
            alpha, source = _alpha(parsed, group, file, config, rank=down.shape[0])
            if alpha and not MIN_ALPHA <= abs(alpha) <= MAX_ALPHA:
                problems = [f"alpha is {alpha}, expected 0 or {MIN_ALPHA:g} to {MAX_ALPHA:g}"]
        if problems:
            issues.extend(f"{shown(name)}: {problem}" for problem in problems)
            continue
        if all(size == 1 for size in down.shape[2:]):  # a 1x1 convolution is a linear layer
            down, up = down.flatten(1), up.flatten(1)
        layers[name] = Layer(parsed.component, parsed.module, down, up, alpha, source)
    if issues:
        raise LoraError(f"{where}: {len(issues)} problems; get the file again.", issues)
    return layers


def _pair_problems(down: torch.Tensor, up: torch.Tensor) -> list[str]:
    problems = [
        f"{name} is {tensor.dtype}, expected float32, float16 or bfloat16"
        for name, tensor in (("down", down), ("up", up))
        if tensor.dtype not in _FLOATS
    ]
    linear = down.dim() == 2 and up.dim() == 2
    conv = down.dim() == 4 and up.dim() == 4 and tuple(up.shape[2:]) == (1, 1)
    if not (linear or conv) or down.shape[0] != up.shape[1] or 0 in (*down.shape, *up.shape):
        problems.append(
            f"down {list(down.shape)} and up {list(up.shape)} are no low-rank pair: expected "
            "(rank, in) and (out, rank), or (rank, in, height, width) and (out, rank, 1, 1)"
        )
    if not problems and not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        problems.append("holds NaN or infinity")
    return problems


def _alpha(
    parsed: ParsedKey, group: _Group, file: SafetensorsFile, config: AdapterConfig, rank: int
) -> tuple[float, str]:
    if Part.ALPHA in group:
        return float(file.tensor(group[Part.ALPHA])), "tensor"
    alpha = config.alpha(parsed.component, parsed.module, rank)
    if alpha is not None:
        return alpha, "metadata"
    return float(rank), "rank"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _first(metadata: Mapping[str, str], keys: tuple[str, ...]) -> str | None:
    return next((metadata[key] for key in keys if metadata.get(key)), None)


def _words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    phrase = _first(metadata, _TRIGGER_KEYS)
    return () if phrase is None else (phrase,)
