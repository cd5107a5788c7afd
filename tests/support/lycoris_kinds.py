"""Kinds of adapters that depend on the base model's weight, as LyCORIS trains them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.lokr import LokrModule
from support.form_files import base_model
from support.lora_files import write_lora
from torch import nn

IN, OUT = 24, 32
LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
LAYERS: dict[str, tuple[str, Any]] = {
    "linear": (LINEAR, lambda: nn.Linear(IN, OUT)),
    "3x3": ("down_blocks.0.resnets.0.conv1", lambda: nn.Conv2d(IN, OUT, 3)),
    "1x1": ("down_blocks.0.attentions.0.proj_in", lambda: nn.Conv2d(IN, OUT, 1)),
}
#: What LyCORIS trains -> the form that a report names, its module, and its settings.
TRAINED: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "diag-oft": ("oft", DiagOFTModule, {}),
    "diag-oft, constrained": ("oft", DiagOFTModule, {"constraint": 0.01}),
    "diag-oft, rescaled": ("oft", DiagOFTModule, {"rescaled": True}),
    "boft": ("boft", ButterflyOFTModule, {}),
    "boft, constrained": ("boft", ButterflyOFTModule, {"constraint": 0.01, "rescaled": True}),
    "glora": ("glora", GLoRAModule, {"alpha": 2.0}),
    "lokr with dora": ("dora", LokrModule, {"alpha": 2.0, "weight_decompose": True}),
    "ia3 of outputs": ("ia3", IA3Module, {}),
    "ia3 of inputs": ("ia3", IA3Module, {"train_on_input": True}),
}


def lycoris_file(folder: Path, case: str, kind: str) -> tuple[Path, Path, torch.Tensor]:
    """A file, its base model, and what LyCORIS' module adds to the weight."""
    _, module, settings = TRAINED[case]
    path, make = LAYERS[kind]
    torch.manual_seed(0)
    layer = make()
    trained = module(f"lora_unet_{path.replace('.', '_')}", layer, 1.0, 4, **settings)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    tensors = {
        f"{trained.lora_name}.{key}": value.detach().clone().contiguous()
        for key, value in trained.state_dict().items()
    }
    base = base_model(folder / "base", {("unet", path): layer.weight.detach().double().numpy()})
    return (
        write_lora(folder / "lora.safetensors", tensors),
        base,
        _added(trained, layer.weight).detach(),
    )


def _added(trained: Any, weight: torch.Tensor) -> torch.Tensor:
    """What a module adds; LyCORIS' own difference of a LoKr has the scale twice (4.1)."""
    if not isinstance(trained, LokrModule):
        return trained.get_diff_weight(1.0)[0]
    delta = trained.get_weight(weight.shape) * trained.scalar
    return trained.apply_weight_decompose(weight + delta, 1.0) - weight
