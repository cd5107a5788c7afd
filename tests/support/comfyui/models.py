"""Small models with the names of ComfyUI's FLUX, SD 1.5 and Wan, in which every layer matters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from support.comfyui.sampling import DiscreteSampling, FlowSampling
from torch import nn
from torch.nn.functional import conv2d, linear, silu

WIDTH, CHANNELS, MLP = 32, 16, 128
WAN_WIDTH = 48


class CastWeightBiasOp:
    """Layers that may cast their weight to the input, as all of ComfyUI's can."""

    comfy_cast_weights = False


class Linear(nn.Linear, CastWeightBiasOp):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.comfy_cast_weights:
            bias = None if self.bias is None else self.bias.to(input)
            return linear(input, self.weight.to(input), bias)
        return super().forward(input)


class Conv2d(nn.Conv2d, CastWeightBiasOp):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.comfy_cast_weights:
            bias = None if self.bias is None else self.bias.to(input)
            return conv2d(input, self.weight.to(input), bias, self.stride, self.padding)
        return super().forward(input)


def add(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path, with empty modules on the way."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(name, module)


class FluxDenoiser(nn.Module):
    """One double block and one single block, without attention: each projection acts directly."""

    def __init__(self) -> None:
        super().__init__()
        layers = {
            "img_in": (WIDTH, 4 * CHANNELS),
            "double_blocks.0.img_attn.qkv": (3 * WIDTH, WIDTH),
            "double_blocks.0.img_attn.proj": (WIDTH, WIDTH),
            "single_blocks.0.linear1": (3 * WIDTH + MLP, WIDTH),
            "single_blocks.0.linear2": (WIDTH, WIDTH + MLP),
            "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
            "final_layer.linear": (4 * CHANNELS, WIDTH),
        }
        for path, (out, inner) in layers.items():
            add(self, path, Linear(inner, out))
        add(self, "double_blocks.0.img_attn.norm.query_norm", nn.Module())
        norm: Any = self.get_submodule("double_blocks.0.img_attn.norm.query_norm")
        norm.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        get: Any = self.get_submodule
        tokens = nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)
        hidden = get("img_in")(tokens) + sigma.view(-1, 1, 1)
        q, k, v = get("double_blocks.0.img_attn.qkv")(hidden).chunk(3, -1)
        q = q * get("double_blocks.0.img_attn.norm.query_norm").scale
        hidden = hidden + get("double_blocks.0.img_attn.proj")(q.tanh() * k.tanh() + v)
        q, k, v, mlp = get("single_blocks.0.linear1")(hidden).split([WIDTH] * 3 + [MLP], -1)
        both = torch.cat([q.tanh() * k.tanh() + v, silu(mlp)], -1)
        hidden = hidden + get("single_blocks.0.linear2")(both)
        shift, scale = get("final_layer.adaLN_modulation.1")(silu(hidden.mean(1, True))).chunk(
            2, -1
        )
        out = get("final_layer.linear")(hidden.tanh() * (1 + scale) + shift).transpose(1, 2)
        side = x.shape[-1] // 2
        return nn.functional.pixel_shuffle(out.unflatten(2, (side, side)), 2).tanh()


class WanDenoiser(nn.Module):
    """The projections of one block of Wan on a single picture."""

    def __init__(self) -> None:
        super().__init__()
        layers = {
            "patch_in": (WAN_WIDTH, 4 * CHANNELS),
            "blocks.0.self_attn.q": (WAN_WIDTH, WAN_WIDTH),
            "blocks.0.self_attn.v": (WAN_WIDTH, WAN_WIDTH),
            "blocks.0.ffn.0": (2 * WAN_WIDTH, WAN_WIDTH),
            "blocks.0.ffn.2": (WAN_WIDTH, 2 * WAN_WIDTH),
            "head.head": (4 * CHANNELS, WAN_WIDTH),
        }
        for path, (out, inner) in layers.items():
            add(self, path, Linear(inner, out))

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        get: Any = self.get_submodule
        tokens = nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)
        hidden = get("patch_in")(tokens) + sigma.view(-1, 1, 1)
        hidden = hidden + get("blocks.0.self_attn.q")(hidden).tanh()
        hidden = hidden + get("blocks.0.self_attn.v")(hidden)
        hidden = hidden + get("blocks.0.ffn.2")(silu(get("blocks.0.ffn.0")(hidden)))
        out = get("head.head")(hidden.tanh()).transpose(1, 2)
        side = x.shape[-1] // 2
        return nn.functional.pixel_shuffle(out.unflatten(2, (side, side)), 2).tanh()


