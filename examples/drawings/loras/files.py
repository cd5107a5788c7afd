"""LoRA files of drawings: their names, and the facts that PEFT needs to load them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file

Kind = Literal["subject", "style", "fused"]

_FACTOR = re.compile(r"unet\.(?P<module>.+)\.lora_[AB]\.weight")


@dataclass(frozen=True)
class Lora:
    """A LoRA file that was read."""

    tensors: Mapping[str, torch.Tensor]
    """PEFT's keys without the component."""
    modules: tuple[str, ...]
    """Paths of the layers that it adapts."""
    rank: int


def lora_path(weights: Path, kind: Kind, name: str) -> Path:
    """Return the path of a LoRA in a folder of weights."""
    return weights / f"{kind}-{name}.safetensors"


def read(path: Path) -> Lora:
    """Read a file that ``drawings.loras`` wrote."""
    tensors = load_file(path)
    modules = sorted({match["module"] for key in tensors if (match := _FACTOR.fullmatch(key))})
    ranks = {len(value) for key, value in tensors.items() if key.endswith(".lora_A.weight")}
    (rank,) = ranks
    plain = {key.removeprefix("unet."): value for key, value in tensors.items()}
    return Lora(plain, tuple(modules), rank)
