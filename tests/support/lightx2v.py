"""Files as lightx2v's distilled LoRAs of Wan: pairs, and differences of whatever has none."""

from __future__ import annotations

from pathlib import Path

import torch
from support.lora_files import random_pair, write_lora

WIDTH, LAYERS, RANK = 24, 2, 2

#: As lightx2v's files have them -> in diffusers' model, and the shape.
TABLES = {
    **{f"blocks.{i}.diff_m": (f"blocks.{i}", (1, 6, WIDTH)) for i in range(LAYERS)},
    "head.diff_m": ("", (1, 2, WIDTH)),
}


def lightx2v(path: Path, seed: int) -> Path:
    """Pairs, differences of biases and norms, and those of the tables of modulations."""
    new = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for block in (f"diffusion_model.blocks.{i}" for i in range(LAYERS)):
        for number, attention in enumerate(("self_attn", "cross_attn")):
            down, up = random_pair(WIDTH, WIDTH, RANK, seed=10 * seed + number)
            tensors[f"{block}.{attention}.q.lora_down.weight"] = down
            tensors[f"{block}.{attention}.q.lora_up.weight"] = up
            tensors[f"{block}.{attention}.q.diff_b"] = torch.randn(WIDTH, generator=new)
            tensors[f"{block}.{attention}.norm_q.diff"] = torch.randn(WIDTH, generator=new)
    for name, (_, shape) in TABLES.items():
        tensors[f"diffusion_model.{name}"] = torch.randn(shape, generator=new)
    return write_lora(path, tensors)
