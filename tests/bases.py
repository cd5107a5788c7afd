"""Bases whose weights are packed, cast, or elsewhere: each made from a plain tiny pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn


@dataclass(frozen=True)
class Base:
    """One kind of base."""

    name: str
    prepare: Callable[[Any], None]
    """Makes the denoiser of a plain float32 pipeline one of this kind, in place."""
    hindrance: str | None
    """What merging into its attention layers would be refused with; None where it works."""
    late: bool = False
    """Whether it can come while a fusion is applied in mode branch."""
    tolerance: float = 1e-5
    """Relative difference of latents; more where activations are rounded too."""

    def __str__(self) -> str:
        return self.name


def _each_linear(pipe: Any, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace the linear layers of all attention blocks."""
    for path, module in list(pipe.unet.named_modules()):
        if type(module) is nn.Linear and ".attn" in path:
            parent, _, leaf = path.rpartition(".")
            setattr(pipe.unet.get_submodule(parent), leaf, make(module))


def _torchao(pipe: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    quantization.quantize_(pipe.unet, quantization.Int8WeightOnlyConfig())


def _bitsandbytes(kind: str, **options: Any) -> Callable[[Any], None]:
    def prepare(pipe: Any) -> None:
        layers = pytest.importorskip("bitsandbytes.nn", reason="bitsandbytes is not installed")

        def make(module: nn.Linear) -> nn.Module:
            shape = module.in_features, module.out_features, module.bias is not None
            packed: nn.Module = getattr(layers, kind)(*shape, **options)
            packed.load_state_dict(module.state_dict())
            return packed.to("cpu")  # packs

        _each_linear(pipe, make)

    return prepare


def _gguf(pipe: Any) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0

    def make(module: nn.Linear) -> nn.Module:
        shape = module.in_features, module.out_features, module.bias is not None
        packed: nn.Module = GGUFLinear(*shape, compute_dtype=torch.float32)
        weight = gguf.quantize(module.weight.detach().numpy(), kind)
        packed.weight = GGUFParameter(torch.from_numpy(weight), quant_type=kind)
        if module.bias is not None:
            packed.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
        return packed

    _each_linear(pipe, make)


def _layerwise_casting(dtype: torch.dtype) -> Callable[[Any], None]:
    def prepare(pipe: Any) -> None:
        pipe.to(dtype)
        pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=dtype)

    return prepare


def _model_offload(pipe: Any) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerate.cpu_offload_with_hook(pipe.unet, execution_device=torch.device("cpu"))


def _sequential_offload(pipe: Any) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerate.cpu_offload(pipe.unet, execution_device=torch.device("cpu"))


def _group_offload(kind: str) -> Callable[[Any], None]:
    def prepare(pipe: Any) -> None:
        pipe.unet.enable_group_offload(
            onload_device=torch.device("cpu"), offload_type=kind, num_blocks_per_group=1
        )

    return prepare


_GROUP = "group offloading keeps its own copy of the weight; switch it off first"

BASES = (
    Base("torchao-int8", _torchao, "its weight is a Int8Tensor, not a plain tensor"),
    Base(
        "bitsandbytes-int8",
        _bitsandbytes("Linear8bitLt", has_fp16_weights=False),
        "its weight is torch.int8, of a Linear8bitLt",
        tolerance=2e-2,
    ),
    Base(
        "bitsandbytes-nf4",
        _bitsandbytes("Linear4bit", compute_dtype=torch.float32, quant_type="nf4"),
        "its weight is torch.uint8, of a Linear4bit",
    ),
    Base("gguf-q8_0", _gguf, "its weight is a GGUFParameter, not a plain tensor"),
    Base(
        "layerwise-casting-float32",
        _layerwise_casting(torch.float32),
        "its weight is torch.float8_e4m3fn, by layerwise casting",
        late=True,
    ),
    Base(
        "layerwise-casting-bfloat16",
        _layerwise_casting(torch.bfloat16),
        "its weight is torch.float8_e4m3fn, by layerwise casting",
        tolerance=2e-2,
    ),
    Base("model-offload", _model_offload, None, late=True),
    Base(
        "sequential-offload",
        _sequential_offload,
        "its weight has no memory (meta device): sequential offloading is on",
        late=True,
    ),
    Base("group-offload-leaves", _group_offload("leaf_level"), _GROUP, late=True),
    Base("group-offload-blocks", _group_offload("block_level"), _GROUP, late=True),
)
