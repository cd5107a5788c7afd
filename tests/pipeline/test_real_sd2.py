"""Two published LoRAs on a full-size Stable Diffusion 2 UNet with random weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from reference import KLora
from support.generation import scheduler
from support.lora_files import needs_real_loras, real_lora
from tiny_pipeline import relative_difference, tiny_pipeline

from klora_compile import compile_fusion
from klora_runtime import apply_fusion
from klora_runtime.artifact.fusion import Fusion

CONTENT, STYLE = real_lora("sd2_character.peft"), real_lora("sd2_illustration.peft")

pytestmark = [needs_real_loras, pytest.mark.slow]

STEPS = 3


@pytest.fixture(scope="module")
def fusion() -> Fusion:
    return compile_fusion(CONTENT, STYLE, device="cpu")


@pytest.fixture(scope="module")
def pipe() -> Any:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            attention_head_dim=(5, 10, 20, 20),
            cross_attention_dim=1024,
            use_linear_projection=True,
        )
    assert sum(parameter.numel() for parameter in unet.parameters()) == 865_910_724
    unet.to_empty(device="cpu").eval().requires_grad_(False)
    fill(unet)
    parts = tiny_pipeline("sd2").components | {"unet": unet}
    parts["scheduler"] = scheduler("DDIM", STEPS)
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fill(unet: torch.nn.Module) -> None:
    """Random weights of the size that training starts from; cheap, one block of noise for all."""
    noise = torch.randn(2**22, generator=torch.Generator().manual_seed(0))
    for name, parameter in unet.named_parameters():
        values = parameter.data.view(-1)
        if parameter.dim() > 1:
            spread = 1 / math.sqrt(3 * parameter[0].numel())
            for start in range(0, len(values), len(noise)):
                part = values[start : start + len(noise)]
                torch.mul(noise[: len(part)], spread, out=part)
        else:
            values.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)


def generate(pipe: Any, **extra: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    words = torch.randn(1, 16, 1024, generator=generator)
    result = pipe(
        prompt_embeds=words,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        height=16,
        width=16,
        output_type="latent",
        generator=generator,
        **extra,
    )
    assert result.images.isfinite().all()
    latents = result.images
    assert isinstance(latents, torch.Tensor)
    return latents


def weights_of(pipe: Any, fusion: Fusion) -> dict[str, torch.Tensor]:
    return {
        entry.layer: pipe.unet.get_submodule(entry.module).weight.data
        for entry in fusion.entries
        if entry.component == "unet" and entry.acts
    }


def test_every_layer_holds_the_base_and_the_right_delta(pipe: Any, fusion: Fusion) -> None:
    fates = [entry.fate for entry in fusion.entries if entry.component == "unet"]
    assert (len(fates), fates.count("zero")) == (128, 32)  # all to_out.0
    assert fates.count("switching") > 20
    klora, live = KLora(CONTENT, STYLE), weights_of(pipe, fusion)
    base = {layer: weight.clone() for layer, weight in live.items()}
    gamma = klora.gamma("unet")
    chosen: list[list[str]] = []

    def check(module: torch.nn.Module, args: Any) -> None:
        t = (len(chosen) + 0.5) / STEPS
        chosen.append([klora.choice(layer, t, gamma) for layer in live])
        for (layer, weight), choice in zip(live.items(), chosen[-1], strict=True):
            delta = klora.delta(layer, choice).float()
            assert float(delta.abs().max()) > 1e-5, layer
            assert float((weight - (base[layer] + delta)).abs().max()) < 5e-8, layer

    with apply_fusion(pipe, fusion, components=["unet"]):
        hook = pipe.unet.register_forward_pre_hook(check)
        generate(pipe)
        hook.remove()

    assert len(chosen) == STEPS
    assert len({tuple(choices) for choices in chosen}) == STEPS  # something switches at each step
    for layer, weight in live.items():
        assert torch.equal(weight, base[layer])


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [(torch.float16, 5e-4, 5e-3), (torch.bfloat16, 5e-3, 5e-2)],
    ids=["float16", "bfloat16"],
)
def test_what_half_precision_costs(
    dtype: torch.dtype, low: float, high: float, pipe: Any, fusion: Fusion, record_property: Any
) -> None:
    """The arithmetic stays float32, only the adapted weights are held in half precision.

    So the difference is the error of merging alone, as a share of what the LoRAs do.
    """
    live = weights_of(pipe, fusion)
    before = {layer: weight.clone() for layer, weight in live.items()}
    try:
        round_all(live, dtype)
        bare = generate(pipe)
        with apply_fusion(pipe, fusion, components=["unet"]):
            exact = generate(pipe)
            hook = pipe.unet.register_forward_pre_hook(lambda *_: round_all(live, dtype))
            rounded = generate(pipe)
            hook.remove()
        convert(pipe, fusion, dtype)
        with apply_fusion(pipe, fusion, components=["unet"]) as handle:
            of_the_deltas = handle.report().rounding
    finally:
        convert(pipe, fusion, torch.float32)
        for layer, weight in weights_of(pipe, fusion).items():
            weight.copy_(before[layer])

    of_the_latents = relative_difference(rounded, exact) / relative_difference(exact, bare)
    record_property("error of the deltas", of_the_deltas)
    record_property("error of the latents, as a share of the LoRAs' effect", of_the_latents)
    assert low < of_the_deltas < high
    assert low / 10 < of_the_latents < high


def round_all(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    for weight in weights.values():
        weight.copy_(weight.to(dtype))


def convert(pipe: Any, fusion: Fusion, dtype: torch.dtype) -> None:
    for layer in weights_of(pipe, fusion):
        pipe.unet.get_submodule(layer.removeprefix("unet.")).to(dtype)
