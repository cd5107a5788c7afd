"""A model of a few layers in diffusers' names, for adapters that PEFT trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

#: Rows and columns of the linear layers.
OUT, IN = 24, 16


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(IN, OUT)
        self.to_k = nn.Linear(IN, IN, bias=False)
        self.odd = nn.Linear(7, 6)
        self.to_out = nn.ModuleList([nn.Linear(OUT, IN)])


class Layers(nn.Module):
    """Linear layers, wide, square and tall, with biases and without, a norm and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Module()
        block.attn1 = Attention()
        block.norm1 = nn.LayerNorm(IN)
        transformer = nn.Module()
        transformer.transformer_blocks = nn.ModuleList([block])
        resnet = nn.Module()
        resnet.conv1 = nn.Conv2d(4, 8, 3)
        transformer.proj_in = nn.Conv2d(4, 8, 1)
        blocks = nn.Module()
        blocks.attentions = nn.ModuleList([transformer])
        blocks.resnets = nn.ModuleList([resnet])
        self.down_blocks = nn.ModuleList([blocks])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def layers() -> Layers:
    torch.manual_seed(1)
    return Layers()


def base_folder(model: nn.Module, path: Path) -> Path:
    """The model as the UNet of a pipeline's folder."""
    (path / "unet").mkdir(parents=True)
    tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
    save_file(tensors, path / "unet" / "diffusion_pytorch_model.safetensors")
    (path / "model_index.json").write_text("{}")
    return path


def randomise(model: Any) -> Any:
    """As after a training."""
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value) * 0.3)
    return model


def merged_changes(model: Any, before: nn.Module) -> dict[str, torch.Tensor]:
    """What merging changes in each parameter."""
    old = dict(before.named_parameters())
    merged = model.merge_and_unload()
    added = {name: value.detach() - old[name].detach() for name, value in merged.named_parameters()}
    return {name: value for name, value in added.items() if value.abs().max() > 0}
