"""Kohya's spelling, proven on the real models: every module there and back, none confused."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers import UNet2DConditionModel
from support.layout_models import SD1, SD2, SDXL, on_meta
from support.lora_files import needs_real_loras, read_raw, real_lora
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from klora_compile.families.flat_names import UNET, Vocabulary, vocabulary
from klora_compile.reading.names.keys import ParsedKey, PlacedModule, parse_key
from klora_runtime.families import text_encoders

CLIP = vocabulary(text_encoders.CLIP.layouts)
LEAVES = (nn.Linear, nn.Conv2d)


def leaves(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LEAVES)]


def flattened(prefix: str, name: str) -> str:
    return prefix + name.replace(".", "_") + ".lora_down.weight"


def parsed(key: str) -> tuple[str, str]:
    result = parse_key(key)
    assert isinstance(result, ParsedKey), (key, result)
    assert isinstance(result.module, PlacedModule), (key, result)
    assert result.module.layout == "kohya"
    return result.module.component, result.module.module


@pytest.mark.parametrize(
    ("config", "count"), [(SD1, 282), (SD2, 282), (SDXL, 794)], ids=["sd1", "sd2", "sdxl"]
)
def test_every_layer_of_a_unet_comes_back(config: dict[str, Any], count: int) -> None:
    names = leaves(on_meta(UNet2DConditionModel, **config))
    assert len(names) == count
    keys = [flattened("lora_unet_", name) for name in names]
    assert len(set(keys)) == count
    assert [parsed(key) for key in keys] == [("unet", name) for name in names]


@pytest.mark.parametrize(
    ("prefix", "component"),
    [("lora_te_", "text_encoder"), ("lora_te1_", "text_encoder"), ("lora_te2_", "text_encoder_2")],
)
@pytest.mark.parametrize("written_with", ["", "text_model."])
@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
def test_every_layer_of_a_text_encoder_comes_back(
    kind: type[nn.Module], written_with: str, prefix: str, component: str
) -> None:
    """With and without ``text_model``, whichever of the two this transformers has."""
    found = leaves(on_meta(kind, CLIPTextConfig()))
    plain = [name.removeprefix("text_model.") for name in found]
    assert len(plain) == 72 + (kind is CLIPTextModelWithProjection)
    keys = [flattened(prefix, written_with + name) for name in plain]
    assert len(set(keys)) == len(plain)
    assert [parsed(key) for key in keys] == [(component, name) for name in plain]


@pytest.mark.parametrize(("vocabulary", "other"), [(UNET, CLIP), (CLIP, UNET)])
def test_no_flat_name_has_two_readings(vocabulary: Vocabulary, other: Vocabulary) -> None:
    """Each name followed by each other one is read as these two: no greedy step goes astray."""
    root = min(vocabulary.roots)
    for first in vocabulary.names:
        for second in [*vocabulary.names, "0", "11"]:
            read = vocabulary.dotted(f"{root}_{first}_{second}")
            assert read == f"{root}.{first}.{second}"
            assert (vocabulary.dotted(f"{first}_{second}") is not None) == (
                first in vocabulary.roots
            )
    assert any(other.dotted(name) is None for name in vocabulary.names)


@pytest.mark.parametrize("flat", ["", "_", "conv_", "_conv", "conv__in", "convolution", "conv.in"])
def test_what_is_no_flat_name_is_no_name(flat: str) -> None:
    assert UNET.dotted(flat) is None


@needs_real_loras
@pytest.mark.parametrize("name", ["sd2_character", "sd2_popart", "sd15_animation", "sd15_analog"])
def test_keys_of_real_files_name_modules_of_the_real_models(name: str) -> None:
    config = SD2 if name.startswith("sd2") else SD1
    modules = {("unet", path) for path in leaves(on_meta(UNet2DConditionModel, **config))}
    layers = 23 if name.startswith("sd2") else 12
    clip = on_meta(CLIPTextModel, CLIPTextConfig(num_hidden_layers=layers))
    modules |= {("text_encoder", path.removeprefix("text_model.")) for path in leaves(clip)}
    for layout in ("kohya", "peft"):
        header, _ = read_raw(real_lora(f"{name}.{layout}"))
        found = {
            (key.module.component, key.module.module)
            for key in map(parse_key, set(header) - {"__metadata__"})
            if isinstance(key, ParsedKey) and isinstance(key.module, PlacedModule)
        }
        assert len(found) >= 128
        assert found <= modules
