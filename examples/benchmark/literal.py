"""K-LoRA as published: every layer decides again in every call.

The rule is the reference of klora's tests (`tests/reference.py`), in float32 on the model's device.
Each call computes both deltas, and sums and compares the K largest of their absolute values. Only
gamma, one number, is computed once. The choice stays on the device, so nothing waits for it.
"""

from __future__ import annotations

from typing import Any

import torch
from reference import KLora, product, top_k_sum
from torch import nn
from torch.nn.functional import linear

#: Down and up of one layer.
Factors = tuple[torch.Tensor, torch.Tensor]


class LiteralLayer(nn.Module):
    """A linear layer with both LoRAs, which have the same rank.

    Layers differ in tensors only, so compiled blocks share one graph.

    Args:
        base: the model's layer.
        content: its down and up in the content LoRA.
        style: its down and up in the style LoRA.
        k: number of largest values of a delta that count.
        threshold: 0-dimensional, gamma * S(t) of the present step; shared by all layers.
    """

    def __init__(
        self, base: Any, content: Factors, style: Factors, k: int, threshold: torch.Tensor
    ) -> None:
        super().__init__()
        self.base, self.k, self.threshold = base, k, threshold
        self.down_c, self.up_c = (factor.to(base.weight.dtype) for factor in content)
        self.down_s, self.up_s = (factor.to(base.weight.dtype) for factor in style)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s_c = top_k_sum(product(self.down_c.float(), self.up_c.float()), self.k)
        s_s = top_k_sum(product(self.down_s.float(), self.up_s.float()), self.k)
        content = s_c >= self.threshold * s_s
        down = torch.where(content, self.down_c, self.down_s)
        up = torch.where(content, self.up_c, self.up_s)
        result: torch.Tensor = self.base(x)
        return result + linear(linear(x, down), up)


class Literal:
    """K-LoRA on a denoiser, layer by layer; the caller sets the step.

    Args:
        denoiser: the model; its adapted layers are replaced.
        component: its name in the pipeline, and in the keys of the LoRAs.
        klora: the rule, on the model's device.
    """

    def __init__(self, denoiser: nn.Module, component: str, klora: KLora) -> None:
        self._klora, self._gamma = klora, klora.gamma(component)
        self._threshold = torch.zeros((), device=klora.device)
        for layer in klora.pairs(component):
            path = layer.removeprefix(f"{component}.")
            base = denoiser.get_submodule(path)
            content, style = (klora.lora(role).factors(layer) for role in ("content", "style"))
            literal = LiteralLayer(base, content, style, klora.k(layer), self._threshold)
            denoiser.set_submodule(path, literal)

    def at(self, progress: float) -> None:
        """Prepare the step at ``progress``."""
        self._threshold.fill_(self._gamma * self._klora.s(progress))
