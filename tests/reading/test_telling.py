"""A base model is told by what its LoRA's layers are, where that tells one of several alike."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from klora_compile.reading.layers import LayerFacts
from klora_compile.reading.telling import families_of_layers, family_of_layers


def told(layers: Iterable[tuple[str, tuple[int, int]]], *families: str) -> str | None:
    facts = [
        LayerFacts(*name.split(".", 1), "weight", "lora", 1, 1.0, "rank", shape)
        for name, shape in layers
    ]
    return family_of_layers(facts, families)


def blocks(path: str, count: int, width: int) -> list[tuple[str, tuple[int, int]]]:
    """One square layer in each of so many blocks; `path` has `{}` for the block."""
    return [(path.format(i), (width, width)) for i in range(count)]


DOUBLE, SINGLE = (
    "transformer.transformer_blocks.{}.attn.to_q",
    "single_transformer_blocks.{}.attn.to_k",
)


@pytest.mark.parametrize(
    ("count", "families"),
    [
        (8, ("fibo", "flux.2")),
        (19, ("chroma", "flux.1")),
        (20, ("hunyuan-video",)),
        (60, ("qwen-image",)),
        (61, ()),
    ],
)
def test_attention_that_many_families_have_is_told_by_its_depth(
    count: int, families: tuple[str, ...]
) -> None:
    """All are 3072 wide; Chroma has as many blocks as FLUX.1, and no modulation in them."""
    assert one_of(blocks(DOUBLE, count, 3072)) == families
    modulated = [*blocks(DOUBLE, 19, 3072), *blocks(f"{BLOCK}.norm1.linear", 19, 3072)]
    assert one_of(modulated) == ("flux.1",)


def test_some_blocks_of_attention_tell_nothing() -> None:
    assert told(blocks(DOUBLE, 3, 3072)) is None


def test_blocks_in_names_of_another_family_are_that_ones() -> None:
    """ComfyUI builds HunyuanVideo of FLUX.1's blocks; 20 of them only HunyuanVideo has."""
    named = ("flux.1", "chroma", "hunyuan-video")
    assert one_of(blocks(DOUBLE, 3, 3072), *named) == ("chroma", "flux.1")
    assert told(blocks(DOUBLE, 20, 3072), *named) == "hunyuan-video"


def test_a_width_that_a_family_has_not_tells_that_it_is_another() -> None:
    named = ("hunyuan-video", "hunyuan-image")
    assert told(blocks(f"transformer.{SINGLE}", 3, 3072), *named) == "hunyuan-video"


def test_widths_go_before_the_depth() -> None:
    assert told(blocks(DOUBLE, 19, 1536)) == "sd3"


def test_single_blocks_tell_flux_from_auraflow() -> None:
    assert "auraflow" not in one_of(blocks(f"transformer.{SINGLE}", 38, 3072))
    assert told(blocks(f"transformer.{SINGLE}", 32, 3072)) == "auraflow"


SELF = "transformer.transformer_blocks.{}.attn1.to_q"
CROSS = "transformer.transformer_blocks.{}.attn2.to_k"
ADAPTER = "text_conditioner.blocks.{}.self_attn.q_proj"


def test_cosmos_layers_may_be_of_two_families() -> None:
    """LTX-Video 2B and Anima have 28 blocks of 2048 that are called alike."""
    layers = blocks(SELF, 28, 2048)
    assert told(layers) is None
    assert told([*layers, *blocks(CROSS, 28, 2048)]) == "ltx"
    assert told([*layers, *blocks(ADAPTER, 6, 1024)]) == "anima"
    assert told(layers, "anima") == "anima"


def test_all_components_of_a_family_are_its_own() -> None:
    """At a sixteenth of the width, where no mark is: the names alone tell."""
    assert told([*blocks(SELF, 3, 128), *blocks(ADAPTER, 2, 64)]) == "anima"


def test_a_second_denoiser_has_the_names_of_the_first() -> None:
    assert one_of(blocks("transformer_2.blocks.{}.attn1.to_q", 3, 64)) == ("wan", "wan-vace")
    assert told(blocks("transformer_2.layers.{}.attention.to_q", 3, 64)) is None


# --- marks that several families have ------------------------------------------------------------


def one_of(layers: Iterable[tuple[str, tuple[int, int]]], *families: str) -> tuple[str, ...]:
    facts = [
        LayerFacts(*name.split(".", 1), "weight", "lora", 1, 1.0, "rank", shape)
        for name, shape in layers
    ]
    return families_of_layers(facts, families)


BLOCK = "transformer.transformer_blocks.{}"


@pytest.mark.parametrize(
    ("path", "count", "width", "families"),
    [
        (f"{BLOCK}.attn1.to_q", 3, 1152, ("pixart", "sana", "sana-video")),
        (f"{BLOCK}.attn1.to_q", 28, 1152, ("pixart", "sana")),
        (f"{BLOCK}.attn1.to_q", 20, 2240, ("sana", "sana-video")),
        (f"{BLOCK}.attn1.to_q", 60, 2240, ("sana",)),
        (f"{BLOCK}.norm1.linear", 3, 512, ("cogvideox", "cogview-4", "glm-image")),
        (f"{BLOCK}.norm2.linear", 3, 512, ("cogvideox",)),
        (f"{BLOCK}.norm1.linear_1", 28, 2048, ("anima", "cosmos-predict")),
        (f"{BLOCK}.norm1.linear_1", 36, 5120, ("cosmos-predict",)),
        (f"transformer.{SINGLE}", 38, 3072, ("chroma", "fibo", "flux.1")),
        (f"transformer.{SINGLE}", 28, 2304, ("bria", "flux.3")),
        (f"{BLOCK}.attn1.to_q", 42, 3072, ("cogvideox",)),
        (f"{BLOCK}.attn1.to_q", 48, 3072, ("ltx-2", "mochi-1")),
        ("transformer.blocks.{}.attn1.to_q", 3, 5120, ("wan", "wan-vace")),
        ("transformer.blocks.{}.attn1.to_q", 40, 5120, ("wan",)),
    ],
)
def test_a_mark_of_several_families_says_one_of_them(
    path: str, count: int, width: int, families: tuple[str, ...]
) -> None:
    assert one_of(blocks(path, count, width)) == families


def test_layers_that_only_one_has_tell_it_from_those_with_its_marks() -> None:
    video = blocks(f"{BLOCK}.attn1.to_q", 3, 2240)
    temporal = blocks(f"{BLOCK}.ff.conv_temp", 3, 2240)
    assert one_of([*video, *temporal]) == ("sana-video",)
    assert one_of([*blocks(SELF, 28, 2048), *blocks(ADAPTER, 6, 1024)]) == ("anima",)
    time = [("transformer.time_embed.timestep_embedder.linear_1", (3072, 256))]
    assert one_of([*blocks(DOUBLE, 3, 3072), *time]) == ("fibo", "hunyuan-video-1.5")
