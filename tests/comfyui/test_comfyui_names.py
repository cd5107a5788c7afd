"""Where the layers of an artifact are in ComfyUI's models."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
from support.comfyui.literal import flux_fusion, sd1_fusion
from support.handmade import hand_entry, hand_fusion

from klora_runtime.errors import ConfigError, IncompatibleModelError


@pytest.fixture(scope="session")
def names(acting: Any) -> Any:
    return sys.modules[f"{acting.__package__}.names"]


def rows_of(places: Any) -> dict[str, list[tuple[str, Any]]]:
    return {
        f"{place.module}.{place.parameter}": [
            (entry.module, rows and tuple((r.start, r.stop) for r in rows))
            for entry, rows in place.layers
        ]
        for place in places
    }


def test_layers_that_comfyui_joins_are_rows_of_one_parameter(kit: Any, names: Any) -> None:
    found = rows_of(names.places_in(kit.flux(), flux_fusion(), ["transformer"]))
    block = "transformer_blocks.0.attn"
    assert found["double_blocks.0.img_attn.qkv.weight"] == [
        (f"{block}.to_k", ((32, 64),)),
        (f"{block}.to_q", ((0, 32),)),
        (f"{block}.to_v", ((64, 96),)),
    ]
    assert found["single_blocks.0.linear1.weight"] == [
        ("single_transformer_blocks.0.attn.to_k", ((32, 64),)),
        ("single_transformer_blocks.0.proj_mlp", ((96, 224),)),
    ]
    swapped = found["final_layer.adaLN_modulation.1.weight"]
    assert swapped == [("norm_out.linear", ((32, 64), (0, 32)))]
    assert found["img_in.weight"] == [("x_embedder", None)]


def test_biases_and_norms_have_their_places(kit: Any, names: Any) -> None:
    weight = hand_entry("transformer.transformer_blocks.0.attn.to_v", (32, 1), switch=None)
    bias = replace(weight, parameter="bias", shape=(32,))
    norm = replace(weight, module="transformer_blocks.0.attn.norm_q", shape=norm_shape(kit))
    fusion = hand_fusion(bias, norm, family="flux.1")
    found = rows_of(names.places_in(kit.flux(), fusion, ["transformer"]))
    assert found == {
        "double_blocks.0.img_attn.qkv.bias": [(bias.module, ((64, 96),))],
        kit.flux_norm(kit.flux()).removeprefix("diffusion_model."): [(norm.module, None)],
    }


def norm_shape(kit: Any) -> tuple[int, ...]:
    model = kit.flux()
    return tuple(model.get_parameter(kit.flux_norm(model)).shape)


def test_names_that_comfyui_knows_in_diffusers_spelling(kit: Any, names: Any) -> None:
    found = rows_of(names.places_in(kit.sd1(), sd1_fusion(), ["unet"]))
    assert found["input_blocks.0.0.weight"] == [("conv_in", None)]
    name = "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    assert found[name] == [("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", None)]


def test_of_several_base_models_the_one_that_fits_is_taken(kit: Any, names: Any) -> None:
    fusion = replace(flux_fusion(), family=None, families=("chroma", "flux.1", "sd1"))
    assert len(names.places_in(kit.flux(), fusion, ["transformer"])) == 6


def test_rows_of_another_size_are_refused(kit: Any, names: Any) -> None:
    entry = hand_entry("transformer.transformer_blocks.0.attn.to_q", (40, 32))
    fusion = hand_fusion(entry, family="flux.1")
    with pytest.raises(IncompatibleModelError) as e:
        names.places_in(kit.flux(), fusion, ["transformer"])
    assert e.value.issues == (
        "transformer.transformer_blocks.0.attn.to_q: has shape [40, 32], and "
        "double_blocks.0.img_attn.qkv expects [32, 32]",
    )


def test_another_width_is_refused(kit: Any, acting: Any) -> None:
    entry = hand_entry("transformer.x_embedder", (32, 48))
    fusion = hand_fusion(entry, family="flux.1")
    with pytest.raises(
        IncompatibleModelError, match=r"x_embedder: has shape \[32, 48\], and img_in exp"
    ):
        acting.apply_to(kit.patcher(kit.flux()), acting.Applied(fusion))


def two_models() -> Any:
    layers = (
        "transformer.blocks.0.ffn.net.2",
        "transformer_2.blocks.0.ffn.net.2",
        "text_encoder.x",
    )
    return hand_fusion(*(hand_entry(name, (4, 4)) for name in layers), family="wan")


def test_an_artifact_of_two_models_asks_for_one_of_them(names: Any) -> None:
    fusion = two_models()
    assert names.denoisers_of(fusion) == ("transformer", "transformer_2")
    with pytest.raises(ConfigError, match=r"for 2 models, transformer and transformer_2\. Set"):
        names.components_of(fusion, "auto")
    assert names.components_of(fusion, "transformer_2") == ("transformer_2",)
    assert names.components_of(flux_fusion(), "auto") == ("transformer",)
    with pytest.raises(ConfigError, match="denoiser=transformer_2: the artifact has transformer"):
        names.components_of(flux_fusion(), "transformer_2")
