"""How exports are spelt: every family's names, modules fused into one, and what is no product."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.exports import as_klora_reads, average, error
from support.handmade import hand_entry, hand_fusion
from support.layout_models import weights
from support.lora_files import SHARED_DATA
from support.pairs import slow

from klora_compile import read_adapter
from klora_compile.export.settings import ExportSettings, Keys
from klora_compile.export.writing import export_static
from klora_compile.reading.layers import Layer
from klora_runtime.artifact.delta import Dense, LowRank, Stored
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.artifact.timeline import Timeline
from klora_runtime.errors import KloraError
from klora_runtime.families.catalogue import FAMILIES
from klora_runtime.families.rows import Layout

FORMATS = SHARED_DATA / "formats"

_BLOCK = "transformer_blocks.0"
_SINGLE = "single_transformer_blocks.0"


def written(fusion: Fusion, folder: Path, keys: Keys = "kohya", rank: int | None = None) -> Path:
    path = folder / "out.safetensors"
    export_static(fusion, path, ExportSettings(keys=keys, rank=rank), overwrite=True)
    return path


def named(family: str, component: str) -> Layout:
    names = FAMILIES[family].kohya_names(component)
    assert names is not None
    return replace(names[1], component=component)


def modules_of(layout: Layout) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The first module of each row of a table that LoRAs are for, and of long tables of every
    ninth row, with the shapes of the released model."""
    shapes = weights(layout.family, layout.component)
    rows = [row for row in layout.rows if not row.is_parameter]
    rows = rows[:: 9 if len(rows) > 200 else 1]
    for row in rows:
        for target in row.targets:
            pattern = re.escape(target).replace(r"\{\}", r"\d+")
            name = next(name for name in shapes if re.fullmatch(pattern, name))
            if len(shapes[name]) > 1 and not name.endswith(("embed_tokens", "token_embedding")):
                yield name, shapes[name]


WITH_KOHYA = sorted(key for key, family in FAMILIES.items() if family.kohya is not None)


@pytest.mark.parametrize("family", WITH_KOHYA)
def test_klora_reads_kohyas_names_of_every_family(family: str, tmp_path: Path) -> None:
    """All components together, low rank throughout, as the released models have them."""
    entries = [
        hand_entry(f"{component}.{name}", plain(shape), rank=1, seed=seed, switch=None)
        for component in FAMILIES[family].components
        if component != "transformer_2" and FAMILIES[family].kohya_names(component) is not None
        for seed, (name, shape) in enumerate(modules_of(named(family, component)))
    ]
    fusion = hand_fusion(*entries, family=family)
    adapter = read_adapter(written(fusion, tmp_path))
    assert adapter.survey.family == family
    assert set(adapter.layers) >= {entry.layer for entry in fusion.entries}
    for entry in fusion.entries:
        layer, stored = adapter.layers[entry.layer], entry.factors["content"]
        assert isinstance(stored.delta, LowRank)
        probe = torch.ones(prod(entry.shape[1:]), 1, dtype=torch.float64)
        expected = stored.scale * (flat(stored.delta.up) @ (flat(stored.delta.down) @ probe))
        found = layer.scaling * (flat(layer.up) @ (flat(layer.down) @ probe))
        assert error(found, expected) < 1e-5, entry.layer


@pytest.mark.skipif(
    not FORMATS.is_dir(), reason="key lists of real files are not here (shared/data)"
)
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("flux_lora_kohya_format", "kohya"),
        ("anima_lora_kohya_format", "kohya"),
        slow("sdxl_lora_kohya_te1_te2_alien_style", "kohya"),
        ("flux_lora_diffusers_format", "peft"),
    ],
)
def test_published_files_come_back_under_their_own_names(
    name: str, keys: Keys, tmp_path: Path
) -> None:
    """Read and written again, with the shapes of the published file but of rank 1."""
    shapes = of_rank_one(json.loads((FORMATS / f"{name}.json").read_text()))
    torch.manual_seed(0)
    save_file(
        {key: torch.rand(shape) for key, shape in shapes.items()}, tmp_path / "in.safetensors"
    )
    adapter = read_adapter(tmp_path / "in.safetensors")
    fusion = hand_fusion(*map(as_entry, adapter.layers.values()), family=adapter.survey.family)
    found = load_file(written(fusion, tmp_path, keys))
    assert {key: list(value.shape) for key, value in found.items()} == shapes


