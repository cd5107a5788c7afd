"""Files in the names of models' authors: every key used, every delta where diffusers has it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import lora_conversion_utils
from safetensors.torch import save_file
from support.lora_files import FORMATS, random_pair, smaller, write_lora

from klora_compile import ReadOptions, read_adapter
from klora_compile.reading.adapter import Adapter
from klora_compile.reading.layers import Layer
from klora_runtime.errors import LoraError

#: Real key list -> its layout, whose names it has, the base family that is told at a sixteenth of
#: the width, and how many layers it makes.
READ: dict[str, tuple[str, str, str | None, int]] = {
    "anima_lora_kohya_format": ("kohya", "cosmos", "anima", 11),
    "anima_lora_peft_format": ("peft", "cosmos", None, 6),
    "flux_lora_aitoolkit_format": ("peft", "bfl", None, 418),  # Chroma's, too
    "flux_lora_diffusers_base_model_format": ("peft", "diffusers", None, 381),  # Chroma's, too
    "flux_lora_diffusers_format": ("peft", "diffusers", "flux.1", 494),
    "flux_lora_diffusers_with_norm_out_format": ("peft", "diffusers", "flux.1", 504),
    "flux_lora_kohya_format": ("kohya", "bfl", "flux.1", 494),
    "flux_lora_xlabs_format": ("xlabs", "xlabs", "flux.1", 24),
    "flux_slider_safetensors": ("peft", "diffusers", "flux.1", 494),
    "krea2_lora_kohya_format": ("kohya", "krea", "krea-2", 40),
    "qwen_image_lora_diffusers_format": ("peft", "diffusers", None, 3),
    "sdxl_lora_kohya_te1_te2_alien_style": ("kohya", "ldm", "sdxl", 986),
}
#: Real key list -> why it is refused. Both lists of LoKr have shapes that no model has.
REFUSED = {
    "anima_lora_lokr_format": "rows and columns look alike",
    "flux_control_lora_format": "are needed for 152 modules of the form value",
    "flux_dora_onetrainer_format": "are needed for 506 modules of the form dora",
    "flux_lokr_bfl_format": "is ambiguous: chroma, flux.1, flux.2, .* the widths match none",
}


def written(name: str, folder: Path) -> Path:
    path = FORMATS / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"{path.name} of the shared data is absent")
    tensors = {
        key: torch.ones(smaller(shape)) for key, shape in json.loads(path.read_text()).items()
    }
    return write_lora(folder / f"{name}.safetensors", tensors)


@pytest.mark.parametrize("name", READ)
def test_every_key_of_a_real_list_is_used(name: str, tmp_path: Path) -> None:
    path = written(name, tmp_path)
    adapter = read_adapter(path)
    found = (
        adapter.survey.layout,
        adapter.survey.names,
        adapter.survey.family,
        len(adapter.layers),
    )
    assert found == READ[name]
    assert (
        adapter.survey.used
        == adapter.survey.keys
        == len(json.loads((FORMATS / f"{name}.json").read_text()))
    )


@pytest.mark.parametrize("name", REFUSED)
def test_a_real_list_of_another_form_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(LoraError, match=REFUSED[name]):
        read_adapter(written(name, tmp_path))


def test_no_real_list_is_passed_over() -> None:
    if not FORMATS.is_dir():
        pytest.skip("the shared data is absent")
    assert {path.stem for path in FORMATS.glob("*.json")} - {"index"} == set(READ) | set(REFUSED)


# Deltas.

RANK, ALPHA = 2, 3.0

#: The width that diffusers' converter takes for granted, and one that is quick.
REAL, SMALL = 3072, 48


def kohya(modules: Mapping[str, tuple[int, int]], alpha: float | None = ALPHA) -> dict[str, Any]:
    """A file of modules of these shapes (out, in), in kohya's keys."""
    tensors = {}
    for seed, (name, (out, inner)) in enumerate(modules.items()):
        down, up = random_pair(out, inner, RANK, seed=seed)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def delta(layer: Layer) -> torch.Tensor:
    return layer.scaling * (layer.up.double() @ layer.down.double())


def read(tensors: Mapping[str, torch.Tensor], folder: Path) -> Adapter:
    return read_adapter(write_lora(folder / "lora.safetensors", dict(tensors)))


