"""K-LoRA as it is published: every layer decides anew whenever it is called.

At each call both deltas are multiplied out, the K largest of their absolute values summed and
compared (arXiv 2502.18461, eq. 1-6 and 10), and the chosen LoRA is added. Only gamma (eq. 9), one
number, is computed once. The choice stays on the device: nothing waits for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from klora_compile.reading.adapter import Adapter
from klora_compile.reading.layers import Layer
from klora_compile.rules.klora import Inequality
from klora_runtime.devices.precision import full_float32


class LiteralLayer(nn.Module):
    """A linear layer under both LoRAs.

    Args:
        base: the layer as it is in the model.
        content: its pair in the content LoRA.
        style: its pair in the style LoRA, of the same rank.
        threshold: 0-dimensional, gamma * S(t) of the present step; shared by all layers.
    """

    def __init__(
        self, base: nn.Linear, content: Layer, style: Layer, threshold: torch.Tensor
    ) -> None:
        super().__init__()
        self.base = base
        self.k = min(content.rank * style.rank, content.numel)
        self.threshold = threshold
        weight = base.weight
        self.down_c, self.up_c = (t.to(weight) for t in (content.down, content.up))
        self.down_s, self.up_s = (t.to(weight) for t in (style.down, style.up))
        self.scaling_c, self.scaling_s = content.scaling, style.scaling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s_c = abs(self.scaling_c) * top_k_sum(self.up_c, self.down_c, self.k)
        s_s = abs(self.scaling_s) * top_k_sum(self.up_s, self.down_s, self.k)
        content = s_c >= self.threshold * s_s
        down = torch.where(content, self.down_c, self.down_s)
        up = torch.where(content, self.scaling_c * self.up_c, self.scaling_s * self.up_s)
        result: torch.Tensor = self.base(x)
        return result + linear(linear(x, down), up)


def top_k_sum(up: torch.Tensor, down: torch.Tensor, k: int) -> torch.Tensor:
    """Sum of the k largest |up @ down| in float32; 0-dimensional, on the device."""
    delta = (up.float() @ down.float()).abs_()
    return delta.flatten().topk(k, sorted=False).values.sum()


class Literal:
    """K-LoRA on a denoiser, layer by layer; the step has to be told.

    Args:
        denoiser: the model; its adapted layers are replaced.
        content: the LoRA of a subject.
        style: the LoRA of a style, over the same layers.
    """

    def __init__(self, denoiser: nn.Module, content: Adapter, style: Adapter) -> None:
        self._rule = Inequality()
        self._gamma = _gamma(denoiser, content, style)
        device = next(denoiser.parameters()).device
        self._threshold = torch.zeros((), device=device)
        for name, layer in content.layers.items():
            parent, _, child = layer.module.rpartition(".")
            base: Any = denoiser.get_submodule(layer.module)
            replacement = LiteralLayer(base, layer, style.layers[name], self._threshold)
            owner = denoiser.get_submodule(parent)
            if isinstance(owner, nn.ModuleList | nn.Sequential):
                owner[int(child)] = replacement
            else:
                setattr(owner, child, replacement)

    def at(self, progress: float) -> None:
        """The step at ``progress`` comes next."""
        self._threshold.fill_(self._gamma * self._rule.scale(progress))


def _gamma(denoiser: nn.Module, content: Adapter, style: Adapter) -> float:
    """Equation 9: the ratio of both LoRAs' sums of absolute values."""
    sums = [0.0, 0.0]
    with full_float32():
        for side, adapter in enumerate((content, style)):
            for layer in adapter.layers.values():
                weight: Any = denoiser.get_submodule(layer.module).weight
                up, down = (t.to(weight.device).float() for t in (layer.up, layer.down))
                delta = layer.scaling * (up @ down)
                sums[side] += float(delta.abs_().sum(dtype=torch.float64))
    return sums[0] / sums[1]