def of_rank_one(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    for key, shape in shapes.items():
        if re.search("lora_(down|A)", key):
            shape[0] = 1
        elif re.search("lora_(up|B)", key):
            shape[1] = 1
        assert shape or key.endswith(".alpha")
    return shapes


def as_entry(layer: Layer) -> Entry:
    """A layer that acts at all times."""
    return Entry(
        component=layer.component,
        module=layer.module,
        parameter=layer.parameter,
        shape=layer.shape,
        fate="always content",
        timeline=Timeline.constant({"content": 1.0}),
        factors={"content": Stored(layer.scaling, LowRank(layer.down, layer.up))},
        scores={},
    )


_CLIP_LAYER = "encoder.layers.0.mlp.fc1"
_T5_LAYER = "encoder.block.0.layer.0.SelfAttention.q"


@pytest.mark.parametrize(
    ("family", "layer", "kohya", "peft"),
    [
        ("sd1", f"text_encoder.{_CLIP_LAYER}", "lora_te_text_model_encoder_layers_0_mlp_fc1",
         "text_encoder.text_model.encoder.layers.0.mlp.fc1"),
        ("sdxl", f"text_encoder.{_CLIP_LAYER}", "lora_te1_text_model_encoder_layers_0_mlp_fc1",
         "text_encoder.text_model.encoder.layers.0.mlp.fc1"),
        ("sdxl", f"text_encoder_2.{_CLIP_LAYER}", "lora_te2_text_model_encoder_layers_0_mlp_fc1",
         "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"),
        ("sdxl", "text_encoder_2.text_projection", "lora_te2_text_projection",
         "text_encoder_2.text_projection"),
        ("flux.1", f"text_encoder_2.{_T5_LAYER}",
         "lora_te3_encoder_block_0_layer_0_SelfAttention_q", f"text_encoder_2.{_T5_LAYER}"),
        ("chroma", f"text_encoder.{_T5_LAYER}",
         "lora_te1_encoder_block_0_layer_0_SelfAttention_q", f"text_encoder.{_T5_LAYER}"),
    ],
)  # fmt: skip
def test_text_encoders_have_the_prefixes_that_tools_expect(
    family: str, layer: str, kohya: str, peft: str, tmp_path: Path
) -> None:
    fusion = hand_fusion(hand_entry(layer, (4, 4), switch=None), family=family)
    stems = {key.partition(".lora_")[0] for key in load_file(written(fusion, tmp_path, "peft"))}
    assert stems == {peft}
    stems = {key.partition(".")[0] for key in load_file(written(fusion, tmp_path))}
    assert stems == {kohya}


@pytest.mark.parametrize(
    ("family", "layer", "comfy"),
    [
        ("ltx", "transformer.transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_q"),
        ("ltx", "transformer.proj_in", "patchify_proj"),
        ("sdxl-refiner", "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
         "input_blocks.4.1.transformer_blocks.0.attn2.to_k"),
        ("hunyuan-video", "transformer.transformer_blocks.0.ff.net.0.proj",
         "double_blocks.0.img_mlp.0"),
        ("hunyuan-video", "transformer.transformer_blocks.0.attn.to_out.0",
         "double_blocks.0.img_attn.proj"),
        ("auraflow", "transformer.joint_transformer_blocks.0.attn.to_q",
         "double_layers.0.attn.w2q"),
    ],
)  # fmt: skip
def test_models_that_comfyui_alone_reads_have_its_own_names(
    family: str, layer: str, comfy: str, tmp_path: Path
) -> None:
    """It takes every layer of its model under ``lora_unet_`` and the layer's path there."""
    path = written(hand_fusion(hand_entry(layer, (4, 4), switch=None), family=family), tmp_path)
    stems = {key.partition(".")[0] for key in load_file(path)}
    assert stems == {f"lora_unet_{comfy.replace('.', '_')}"}


def plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """As artifacts have it: a 1x1 convolution is a linear layer."""
    return shape if any(size > 1 for size in shape[2:]) else shape[:2]


def flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double().flatten(1)


def test_families_without_kohyas_names_are_refused_by_name(tmp_path: Path) -> None:
    entry = hand_entry(f"transformer.{_BLOCK}.attn.to_q", (4, 4))
    known = (
        "Stable Diffusion 1.x, Stable Diffusion 2.x, Stable Diffusion XL, Stable Diffusion XL "
        "refiner, Stable Diffusion 3, FLUX.1, Chroma, FLUX.2, Qwen-Image, Z-Image, Wan, "
        "HunyuanVideo, LTX-Video 2B, Lumina 2, Anima, AuraFlow. Use --keys peft for diffusers."
    )
    for family, name in (("krea-2", "Krea 2"), ("a\n", "a\\n")):
        with pytest.raises(KloraError) as refusal:
            written(hand_fusion(entry, family=family), tmp_path)
        assert str(refusal.value) == (
            f"klora knows no kohya-style keys that tools read for {name}; supported: {known}"
        )
        written(hand_fusion(entry, family=family), tmp_path, "peft")
    with pytest.raises(KloraError) as refusal:
        written(hand_fusion(entry), tmp_path)
    assert str(refusal.value) == (
        "the layers do not say which base model this artifact is for, and kohya-style files state "
        "it. Compile it again with --family KEY, or use --keys peft."
    )
    written(hand_fusion(entry), tmp_path, "peft")


def test_of_several_base_models_the_only_one_with_kohyas_names_is_taken(tmp_path: Path) -> None:
    entry = hand_entry(f"transformer.{_BLOCK}.attn1.to_q", (4, 4))
    either = replace(hand_fusion(entry), families=("anima", "cosmos-predict"))
    named = replace(hand_fusion(entry), family="anima")
    found = written(either, tmp_path).read_bytes()
    assert found == written(named, tmp_path).read_bytes()
    entry = hand_entry(f"transformer.{_BLOCK}.attn.to_q", (4, 4))
    both = replace(hand_fusion(entry), families=("chroma", "flux.1"))
    with pytest.raises(KloraError, match=r"for one of Chroma, FLUX\.1, .* --family chroma or"):
        written(both, tmp_path)


def test_layers_without_a_name_are_refused_all_at_once(tmp_path: Path) -> None:
    fusion = hand_fusion(
        hand_entry("unet.mid_block.attentions.0.proj_in", (4, 4)),
        hand_entry("unet.extra.0", (4, 4)),
        hand_entry("image_encoder.layers.0", (4, 4)),
        family="sdxl",
    )
    fusion = replace(fusion, entries=tuple(e for e in fusion.entries if e.component == "unet"))
    with pytest.raises(KloraError) as refusal:
        written(fusion, tmp_path)
    assert str(refusal.value) == (
        "1 layers have no name in kohya's spelling of Stable Diffusion XL. Use --keys "
        "peft.\n  - unet.extra.0: has no name in kohya's spelling"
    )
    assert not (tmp_path / "out.safetensors").exists()


def test_an_artifact_for_two_denoisers_is_refused(tmp_path: Path) -> None:
    both = [
        hand_entry(f"{c}.blocks.0.attn1.to_q", (4, 4)) for c in ("transformer", "transformer_2")
    ]
    with pytest.raises(KloraError) as refusal:
        written(hand_fusion(*both, family="wan"), tmp_path, "peft")
    assert str(refusal.value) == (
        "this artifact changes transformer and transformer_2, and an ordinary LoRA can "
        "change one denoiser only. Compile one artifact for each and export both."
    )


@pytest.mark.parametrize("keys", ["kohya", "peft"])
def test_the_second_denoiser_of_wan_is_written_as_its_loaders_read_it(
    keys: Keys, tmp_path: Path
) -> None:
    entry = hand_entry("transformer_2.blocks.0.attn1.to_q", (4, 4))
    path = written(hand_fusion(entry, family="wan"), tmp_path, keys)
    start = {"kohya": "lora_unet_blocks_0_self_attn_q.", "peft": "transformer.blocks.0.attn1.to_q."}
    assert all(key.startswith(start[keys]) for key in load_file(path))


def shared_down(names: dict[str, int], columns: int = 8) -> list[Entry]:
    """Layers that one module of a file was parted into: each slot's ``down`` is the same tensor."""
    entries = [
        hand_entry(f"transformer.{name}", (rows, columns), switch=(i + 1) / 10, seed=i)
        for i, (name, rows) in enumerate(names.items())
    ]
    first = entries[0].factors
    return [
        replace(
            entry,
            factors={
                s: replace(f, delta=LowRank(first[s].delta.down, f.delta.up))
                for s, f in entry.factors.items()
            },
        )
        for entry in entries
    ]


def test_parts_that_share_a_down_are_fused_without_more_rank(tmp_path: Path) -> None:
    """Each with its own schedule still."""
    entries = shared_down({f"{_BLOCK}.attn.{name}": 8 for name in ("to_q", "to_k", "to_v")})
    path = written(hand_fusion(*entries, family="flux.1"), tmp_path)
    tensors = load_file(path)
    assert tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].shape == (4, 8)
    found = as_klora_reads(path)
    for entry in entries:
        assert error(found[entry.layer], average(entry)) < 1e-6


