"""Fusions to export, what their averages are by definition, and how diffusers reads a LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from support.families import FLUX_BLOCKS, flux
from tiny_pipeline import TEXT_WIDTH, tiny_lora, tiny_pipeline

from klora_compile import compile_fusion, read_adapter
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.artifact.schedule import STEPLESS

Exportable = Literal["sd1", "sdxl", "flux.1"]

#: Attention and text encoders, 3x3 and 1x1 convolutions, and linear layers of blocks.
_UNET_LAYERS = (
    "attn2.to_k",
    "attn1.to_out.0",
    "q_proj",
    "out_proj",
    "conv1",
    "conv_shortcut",
    "proj_in",
)

#: UNets narrow, but with the blocks of the released ones, which kohya's names count through.
_STRUCTURES: Mapping[str, dict[str, Any]] = {
    "sd1": {
        "block_out_channels": (8, 16, 32, 32),
        "cross_attention_dim": TEXT_WIDTH,
    },
    "sdxl": {
        "block_out_channels": (8, 16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2 * TEXT_WIDTH,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + TEXT_WIDTH,
    },
}


def exportable_pipeline(family: Exportable) -> Any:
    """A tiny pipeline whose modules are called as in a released model."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "flux.1":
            return flux()
        structure = {"attention_head_dim": 8, "norm_num_groups": 8, **_STRUCTURES[family]}
        pipe = tiny_pipeline(family)
        pipe.unet = UNet2DConditionModel(sample_size=16, **structure).eval()
    return pipe


def exportable_fusion(family: Exportable, pipe: Any, folder: Path) -> Fusion:
    """Two LoRAs of two ranks for it; the family is stated, as the layers are too narrow to tell."""
    modules = FLUX_BLOCKS if family == "flux.1" else _UNET_LAYERS
    files = [
        tiny_lora(
            pipe, folder / f"{family}-{seed}.safetensors", seed=seed, rank=rank, modules=modules
        )
        for seed, rank in ((1, 3), (2, 2))
    ]
    fusion = replace(compile_fusion(*files, device="cpu"), family=family)
    fusion = replace(fusion, entries=tuple(map(_with_scales, fusion.entries)))
    assert sum(entry.timeline.switches for entry in fusion.entries) > 5
    return fusion


def _with_scales(entry: Entry) -> Entry:
    scales = {"content": 0.75, "style": 1.5}
    stored = {slot: replace(f, scale=scales[slot]) for slot, f in entry.factors.items()}
    return replace(entry, factors=stored)


def average(entry: Entry, start: float = 0.0, stop: float = 1.0, gain: float = 1.0) -> torch.Tensor:
    """The mean of an entry's delta over [start, stop), in float64: the integral, literally."""
    if entry.component in STEPLESS:
        gain = 1.0
    inside = [moment for moment in entry.timeline.starts if start < moment < stop]
    edges = [start, *inside, stop]
    total = torch.zeros(entry.shape, dtype=torch.float64)
    for first, last in pairwise(edges):
        total += (last - first) / (stop - start) * delta_at(entry, (first + last) / 2)
    return gain * total


def delta_at(entry: Entry, progress: float) -> torch.Tensor:
    """An entry's delta at one moment, in float64."""
    total = torch.zeros(entry.shape, dtype=torch.float64)
    for slot, stored in entry.factors.items():
        weight = stored.scale * entry.timeline.at(progress)[slot]
        values = stored.delta.matrix()
        total += weight * values.reshape(entry.shape)
    return total


def as_klora_reads(path: Path) -> dict[str, torch.Tensor]:
    """Layer name -> delta, by klora's own reader."""
    layers = read_adapter(path).layers.values()
    return {v.name: (v.scaling * v.delta.matrix()).reshape(v.shape) for v in layers}


def as_diffusers_reads(pipe: Any, path: Path) -> dict[str, torch.Tensor]:
    """Layer name -> delta, by ``load_lora_weights``."""
    pipe.load_lora_weights(path, adapter_name="export")
    found = {}
    for component, model in pipe.components.items():
        for name, module in model.named_modules() if isinstance(model, torch.nn.Module) else ():
            if "export" in getattr(module, "lora_A", ()):
                layer = f"{component}.{name.removeprefix('text_model.')}"
                found[layer] = module.get_delta_weight("export").detach().double()
    pipe.unload_lora_weights()
    return found


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative Frobenius error; 1x1 convolutions have four dimensions in a model."""
    return float((found.reshape(expected.shape) - expected).norm() / expected.norm())


def lost_over_time(
    fusion: Fusion, start: float = 0.0, stop: float = 1.0, gain: float = 1.0
) -> tuple[float, float, str | None]:
    """How far schedules are from their average: total, worst, worst layer; integrals, literally."""
    found = []
    for entry in fusion.entries:
        if not entry.acts or entry.component in STEPLESS:
            continue
        mean = average(entry, start, stop, gain)
        inside = [moment for moment in entry.timeline.starts if start < moment < stop]
        lost = whole = 0.0
        for first, last in pairwise([start, *inside, stop]):
            delta = delta_at(entry, (first + last) / 2)
            lost += (last - first) * float((delta - mean).square().sum())
            whole += (last - first) * float(delta.square().sum())
        found.append((lost, whole, entry.layer))
    worst = max(found, key=lambda each: each[0] / each[1])
    total = sum(each[0] for each in found) / sum(each[1] for each in found)
    ratio = (worst[0] / worst[1]) ** 0.5
    return total**0.5, ratio, worst[2] if ratio > 0 else None
