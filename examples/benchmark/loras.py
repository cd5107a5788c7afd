"""Two random LoRAs for a denoiser and their fusion, as files."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from random_loras import random_lora
from safetensors.torch import save_file
from torch import nn

from benchmark.measuring import layer_shapes, lora
from benchmark.models import MODELS
from klora_compile.compiler import compile_fusion
from klora_compile.reading.adapter import read_adapter
from klora_runtime.artifact.delta import Stored
from klora_runtime.artifact.file import save_fusion
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.artifact.schedule import CONTENT, STYLE
from klora_runtime.artifact.timeline import Timeline
from klora_runtime.families.family import DENOISER_PREFIX

#: Linear layers of attention and feed-forward, of UNets and of FLUX's two kinds of blocks.
_ADAPTED = re.compile(r".*\.(attn\d?|ff|ff_context)\..+|single_.*\.(proj_mlp|proj_out)")

#: Norm of a delta relative to its weight's. Layers vary around it, so most ratios are within S's
#: range, 0.5 to 2, and switch.
_STRENGTH = 0.1


@dataclass(frozen=True)
class Files:
    """The files of a user."""

    component: str
    """Component of the pipeline that they are for."""
    content: Path
    style: Path
    artifact: Path

    @property
    def lora_bytes(self) -> int:
        """Bytes of both LoRAs."""
        return self.content.stat().st_size + self.style.stat().st_size

    @property
    def artifact_bytes(self) -> int:
        return self.artifact.stat().st_size


def write_files(
    denoiser: nn.Module, component: str, folder: Path, rank: int, first_seed: int = 1
) -> Files:
    """Write a content and a style LoRA over all attention and feed-forward layers, and fuse them.

    Args:
        denoiser: the model that they adapt.
        component: its name in the pipeline.
        folder: folder for the files.
        rank: of both LoRAs in every layer.
        first_seed: seed of the content LoRA; the style LoRA has the next one.
    """
    content, style = (folder / f"{name}.safetensors" for name in (CONTENT, STYLE))
    for seed, path in enumerate((content, style), start=first_seed):
        random_lora({component: denoiser}, path, adapts, seed=seed, rank=rank, strength=_STRENGTH)
    device = next(denoiser.parameters()).device
    artifact = folder / "fused.klora.safetensors"
    save_fusion(compile_fusion(content, style, device=str(device)), artifact)
    return Files(component, content, style, artifact)


def write_pair(model: str, share: float, rank: int, folder: Path) -> list[Path]:
    """Write a content and a style LoRA of random float16 numbers for a share of a model's layers.

    Args:
        model: ``sdxl`` or ``flux``.
        share: share of the layers of each shape, above 0 to 1.
        rank: of both LoRAs in every layer.
        folder: folder for ``content.safetensors`` and ``style.safetensors``.
    """
    component, shapes = MODELS[model].component, layer_shapes(model, share)
    paths = [folder / f"{name}.safetensors" for name in (CONTENT, STYLE)]
    for seed, path in enumerate(paths):
        tensors = {}
        for layer in lora(shapes, rank, seed):
            tensors[f"{component}.{layer.module}.lora_A.weight"] = layer.down
            tensors[f"{component}.{layer.module}.lora_B.weight"] = layer.up
        save_file(tensors, str(path))
    return paths


def write_kohya(model: str, share: float, rank: int, path: Path) -> None:
    """Write a LoRA of random float16 numbers in kohya's spelling; see :func:`write_pair`."""
    tensors = {}
    for layer in lora(layer_shapes(model, share), rank, 0):
        name = f"{DENOISER_PREFIX}{layer.module.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = layer.down
        tensors[f"{name}.lora_up.weight"] = layer.up
        tensors[f"{name}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, str(path))


def adapts(name: str) -> bool:
    """Return whether a layer is of attention or feed-forward."""
    return _ADAPTED.fullmatch(name) is not None


def all_switching(fusion: Fusion, files: Files) -> Fusion:
    """Return the fusion with all layers switching to the style in the middle of the sampling."""
    layers = {CONTENT: read_adapter(files.content).layers, STYLE: read_adapter(files.style).layers}
    timeline = Timeline((0.0, 0.5), {CONTENT: (1.0, 0.0), STYLE: (0.0, 1.0)})

    def switching(entry: Entry) -> Entry:
        pair = {slot: found[f"{entry.component}.{entry.module}"] for slot, found in layers.items()}
        factors = {slot: Stored(one.scaling, one.delta) for slot, one in pair.items()}
        return replace(entry, fate="switching", timeline=timeline, factors=factors)

    return replace(fusion, entries=tuple(map(switching, fusion.entries)))
