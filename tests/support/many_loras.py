"""Many tiny LoRAs of one base model, with every case that decides a pair."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch
from support.lora_files import write_lora

BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
#: Layer -> (out, in): of the denoiser and of a text encoder.
LAYERS = {
    f"{BLOCK}.attn1.to_q": (6, 4),
    f"{BLOCK}.attn1.to_k": (6, 4),
    f"{BLOCK}.attn2.to_v": (5, 7),
    f"{BLOCK}.attn2.to_out.0": (4, 4),
    f"{BLOCK}.ff.net.2": (4, 6),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (4, 4),
}
#: Layers that a LoRA may lack. There are few such sets, as LoRAs come from few trainers.
LACKS = ((), (f"{BLOCK}.attn1.to_k",), tuple(LAYERS)[4:])


def write_many(folder: Path, count: int, *, seed: int = 0) -> list[Path]:
    """Write LoRAs: of all ranks, with zero deltas, layers of their own, biases, equal numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    random = Random(seed)
    return [_write(folder / f"{seed}-{number:03}.safetensors", random) for number in range(count)]


def _write(path: Path, random: Random) -> Path:
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    rank, whole = random.choice((1, 2, 3)), random.random() < 0.4
    mixed, alpha = random.random() < 0.3, random.choice((1.0, 2.0, 4.0))
    lacks = random.choice(LACKS)
    tensors: dict[str, torch.Tensor] = {}
    for name, (out, width) in LAYERS.items():
        if name in lacks:
            continue  # a layer that only the partner may have
        own = 1 + len(tensors) % 3 if mixed else rank
        if whole:  # whole numbers, so that sums are equal to the bit
            down, up = _signs(own, width, generator), _signs(out, own, generator)
        else:
            down, up = (
                torch.randn(*shape, generator=generator) for shape in ((own, width), (out, own))
            )
        if random.random() < 0.1:
            up = torch.zeros_like(up)
        tensors[f"{name}.lora_A.weight"] = down
        tensors[f"{name}.lora_B.weight"] = up
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return write_lora(path, tensors)


def _signs(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2, (rows, columns), generator=generator) * 2.0 - 1.0


def stems(paths: Sequence[Path]) -> list[str]:
    return [path.stem for path in paths]