def flux(width: int) -> dict[str, tuple[int, int]]:
    """Modules of FLUX.1 in kohya's spelling and their shapes (out, in)."""
    return {
        "double_blocks_3_img_attn_qkv": (3 * width, width),
        "double_blocks_3_txt_attn_qkv": (3 * width, width),
        "double_blocks_3_img_attn_proj": (width, width),
        "double_blocks_3_txt_mlp_2": (width, 4 * width),
        "single_blocks_17_linear1": (7 * width, width),
        "single_blocks_17_linear2": (width, 5 * width),
    }


def test_fused_rows_go_to_the_modules_that_diffusers_has(tmp_path: Path) -> None:
    tensors = kohya({f"lora_unet_{name}": shape for name, shape in flux(SMALL).items()})
    layers = read(tensors, tmp_path).layers
    joint, one = "transformer.transformer_blocks.3", "transformer.single_transformer_blocks.17"
    expected = {
        "double_blocks_3_img_attn_qkv": [f"{joint}.attn.to_{name}" for name in "qkv"],
        "double_blocks_3_txt_attn_qkv": [f"{joint}.attn.add_{name}_proj" for name in "qkv"],
        "double_blocks_3_img_attn_proj": [f"{joint}.attn.to_out.0"],
        "double_blocks_3_txt_mlp_2": [f"{joint}.ff_context.net.2"],
        "single_blocks_17_linear1": [
            *(f"{one}.attn.to_{name}" for name in "qkv"),
            f"{one}.proj_mlp",
        ],
        "single_blocks_17_linear2": [f"{one}.proj_out"],
    }
    assert sorted(layers) == sorted(name for names in expected.values() for name in names)
    for source, names in expected.items():
        down = tensors[f"lora_unet_{source}.lora_down.weight"].double()
        up = tensors[f"lora_unet_{source}.lora_up.weight"].double()
        whole = ALPHA / RANK * (up @ down)
        assert torch.allclose(torch.cat([delta(layers[name]) for name in names]), whole, rtol=1e-6)
    assert layers[f"{one}.proj_mlp"].shape == (4 * SMALL, SMALL)