class UNetDenoiser(nn.Module):
    """Some convolutions and projections of SD 1.5, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        add(self, "input_blocks.0.0", Conv2d(4, WIDTH, 3, padding=1))
        add(self, "input_blocks.1.0.in_layers.2", Conv2d(WIDTH, WIDTH, 3, padding=1))
        add(self, "input_blocks.1.1.proj_in", Conv2d(WIDTH, WIDTH, 1))
        name = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
        add(self, name, Linear(WIDTH, WIDTH, bias=False))
        add(self, "output_blocks.11.1.proj_out", Conv2d(WIDTH, WIDTH, 1))
        add(self, "out.2", Conv2d(WIDTH, 4, 3, padding=1))

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        get: Any = self.get_submodule
        size = sigma.view(-1, 1, 1, 1)
        hidden = get("input_blocks.0.0")(x / (size**2 + 1).sqrt()) + size.log() / 8
        hidden = get("input_blocks.1.1.proj_in")(get("input_blocks.1.0.in_layers.2")(hidden.tanh()))
        name = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
        hidden = hidden + get(name)(hidden.movedim(1, -1)).movedim(-1, 1)
        return get("out.2")(get("output_blocks.11.1.proj_out")(hidden).tanh())  # type: ignore[no-any-return]


class Model(nn.Module):
    """What a patcher holds: a denoiser and what is known of its noise levels."""

    manual_cast_dtype: torch.dtype | None = None

    def __init__(self, denoiser: nn.Module, sampling: Any, unet_config: dict[str, Any]) -> None:
        super().__init__()
        self.diffusion_model = denoiser
        self.model_sampling = sampling
        self.model_config = SimpleNamespace(unet_config=unet_config)

    def denoised(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        size = sigma.view(-1, *(1 for _ in x.shape[1:]))
        return x - size * self.diffusion_model(x, sigma)  # type: ignore[no-any-return]


def filled(model: nn.Module, size: float = 0.12) -> nn.Module:
    """Give every parameter random values, the same for the same names."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(False).eval()


def flux() -> nn.Module:
    return filled(Model(FluxDenoiser(), FlowSampling(), {}))


def sd1() -> nn.Module:
    return filled(Model(UNetDenoiser(), DiscreteSampling(), {}))


def wan() -> nn.Module:
    return filled(Model(WanDenoiser(), FlowSampling(), {}))


def places(model: nn.Module, table: dict[str, tuple[str, int, int]]) -> dict[str, torch.Tensor]:
    """Parameter of diffusers -> where its numbers are among those of the denoiser, in order.

    Args:
        table: module of diffusers -> module here, its first row, and the row after its last;
            negative rows count from a half of the module, whose halves are swapped.
    """
    found, begins, begin = {}, {}, 0
    denoiser: Any = model.diffusion_model
    for name, parameter in denoiser.named_parameters():
        begins[name] = begin
        begin += parameter.numel()
    for name, (module, first, end) in table.items():
        for kind in ("weight", "bias"):
            held = begins.get(f"{module}.{kind}")
            if held is None:
                continue
            shape = denoiser.get_parameter(f"{module}.{kind}").shape
            rows = torch.arange(held, held + shape.numel()).reshape(shape)
            if end < 0:
                rows = rows.roll(shape[0] // 2, 0)
            found[f"{name}.{kind}"] = rows[first : end if end > 0 else None]
    return found


_QKV, _LINEAR1 = "double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"
FLUX_PLACES = {
    "transformer_blocks.0.attn.to_q": (_QKV, 0, 32),
    "transformer_blocks.0.attn.to_k": (_QKV, 32, 64),
    "transformer_blocks.0.attn.to_v": (_QKV, 64, 96),
    "transformer_blocks.0.attn.to_out.0": ("double_blocks.0.img_attn.proj", 0, 32),
    "single_transformer_blocks.0.attn.to_k": (_LINEAR1, 32, 64),
    "single_transformer_blocks.0.proj_mlp": (_LINEAR1, 96, 224),
    "single_transformer_blocks.0.proj_out": ("single_blocks.0.linear2", 0, 32),
    "norm_out.linear": ("final_layer.adaLN_modulation.1", 0, -1),
    "x_embedder": ("img_in", 0, 32),
}
SD1_PLACES = {
    "conv_in": ("input_blocks.0.0", 0, 32),
    "down_blocks.0.resnets.0.conv1": ("input_blocks.1.0.in_layers.2", 0, 32),
    "down_blocks.0.attentions.0.proj_in": ("input_blocks.1.1.proj_in", 0, 32),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (
        "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
        0,
        32,
    ),
    "up_blocks.3.attentions.2.proj_out": ("output_blocks.11.1.proj_out", 0, 32),
    "conv_out": ("out.2", 0, 4),
}
WAN_PLACES = {
    "blocks.0.attn1.to_q": ("blocks.0.self_attn.q", 0, 48),
    "blocks.0.attn1.to_v": ("blocks.0.self_attn.v", 0, 48),
    "blocks.0.ffn.net.0.proj": ("blocks.0.ffn.0", 0, 96),
    "blocks.0.ffn.net.2": ("blocks.0.ffn.2", 0, 48),
    "proj_out": ("head.head", 0, 64),
}
#: Family -> its table.
PLACES = {"flux": FLUX_PLACES, "sd1": SD1_PLACES, "wan": WAN_PLACES}