def test_parts_that_are_missing_are_zeros(tmp_path: Path) -> None:
    names = {f"{_BLOCK}.attn.to_k": 8, f"{_SINGLE}.attn.to_v": 8, f"{_SINGLE}.proj_mlp": 32}
    entries = [
        hand_entry(f"transformer.{name}", (rows, 8), seed=rows) for name, rows in names.items()
    ]
    found = as_klora_reads(written(hand_fusion(*entries, family="flux.1"), tmp_path))
    assert len(found) == 7
    expected = {entry.layer: average(entry) for entry in entries}
    for layer, delta in found.items():
        assert error(delta, expected[layer]) < 1e-6 if layer in expected else not delta.any()


def test_parts_that_are_missing_and_of_unknown_size_are_refused(tmp_path: Path) -> None:
    names = ("layers.0.attn.to_q", "layers.1.attn.to_k")  # 5/3 of 8 columns is no number of rows
    entries = [hand_entry(f"transformer.{name}", (8, 8)) for name in names]
    with pytest.raises(KloraError) as refusal:
        written(hand_fusion(*entries, family="lumina2"), tmp_path)
    assert str(refusal.value) == (
        "2 layers have no name in kohya's spelling of Lumina 2. Use --keys peft.\n  - "
        "transformer.layers.0.attn.to_q: kohya stores it fused with layers.0.attn.to_k, "
        "layers.0.attn.to_v, which this artifact does not contain\n  - "
        "transformer.layers.1.attn.to_k: kohya stores it fused with layers.1.attn.to_q, "
        "layers.1.attn.to_v, which this artifact does not contain"
    )