def test_deltas_are_those_of_diffusers_own_converter(tmp_path: Path) -> None:
    tensors = kohya({f"lora_unet_{name}": shape for name, shape in flux(REAL).items()})
    theirs = lora_conversion_utils._convert_kohya_flux_lora_to_diffusers(dict(tensors))
    layers = read(tensors, tmp_path).layers
    names = {key.removesuffix(".lora_A.weight") for key in theirs if key.endswith("lora_A.weight")}
    assert names == set(layers)
    for name, layer in layers.items():
        down, up = (theirs[f"{name}.lora_{side}.weight"].double() for side in "AB")
        some = slice(None, None, down.shape[1] // 16)  # columns
        found = layer.scaling * (layer.up.double() @ layer.down[:, some].double())
        assert torch.allclose(found, up @ down[:, some], rtol=1e-4, atol=1e-5)


def test_one_lora_in_three_spellings_is_one(tmp_path: Path) -> None:
    flat = kohya({f"lora_unet_{name}": shape for name, shape in flux(SMALL).items()}, alpha=None)
    names = {
        "double_blocks_3_img_attn_qkv": "double_blocks.3.img_attn.qkv",
        "double_blocks_3_txt_attn_qkv": "double_blocks.3.txt_attn.qkv",
        "double_blocks_3_img_attn_proj": "double_blocks.3.img_attn.proj",
        "double_blocks_3_txt_mlp_2": "double_blocks.3.txt_mlp.2",
        "single_blocks_17_linear1": "single_blocks.17.linear1",
        "single_blocks_17_linear2": "single_blocks.17.linear2",
    }
    expected = read(flat, tmp_path).layers
    for prefix in ("", "diffusion_model.", "base_model.model."):
        spelled = {
            f"{prefix}{names[stem]}.lora_{side}.weight": flat[
                f"lora_unet_{stem}.lora_{part}.weight"
            ]
            for stem in names
            for side, part in (("A", "down"), ("B", "up"))
        }
        found = read(spelled, tmp_path).layers
        assert list(found) == list(expected)
        assert all(torch.equal(delta(found[name]), delta(expected[name])) for name in expected)


def test_shift_and_scale_change_places(tmp_path: Path) -> None:
    tensors = kohya(
        {"lora_unet_final_layer_adaLN_modulation_1": (8, 4), "lora_unet_img_in": (4, 4)}
    )
    layers = read(tensors, tmp_path).layers
    up = tensors["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"]
    assert torch.equal(layers["transformer.norm_out.linear"].up, up.roll(4, 0))


def test_sdxl_in_its_authors_names_with_both_text_encoders(tmp_path: Path) -> None:
    tensors = kohya(
        {
            "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q": (8, 8),
            "lora_unet_output_blocks_2_2_conv": (8, 8),
            "lora_unet_middle_block_1_proj_in": (8, 8),
            "lora_te1_text_model_encoder_layers_0_mlp_fc1": (8, 8),
            "lora_te2_text_model_encoder_layers_31_mlp_fc1": (8, 8),
        }
    )
    assert list(read(tensors, tmp_path).layers) == [
        "text_encoder.encoder.layers.0.mlp.fc1",
        "text_encoder_2.encoder.layers.31.mlp.fc1",
        "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q",
        "unet.mid_block.attentions.0.proj_in",
        "unet.up_blocks.0.upsamplers.0.conv",
    ]


@pytest.mark.parametrize(
    ("denoiser", "component"),
    [
        ("double_blocks_0_img_mod_lin", "text_encoder_2"),
        ("joint_blocks_0_x_block_mlp_fc1", "text_encoder_3"),
        ("distilled_guidance_layer_in_proj", "text_encoder"),
    ],
)
@pytest.mark.parametrize("dotted", [False, True])
def test_which_text_encoder_t5_is_follows_from_the_family(
    denoiser: str, component: str, dotted: bool, tmp_path: Path
) -> None:
    """In kohya's spelling, and in ComfyUI's, which OneTrainer writes too."""
    t5 = "encoder_block_0_layer_0_SelfAttention_q"
    key = f"lora_te3_{t5}"
    if dotted:
        key = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"
    tensors = kohya({f"lora_unet_{denoiser}": (8, 8), key: (8, 8)})
    (encoder,) = (
        layer
        for layer in read(tensors, tmp_path).layers.values()
        if "block.0" in layer.module and layer.component.startswith("text")
    )
    assert (encoder.component, encoder.module) == (
        component,
        "encoder.block.0.layer.0.SelfAttention.q",
    )


def test_clip_of_hunyuan_video_is_its_second_text_encoder(tmp_path: Path) -> None:
    """ComfyUI's name of it is that of the first one of other models."""
    clip = "text_model.encoder.layers.3.mlp.fc1"
    tensors = kohya(
        {
            "lora_unet_double_blocks_0_img_mlp_fc1": (8, 8),
            f"text_encoders.clip_l.transformer.{clip}": (8, 8),
        }
    )
    assert "text_encoder_2.encoder.layers.3.mlp.fc1" in read(tensors, tmp_path).layers


def test_onetrainers_files_in_diffusers_names(tmp_path: Path) -> None:
    tensors = kohya(
        {
            "lora_transformer_single_transformer_blocks_3_attn_to_k": (8, 8),
            "lora_transformer_proj_out": (8, 8),
            "lora_te1_text_model_encoder_layers_0_mlp_fc1": (8, 8),
            "lora_te2_encoder_block_0_layer_1_DenseReluDense_wi_0": (8, 8),
        }
    )
    assert list(read(tensors, tmp_path).layers) == [
        "text_encoder.encoder.layers.0.mlp.fc1",
        "text_encoder_2.encoder.block.0.layer.1.DenseReluDense.wi_0",
        "transformer.proj_out",
        "transformer.single_transformer_blocks.3.attn.to_k",
    ]


def test_a_name_that_a_unet_has_too_goes_where_the_others_go(tmp_path: Path) -> None:
    tensors = kohya({f"lora_unet_{name}": (8, 8) for name in ("proj_out", "x_embedder")})
    assert list(read(tensors, tmp_path).layers) == [
        "transformer.proj_out",
        "transformer.x_embedder",
    ]


def test_old_attention_processors_of_diffusers(tmp_path: Path) -> None:
    attention = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    tensors = {}
    for name in ("to_q_lora", "to_out_lora"):
        down, up = random_pair(8, 8, RANK)
        tensors |= {
            f"{attention}.processor.{name}.{part}.weight": t
            for part, t in (("down", down), ("up", up))
        }
    assert list(read(tensors, tmp_path).layers) == [f"{attention}.to_out.0", f"{attention}.to_q"]


# What cannot be placed.


def refusal(tensors: Mapping[str, torch.Tensor], folder: Path) -> str:
    with pytest.raises(LoraError) as error:
        read(tensors, folder)
    return str(error.value).partition("lora.safetensors: ")[2]


_UNKNOWN = "klora knows no model with a module of this name"


def test_modules_of_no_model_are_named(tmp_path: Path) -> None:
    assert refusal(kohya({"lora_unet_mystery_7": (8, 8)}, alpha=None), tmp_path) == (
        "2 of 2 keys cannot be used, and klora reads a file whole or not at all. Convert it to "
        "diffusers/PEFT keys, or leave them out with --ignore-unknown.\n"
        f"  - lora_unet_mystery_7.lora_down.weight: {_UNKNOWN}\n"
        f"  - lora_unet_mystery_7.lora_up.weight: {_UNKNOWN}"
    )


def test_a_module_that_the_others_model_does_not_have(tmp_path: Path) -> None:
    tensors = kohya({f"lora_unet_{name}": (8, 8) for name in ("img_in", "txt_in", "mystery")}, None)
    text = refusal(tensors, tmp_path)
    assert text.startswith("2 of 6 keys cannot be used")
    assert "lora_unet_mystery.lora_up.weight: is not a module of flux.1, though img_in is" in text


def test_rows_that_cannot_be_parted(tmp_path: Path) -> None:
    text = refusal(kohya({"lora_unet_double_blocks_0_img_attn_qkv": (8, 8)}), tmp_path)
    assert "double_blocks_0_img_attn_qkv: cannot be split into" in text
    assert text.endswith("8 rows are not three equal parts")


def test_two_spellings_of_one_module(tmp_path: Path) -> None:
    tensors = kohya({"lora_unet_img_in": (8, 8)}) | kohya({"lora_transformer_x_embedder": (8, 8)})
    text = refusal(tensors, tmp_path)
    assert "cannot be used" in text


def test_widths_tell_families_of_one_name_apart(tmp_path: Path) -> None:
    """FLUX.1's feed-forward layers are four times as wide as the model, FLUX.2's twice three."""
    name = "lora_unet_double_blocks_0_img_mlp_0"
    first, second = (read(kohya({name: (out, 8)}), tmp_path) for out in (32, 48))
    assert list(first.layers) == ["transformer.transformer_blocks.0.ff.net.0.proj"]
    assert list(second.layers) == ["transformer.transformer_blocks.0.ff.linear_in"]
    text = refusal(kohya({name: (40, 8)}), tmp_path)
    assert (
        f"{name}.alpha: is ambiguous: chroma, flux.1, flux.2, hunyuan-image, hunyuan-video, "
        "hunyuan-video-1.5 have a module of this name, each at another place" in text
    )


def test_names_that_two_families_place_differently(tmp_path: Path) -> None:
    """None of the real tables may contradict each other on a real file; a made one does."""
    from klora_compile.reading.names import placing
    from klora_compile.reading.names.table_index import TableIndex
    from klora_runtime.families.rows import Layout, Row

    made = Layout("made", "made-up", "transformer", (Row("img_in", ("elsewhere",)),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placing, "TABLES", TableIndex((*placing.TABLES, made)))
        text = refusal(kohya({"lora_unet_img_in": (8, 8)}), tmp_path)
    assert "made-up" in text
    assert "each at another place" in text


# What a prefix says, and what the metadata says.


def named(tensors: Mapping[str, torch.Tensor], folder: Path, **metadata: str) -> Adapter:
    path = folder / "lora.safetensors"
    save_file(dict(tensors), str(path), metadata=metadata or None)
    return read_adapter(path)


@pytest.mark.parametrize("prefix", ["transformer.", "base_model.model.transformer."])
def test_authors_names_behind_the_name_of_a_component(prefix: str, tmp_path: Path) -> None:
    """``transformer.`` promises diffusers' names; some write it before the authors'."""
    adapter = read(kohya({f"{prefix}double_blocks.0.img_attn.qkv": (48, 16)}), tmp_path)
    assert list(adapter.layers) == [
        f"transformer.transformer_blocks.0.attn.to_{name}" for name in "kqv"
    ]
    assert adapter.survey.names == "bfl"
    unet = read(kohya({"unet.input_blocks.4.1.proj_in": (8, 8)}), tmp_path)
    assert list(unet.layers) == ["unet.down_blocks.1.attentions.0.proj_in"]
    plain = read(kohya({"transformer.transformer_blocks.0.attn.to_q": (8, 8)}), tmp_path)
    assert (plain.survey.names, list(plain.layers)) == (
        "diffusers",
        ["transformer.transformer_blocks.0.attn.to_q"],
    )


@pytest.mark.parametrize(
    "metadata",
    [{"modelspec.architecture": "chroma/lora"}, {"ss_base_model_version": "chroma"}],
)
def test_metadata_tells_what_names_do_not(metadata: dict[str, str], tmp_path: Path) -> None:
    """Chroma's blocks have FLUX.1's names; its T5 is the only text encoder."""
    tensors = kohya(
        {
            "lora_unet_double_blocks_0_img_mlp_0": (64, 16),
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q": (8, 8),
        }
    )
    layer = "encoder.block.0.layer.0.SelfAttention.q"
    stated, silent = named(tensors, tmp_path, **metadata), named(tensors, tmp_path)
    assert stated.survey.families == ("chroma",)
    assert silent.survey.families == ("chroma", "flux.1")
    assert f"text_encoder.{layer}" in stated.layers
    assert f"text_encoder_2.{layer}" in silent.layers
    wrong = named(tensors, tmp_path, ss_base_model_version="sdxl_base_v1-0")
    assert wrong.survey.families == ("chroma", "flux.1")  # names go before what is stated


#: Attention that Stable Diffusion 1.x and 2.x both have; SDXL has none in its first block.
SELF_ATTENTION = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def test_layers_that_tell_nothing_may_state_their_base_model(tmp_path: Path) -> None:
    """In an option, or in the metadata of the file; the option may be wrong, which is said."""
    tensors = kohya({SELF_ATTENTION: (320, 320)})
    assert named(tensors, tmp_path).survey.family is None
    assert named(tensors, tmp_path, ss_base_model_version="sd_v1").survey.family == "sd1"
    assert named(tensors, tmp_path, ss_base_model_version="flux1").survey.family is None
    path = write_lora(tmp_path / "lora.safetensors", tensors)
    for family in ("sd1", "sd2"):
        assert read_adapter(path, ReadOptions(family=family)).survey.family == family
    for family, title in (("sdxl", "Stable Diffusion XL"), ("flux.1", "FLUX.1")):
        with pytest.raises(LoraError) as caught:
            read_adapter(path, ReadOptions(family=family))
        assert caught.value.issues == (
            "its layers are those of one of Stable Diffusion 1.x, Stable Diffusion 2.x, and not of "
            f"{title} as --family says",
        )


def test_layers_of_no_known_base_model_are_what_the_option_says(tmp_path: Path) -> None:
    module = "unet.down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q"
    path = write_lora(tmp_path / "lora.safetensors", kohya({module: (320, 320)}))
    assert read_adapter(path, ReadOptions(family="sd1")).survey.family == "sd1"
    assert read_adapter(path).survey.family is None


def test_a_bias_alone_whose_rows_the_weight_would_share_out(tmp_path: Path) -> None:
    """SD3's last modulation of the context has two parts, which diffusers swaps, all others six."""
    name = "lora_unet_joint_blocks_23_context_block_adaLN_modulation_1"
    text = refusal({f"{name}.diff_b": torch.arange(16.0)}, tmp_path)
    assert (
        "only its bias is in the file; the weight is needed to know how its rows are split"
    ) in text
    both = kohya({name: (16, 8)}, alpha=None) | {f"{name}.diff_b": torch.arange(16.0)}
    (bias,) = (v for v in read(both, tmp_path).layers.values() if v.parameter == "bias")
    assert bias.delta.matrix()[:, 0].tolist() == [*range(8, 16), *range(8)]
    thirds = {"lora_unet_double_blocks_0_img_attn_qkv.diff_b": torch.arange(6.0)}
    layers = read(thirds, tmp_path).layers
    assert layers["transformer.transformer_blocks.0.attn.to_k.bias"].delta.norm() == 13**0.5


@pytest.mark.parametrize(
    ("key", "layer"),
    [
        ("lycoris_double_blocks_0_img_attn_proj", "transformer.transformer_blocks.0.attn.to_out.0"),
        ("lora_te_encoder_block_0_layer_1_DenseReluDense_wo", None),
        ("lora_te1_encoder_block_0_layer_1_DenseReluDense_wo", None),
        ("lora_te1_layers_3_mlp_gate_proj", "text_encoder.layers.3.mlp.gate_proj"),
        (
            "text_encoders.clip_h.transformer.text_model.encoder.layers.3.mlp.fc1",
            "text_encoder.encoder.layers.3.mlp.fc1",
        ),
    ],
)
def test_prefixes_of_other_trainers(key: str, layer: str | None, tmp_path: Path) -> None:
    """LyCORIS' own wrapper; OneTrainer's T5 of Chroma, before and now, language model of
    HunyuanVideo, and text encoder of SD 2."""
    expected = layer or "text_encoder.encoder.block.0.layer.1.DenseReluDense.wo"
    assert list(read(kohya({key: (8, 8)}), tmp_path).layers) == [expected]
