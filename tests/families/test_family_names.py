"""Models of real size, without their weights, are known by the shapes of their layers."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
from support.layout_models import (
    COGVIDEOX_5B,
    COGVIEW_4,
    COSMOS_2B,
    HIDREAM,
    KANDINSKY_5_PRO,
    on_meta,
)
from torch import nn

from klora_runtime.families.catalogue import FAMILIES, families_of


def shapes(component: str, model: str, settings: dict[str, Any]) -> dict[Any, tuple[int, ...]]:
    network = on_meta(getattr(diffusers, model), **settings)
    return {
        (component, path): tuple(module.weight.shape)
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def unet(width: int) -> tuple[str, dict[str, Any]]:
    return "UNet2DConditionModel", {"cross_attention_dim": width}


def sd3(heads: int) -> tuple[str, dict[str, Any]]:
    settings = {"num_attention_heads": heads, "caption_projection_dim": 64 * heads}
    return "SD3Transformer2DModel", settings


def flux2(heads: int) -> tuple[str, dict[str, Any]]:
    """FLUX.2 klein, as `scripts/convert_flux2_to_diffusers.py` of diffusers has it."""
    settings = {"num_attention_heads": heads, "num_layers": 1, "num_single_layers": 1}
    return "Flux2Transformer2DModel", {**settings, "joint_attention_dim": 320 * heads}


#: Families, component, model class, settings other than its defaults.
MODELS: list[tuple[str | None, str, str, dict[str, Any]]] = [
    ("sd1", "unet", *unet(768)),
    ("sd2", "unet", *unet(1024)),
    ("sdxl-refiner", "unet", *unet(1280)),
    ("sdxl", "unet", *unet(2048)),
    ("sd3", "transformer", *sd3(24)),
    ("sd3", "transformer", *sd3(38)),
    ("flux.2", "transformer", "Flux2Transformer2DModel", {}),
    ("flux.2", "transformer", *flux2(24)),
    ("flux.2", "transformer", *flux2(32)),
    ("krea-2", "transformer", "Krea2Transformer2DModel", {}),
    ("anima", "text_conditioner", "AnimaTextConditioner", {}),
    ("qwen-image", "transformer", "QwenImageTransformer2DModel", {}),
    ("z-image", "transformer", "ZImageTransformer2DModel", {}),
    ("wan", "transformer", "WanTransformer3DModel", {}),
    ("wan", "transformer_2", "WanTransformer3DModel", {}),
    ("wan", "transformer", "WanTransformer3DModel", {"num_attention_heads": 12}),
    ("wan", "transformer", "WanTransformer3DModel", {"num_attention_heads": 24}),
    ("ltx", "transformer", "LTXVideoTransformer3DModel", {}),
    ("hunyuan-video", "transformer", "HunyuanVideoTransformer3DModel", {}),
    ("flux.1", "transformer", "FluxTransformer2DModel", {}),
    ("chroma", "transformer", "ChromaTransformer2DModel", {}),
    ("auraflow", "transformer", "AuraFlowTransformer2DModel", {}),
    ("lumina2", "transformer", "Lumina2Transformer2DModel", {}),
    ("ltx-2", "transformer", "LTX2VideoTransformer3DModel", {}),
    ("hidream-i1", "transformer", "HiDreamImageTransformer2DModel", HIDREAM),
    (None, "transformer", "BriaTransformer2DModel", {}),
    ("fibo", "transformer", "BriaFiboTransformer2DModel", {}),
    (None, "transformer", "LongCatImageTransformer2DModel", {}),
    ("anima cosmos-predict", "transformer", "CosmosTransformer3DModel", {}),
    ("anima cosmos-predict", "transformer", "CosmosTransformer3DModel", COSMOS_2B),
    ("flux.3", "transformer", "Flux3Transformer2DModel", {}),
    (None, "transformer", "OvisImageTransformer2DModel", {}),
    ("ernie-image", "transformer", "ErnieImageTransformer2DModel", {}),
    ("hunyuan-video-1.5", "transformer", "HunyuanVideo15Transformer3DModel", {}),
    ("hunyuan-image", "transformer", "HunyuanImageTransformer2DModel", {}),
    ("wan-vace", "transformer", "WanVACETransformer3DModel", {}),
    ("qwen-image-2.1", "transformer", "QwenImage21Transformer2DModel", {}),
    ("kandinsky-5", "transformer", "Kandinsky5Transformer3DModel", {}),
    ("kandinsky-5", "transformer", "Kandinsky5Transformer3DModel", KANDINSKY_5_PRO),
    ("sana sana-video", "transformer", "SanaTransformer2DModel", {}),
    ("sana sana-video", "transformer", "SanaVideoTransformer3DModel", {}),
    ("minimax-h3", "transformer", "MiniMaxH3Transformer3DModel", {}),
    ("ace-step", "transformer", "AceStepTransformer1DModel", {}),
    ("cogview-4 cogvideox glm-image", "transformer", "CogVideoXTransformer3DModel", {}),
    ("cogview-4 cogvideox glm-image", "transformer", "CogVideoXTransformer3DModel", COGVIDEOX_5B),
    ("mochi-1", "transformer", "MochiTransformer3DModel", {}),
    ("ideogram-4", "transformer", "Ideogram4Transformer2DModel", {}),
    ("pixart sana sana-video", "transformer", "PixArtTransformer2DModel", {}),
    ("cogview-4 cogvideox glm-image", "transformer", "CogView4Transformer2DModel", COGVIEW_4),
    ("cogview-4 cogvideox glm-image", "transformer", "GlmImageTransformer2DModel", {}),
]


@pytest.mark.parametrize(("family", "component", "model", "settings"), MODELS)
def test_a_model_of_real_size_is_known(
    family: str | None, component: str, model: str, settings: dict[str, Any]
) -> None:
    assert families_of(shapes(component, model, settings)) == set((family or "").split())


def test_every_family_is_tested() -> None:
    marked = {key for key, family in FAMILIES.items() if family.marks}
    assert {key for families, *_ in MODELS for key in (families or "").split()} == marked


#: Models of diffusers that load no LoRAs and have layers by which families are told.
ALIKE = {
    "CogView3PlusTransformer2DModel": "cogview-4",
    "DiTTransformer2DModel": "pixart",
    "LatteTransformer3DModel": "pixart",
    "SanaWMLTX2RefinerTransformer3DModel": "ltx-2",
}


@pytest.mark.slow
def test_no_other_model_of_diffusers_is_taken_for_one_of_a_family() -> None:
    """Every transformer that its class builds without settings, in the sizes of a release."""
    own: dict[str, set[str]] = {name: {key} for name, key in ALIKE.items()}
    for key, family in FAMILIES.items():
        for name in family.models:
            own.setdefault(name, set()).add(key)
    looked_at = 0
    for name in dir(diffusers):
        if "Transformer" not in name or not name.endswith("Model"):
            continue
        try:
            found = families_of(shapes("transformer", name, {}))
        except (TypeError, ValueError):  # it has no defaults
            continue
        looked_at += 1
        assert not found or found & own.get(name, set()), (name, found)
    assert looked_at > 50