def test_parts_of_other_sizes_than_the_family_has_are_refused(tmp_path: Path) -> None:
    """A query of FLUX.1 is as wide as its input."""
    entry = hand_entry(f"transformer.{_SINGLE}.attn.to_q", (6, 8))
    with pytest.raises(KloraError, match=r"attn\.to_q: kohya stores it fused with single_"):
        written(hand_fusion(entry, family="flux.1"), tmp_path)


def dense_entry(layer: str, *shape: int, parameter: str = "weight", seed: int = 0) -> Entry:
    """A layer whose content is no product and acts until 0.25, and whose style is a product."""
    entry = hand_entry(layer, shape if len(shape) > 1 else (*shape, 2), switch=0.25, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    dense = Stored(0.5, Dense(torch.randn(*shape, generator=generator)))
    factors = {"content": dense, "style": entry.factors["style"]}
    if len(shape) == 1:
        factors["style"] = Stored(2.0, Dense(torch.randn(*shape, generator=generator)))
    return replace(entry, parameter=parameter, shape=shape, factors=factors)


def test_what_is_no_product_is_diff_in_kohyas_names(tmp_path: Path) -> None:
    """Linear layers and convolutions, biases, norms; also where a part of a module is one."""
    block = f"transformer.{_BLOCK}"
    entries = [
        dense_entry(f"{block}.attn.to_out.0", 6, 5),
        dense_entry(f"{block}.attn.to_out.0", 6, parameter="bias"),
        dense_entry(f"{block}.attn.norm_q", 4),
        dense_entry(f"{block}.attn.to_q", 8, 5),
        hand_entry(f"{block}.attn.to_v", (8, 5)),
        dense_entry(f"{block}.attn.to_q", 8, parameter="bias"),
        hand_entry(f"transformer.{_SINGLE}.proj_out", (5, 25)),
    ]
    fusion = hand_fusion(*entries, family="flux.1")
    path = written(fusion, tmp_path)
    tensors = load_file(path)
    assert {key: list(value.shape) for key, value in tensors.items()} == {
        "lora_unet_double_blocks_0_img_attn_norm_query_norm.diff": [4],
        "lora_unet_double_blocks_0_img_attn_proj.diff": [6, 5],
        "lora_unet_double_blocks_0_img_attn_proj.diff_b": [6],
        "lora_unet_double_blocks_0_img_attn_qkv.diff": [24, 5],
        "lora_unet_double_blocks_0_img_attn_qkv.diff_b": [24],
        "lora_unet_single_blocks_0_linear2.alpha": [],
        "lora_unet_single_blocks_0_linear2.lora_down.weight": [4, 25],
        "lora_unet_single_blocks_0_linear2.lora_up.weight": [5, 4],
    }
    found = as_klora_reads(path)
    for entry in entries:
        assert error(found[entry.layer], average(entry)) < 1e-6, entry.layer


def test_a_convolution_that_is_no_product_keeps_its_kernel(tmp_path: Path) -> None:
    entry = dense_entry("unet.conv_in", 4, 3, 3, 3)
    path = written(hand_fusion(entry, family="sd1"), tmp_path)
    assert load_file(path)["lora_unet_conv_in.diff"].shape == (4, 3, 3, 3)
    assert error(as_klora_reads(path)[entry.layer], average(entry)) < 1e-6


@pytest.mark.parametrize(
    ("family", "module", "key", "kernel"),
    [
        ("sd1", "down_blocks.0.attentions.0.proj_in", "down_blocks_0_attentions_0_proj_in", (1, 1)),
        ("sd2", "down_blocks.0.attentions.0.proj_in", "down_blocks_0_attentions_0_proj_in", ()),
        (
            "sdxl",
            "down_blocks.1.resnets.0.conv_shortcut",
            "input_blocks_4_0_skip_connection",
            (1, 1),
        ),
    ],
)
def test_a_pointwise_convolution_that_is_no_product_has_four_dimensions(
    family: str, module: str, key: str, kernel: tuple[int, ...], tmp_path: Path
) -> None:
    """ComfyUI adds a difference only to a weight of its shape; a linear layer stays a matrix."""
    entries = [
        dense_entry(f"unet.{module}", 6, 5),
        dense_entry(f"unet.{module}", 6, parameter="bias"),
    ]
    path = written(hand_fusion(*entries, family=family), tmp_path)
    tensors = load_file(path)
    assert tensors[f"lora_unet_{key}.diff"].shape == (6, 5, *kernel)
    assert tensors[f"lora_unet_{key}.diff_b"].shape == (6,)
    assert error(as_klora_reads(path)[f"unet.{module}"], average(entries[0])) < 1e-6


@pytest.mark.parametrize("module", ["encoder.layers.0.layer_norm1", "final_layer_norm"])
@pytest.mark.parametrize(
    ("family", "component", "name"),
    [
        ("sd1", "text_encoder", "clip_l"),
        ("sd2", "text_encoder", "clip_h"),
        ("sdxl", "text_encoder", "clip_l"),
        ("sdxl", "text_encoder_2", "clip_g"),
    ],
)
def test_norms_of_clip_have_the_full_name_that_comfyui_knows(
    family: str, component: str, name: str, module: str, tmp_path: Path
) -> None:
    """Under kohya's prefix it looks for attention and feed-forward layers alone."""
    entries = [dense_entry(f"{component}.{module}", 4, parameter=p) for p in ("weight", "bias")]
    attention = f"{component}.encoder.layers.0.self_attn.q_proj"
    path = written(hand_fusion(*entries, hand_entry(attention, (4, 4)), family=family), tmp_path)
    keys = set(load_file(path))
    full = f"text_encoders.{name}.transformer.text_model.{module}"
    assert {f"{full}.diff", f"{full}.diff_b"} <= keys
    assert all(key.startswith("lora_te") for key in keys if not key.startswith(full))
    found = as_klora_reads(path)
    for entry in entries:
        assert error(found[entry.layer], average(entry)) < 1e-6


def test_pefts_names_refuse_what_is_no_product(tmp_path: Path) -> None:
    entries = [
        dense_entry("unet.mid_block.attentions.0.proj_in", 6, 5),
        dense_entry("unet.mid_block.attentions.0.proj_in", 6, parameter="bias"),
        hand_entry("unet.mid_block.attentions.0.proj_out", (4, 4)),
    ]
    with pytest.raises(KloraError) as refusal:
        written(hand_fusion(*entries, family="sd2"), tmp_path, "peft")
    assert str(refusal.value) == (
        "2 layers are not low-rank, and PEFT keys can store only low-rank layers. Use "
        "--keys kohya (ComfyUI reads its `diff` keys), or --rank R, which approximates "
        "matrices by factors.\n  - unet.mid_block.attentions.0.proj_in: its bias [6] is not "
        "a product of factors\n  - unet.mid_block.attentions.0.proj_in: its weight [6, 5] "
        "is not a product of factors"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keys", ["kohya", "peft"])
def test_a_rank_makes_factors_of_a_matrix(keys: Keys, tmp_path: Path) -> None:
    entry = dense_entry("unet.conv_in", 8, 3, 3, 3)
    path = written(hand_fusion(entry, family="sd1"), tmp_path, keys, rank=3)
    (layer,) = read_adapter(path).layers.values()
    assert isinstance(layer.delta, LowRank)
    assert layer.delta.rank == 3
    left, values, right = torch.linalg.svd(average(entry).flatten(1), full_matrices=False)
    best = (left[:, :3] * values[:3]) @ right[:3]
    assert error(layer.delta.matrix(), best) < 1e-6


def test_values_beyond_a_dtype_are_refused(tmp_path: Path) -> None:
    entry = hand_entry("unet.conv_in", (4, 3), size=1e12)
    settings = ExportSettings(keys="peft", dtype="float16")
    with pytest.raises(KloraError) as refusal:
        export_static(hand_fusion(entry), tmp_path / "out.safetensors", settings)
    assert str(refusal.value) == (
        "float16 cannot hold the values of 1 layers. Use --dtype float32 or bfloat16.\n  - "
        "unet.conv_in"
    )


@pytest.mark.parametrize("stored", [True, False])
def test_a_fusion_that_does_nothing_is_refused(stored: bool, tmp_path: Path) -> None:
    entry = hand_entry("unet.conv_in", (4, 3))
    nothing = Timeline.constant({"content": 0.0, "style": 0.0})
    entry = replace(entry, timeline=nothing, factors=entry.factors if stored else {})
    with pytest.raises(KloraError) as refusal:
        written(hand_fusion(entry, family="sd1"), tmp_path)
    assert str(refusal.value) == (
        "no layer acts between progress 0 and 1, so there is no LoRA to write. Use fewer phases."
    )
