"""Names and endings that single trainers and converters write, for every family that they know."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.lora_files import random_pair

from klora_compile import read_adapter
from klora_compile.families.tables import WHOLE
from klora_compile.reading.adapter import Adapter
from klora_compile.reading.names.account import Account, account_for
from klora_compile.settings.read_options import ReadOptions
from klora_runtime.errors import LoraError
from klora_runtime.families.catalogue import FAMILIES
from klora_runtime.families.family import Family, TextEncoder
from klora_runtime.families.rows import Layout

TABLES = [table for table in WHOLE if table.component in ("unet", "transformer")]
NAMED = {"ids": lambda table: f"{table.family}-{table.name}"}


def saved(
    folder: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> Path:
    path = folder / "spelt.safetensors"
    save_file({name: t.contiguous() for name, t in tensors.items()}, str(path), metadata=metadata)
    return path


def pairs(
    modules: Iterable[str], size: int = 16, rank: int = 2, *, dotted: bool = False
) -> dict[str, torch.Tensor]:
    """Pairs of square layers; without alphas."""
    tensors: dict[str, torch.Tensor] = {}
    down_end, up_end = (
        (".lora_A.weight", ".lora_B.weight") if dotted else (".lora_down.weight", ".lora_up.weight")
    )
    for seed, name in enumerate(modules):
        down, up = random_pair(size, size, rank, seed=seed)
        tensors |= {f"{name}{down_end}": down, f"{name}{up_end}": up}
    return tensors


def modules_of(account: Account) -> dict[str, tuple[str, str]]:
    """Key -> where its module is placed."""
    return {key: account.place(m) for m in account.modules for key in m.parts.values()}


def sources(table: Layout) -> list[str]:
    """A path of each row of a table."""
    return [row.source.replace("{}", "1") for row in table.rows]


# --- underscores and dots ---------------------------------------------------------------------


@pytest.mark.parametrize("table", TABLES, **NAMED)
def test_two_underscores_behind_a_prefix_are_one(table: Layout) -> None:
    """VideoX-Fun's files, of every family."""
    flat = [name.replace(".", "_") for name in sources(table)]
    for prefix in ("lora_unet_", "lycoris_", "lora_transformer_"):
        one = account_for({f"{prefix}{n}.alpha": () for n in flat}, table.family)
        two = account_for({f"{prefix}_{n}.alpha": () for n in flat}, table.family)
        assert not two.unused
        assert [m.key.layer for m in two.modules] == [m.key.layer for m in one.modules]


@pytest.mark.parametrize("table", TABLES, **NAMED)
@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer."])
def test_names_are_found_by_their_letters(prefix: str, table: Layout) -> None:
    """musubi-tuner's converter guesses which underscores were dots, here all of them."""
    if table.component == "unet":
        pytest.skip("that converter knows no UNet")
    guessed = {n: re.sub("[._]", ".", n) for n in sources(table) if "-" not in n}
    if all(name == guess for name, guess in guessed.items()):
        pytest.skip("nothing to guess")
    found = account_for({f"{prefix}{n}.alpha": () for n in guessed.values()}, table.family)
    assert not found.unused
    assert not found.problems
    assert found.table is not None
    places = modules_of(found)
    for name, guess in guessed.items():
        exact, loose = table.match(name, flat=False), places[f"{prefix}{guess}.alpha"]
        assert exact is not None
        assert loose == (found.table.component, guess)
        match = found.table.match(re.sub("[._]", "_", guess), flat=True)
        assert match is not None
        assert match[0].targets == exact[0].targets


def test_names_that_fit_exactly_are_not_found_by_letters() -> None:
    """HunyuanVideo's are FLUX.1's by their letters."""
    found = account_for({"diffusion_model.double_blocks.3.img_attn_qkv.alpha": ()})
    assert "hunyuan-video" in found.families
    assert "flux.1" not in found.families
    letters = account_for({"diffusion_model.double_blocks.3.img_attn_qkv.alpha": ()}, "flux.1")
    assert letters.families == {"flux.1"}


def test_one_strange_name_leaves_the_others_as_they_are_read() -> None:
    """Behind diffusers' component; all would be taken as they stand, and no model has them."""
    names = ["double_blocks.3.img_attn.qkv", "double_blocks.3.img_mlp.0", "double_blocks.3.odd"]
    found = account_for({f"transformer.{name}.alpha": () for name in names})
    assert [each.key for each in found.unused] == ["transformer.double_blocks.3.odd.alpha"]
    assert found.names == "bfl"
    unknown = [f"transformer.new_blocks.{i}.mixer.alpha" for i in range(4)]
    assert not account_for(dict.fromkeys(unknown, ())).unused


@pytest.mark.parametrize("end", ["dora_scale", "lora_magnitude_vector", "magnitude"])
@pytest.mark.parametrize(
    ("flat", "dotted"),
    [
        ("lora_unet_down_blocks_1_attentions_0_proj_in", None),
        (
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_v",
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1.to_v",
        ),
        (
            "lora_te1_text_model_encoder_layers_2_self_attn_out_proj",
            "lora_te1_text_model_encoder_layers_2_self_attn.out_proj",
        ),
        ("lora_unet_double_blocks_3_img_attn_proj", "lora_unet_double_blocks_3_img_attn.proj"),
    ],
)
def test_a_magnitude_belongs_to_its_layer(flat: str, dotted: str | None, end: str) -> None:
    """diffusers' converter to kohya's keys leaves the last dot of a module before it."""
    keys = [f"{flat}.lora_down.weight", f"{flat}.lora_up.weight", f"{dotted or flat}.{end}"]
    found = account_for(dict.fromkeys(keys, (4, 4)))
    assert not found.unused
    assert [sorted(m.parts.values()) for m in found.modules] == [sorted(keys)]


def test_a_magnitude_of_ai_toolkit_is_that_of_peft(tmp_path: Path) -> None:
    name = "transformer.transformer_blocks.3.attn.to_v"
    base = tmp_path / "base.safetensors"
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(3))
    save_file({"transformer_blocks.3.attn.to_v.weight": weight}, str(base))
    plain, magnitude = pairs([name], dotted=True), torch.linspace(1, 2, 16)
    deltas = []
    for end in ("lora_magnitude_vector", "magnitude"):
        path = saved(tmp_path, plain | {f"{name}.{end}": magnitude})
        (layer,) = read_adapter(path, ReadOptions(base=base)).layers.values()
        assert layer.form == "dora"
        deltas.append(layer.delta.matrix())
    assert torch.equal(*deltas)


# --- some names of the authors, others of diffusers ---------------------------------------------


def test_a_file_may_have_both_namings_of_its_family(tmp_path: Path) -> None:
    names = {
        "blocks.3.cross_attn.k": "blocks.3.attn2.to_k",
        "blocks.3.ffn.2": "blocks.3.ffn.net.2",
        "condition_embedder.time_embedder.linear_1": "condition_embedder.time_embedder.linear_1",
        "proj_out": "proj_out",
    }
    tensors = pairs((f"diffusion_model.{name}" for name in names), dotted=True)
    tensors["diffusion_model.blocks.3.norm2.diff"] = torch.ones(16)
    adapter = read_adapter(saved(tmp_path, tensors))
    expected = {f"transformer.{name}" for name in (*names.values(), "blocks.3.norm2")}
    assert set(adapter.layers) == expected
    assert adapter.survey.families == ("wan", "wan-vace")


def test_a_lokr_of_ai_toolkit_has_a_name_between_both() -> None:
    flat = ("self_attn_k", "self_attn_to_out_0", "cross_attn_to_out_0", "ffn_net_2")
    found = account_for({f"lycoris_blocks_3_{name}.lokr_w1": (2, 2) for name in flat})
    assert not found.unused
    assert found.families == {"wan"}


@pytest.mark.parametrize("table", TABLES, **NAMED)
def test_both_namings_of_every_family_go_together(table: Layout) -> None:
    own = sources(table)
    targets = [t.replace("{}", "2") for row in table.rows for t in row.targets]
    names = dict.fromkeys([*own[:3], *targets[-3:]])
    found = account_for({f"diffusion_model.{name}.alpha": () for name in names}, table.family)
    assert not found.unused
    assert table.family in found.families


def test_a_layer_that_is_there_fused_and_split_is_named(tmp_path: Path) -> None:
    fused, split = "double_blocks_3_img_attn_qkv", "transformer_blocks_3_attn_to_v"
    down, up = random_pair(48, 16, 2)
    tensors = {f"lora_unet_{fused}.lora_down.weight": down, f"lora_unet_{fused}.lora_up.weight": up}
    tensors |= pairs([f"lora_unet_{split}", "lora_unet_double_blocks_3_img_attn_proj"])
    with pytest.raises(LoraError) as caught:
        read_adapter(saved(tmp_path, tensors))
    (issue,) = caught.value.issues
    named = "transformer.transformer_blocks.3.attn.to_v"
    assert issue == f"{split}: the file has {named} twice, here and in {fused}; keep one of them"


# --- text encoders ------------------------------------------------------------------------------

ENCODERS = [(family, encoder) for family in FAMILIES.values() for encoder in family.text_encoders]


def of_denoiser(family: Family) -> dict[str, tuple[int, ...]]:
    """Keys of a layer that only this family has, or that its files' metadata tell from others'."""
    rows = family.layouts[0].rows
    return {f"diffusion_model.{row.source.replace('{}', '1')}.alpha": () for row in rows}


@pytest.mark.parametrize(("family", "encoder"), ENCODERS, ids=lambda e: getattr(e, "key", None))
def test_every_prefix_leads_to_the_families_own_encoder(
    family: Family, encoder: TextEncoder
) -> None:
    keys = of_denoiser(family)
    for layout in encoder.model.layouts:
        for row in (layout.rows[0], layout.rows[-1]):
            source, target = (p.replace("{}", "1") for p in (row.source, row.targets[0]))
            for prefix in encoder.prefixes:
                name = source if prefix.endswith(".") else source.replace(".", "_")
                key = f"{prefix}{name}.alpha"
                places = modules_of(account_for({**keys, key: ()}, family.key))
                assert places[key] == (encoder.component, target)


@pytest.mark.parametrize(
    ("key", "component"),
    [
        ("lora_te_encoder_block_3_layer_1_DenseReluDense_wo", "text_encoder_2"),  # T5
        ("lora_te_text_model_encoder_layers_3_mlp_fc1", "text_encoder"),  # CLIP
    ],
)
def test_one_prefix_for_all_encoders_leads_to_the_one_that_has_the_module(
    key: str, component: str
) -> None:
    """VideoX-Fun's, of FLUX.1."""
    flux = ("double_blocks_3_img_mod_lin", "single_blocks_3_linear2")
    found = account_for({**{f"lora_unet__{n}.alpha": () for n in flux}, f"{key}.alpha": ()})
    assert modules_of(found)[f"{key}.alpha"][0] == component


def test_a_text_encoder_that_two_families_have_in_two_components_is_not_guessed() -> None:
    """OneTrainer writes Chroma's T5 so, VideoX-Fun FLUX.1's."""
    both = {f"lora_unet_double_blocks_{i}_img_attn_proj.alpha": () for i in range(2)}
    key = "lora_te_encoder_block_3_layer_1_DenseReluDense_wo.alpha"
    (problem,) = account_for({**both, key: ()}).problems
    assert problem == (
        "text_encoder.encoder.block.3.layer.1.DenseReluDense.wo: is ambiguous: it may be of "
        "text_encoder_2 of flux.1, text_encoder of chroma; name the base model "
        "with --family, or as modelspec.architecture in the file's metadata"
    )
    stated = account_for({**both, key: ()}, "chroma")
    assert not stated.problems
    assert modules_of(stated)[key][0] == "text_encoder"
    clip = "lora_te_text_model_encoder_layers_3_mlp_fc1.alpha"
    beside = account_for({**both, key: (), clip: ()})  # which Chroma has not
    assert not beside.problems
    assert modules_of(beside)[key][0] == "text_encoder_2"


def test_names_whose_rows_lie_otherwise_are_refused(tmp_path: Path) -> None:
    """DiffSynth-Studio's files are told by the name of an adapter alone."""
    down, up = random_pair(24, 8, 2)
    for adapter in ("", ".default"):
        name = "blocks.3.attn.qkv_proj.lora_"
        path = saved(tmp_path, {f"{name}A{adapter}.weight": down, f"{name}B{adapter}.weight": up})
        if not adapter:
            assert len(read_adapter(path).layers) == 3
            continue
        with pytest.raises(LoraError, match="rows of its fused query, key and value lie head by"):
            read_adapter(path)


# --- other files ----------------------------------------------------------------------------------


def test_names_of_onetrainer_for_kohya(tmp_path: Path) -> None:
    """Z-Image's have a hyphen, Chroma's T5 the number of another's CLIP."""
    z_image = ("layers_3_attention_to_v", "all_final_layer_2-1_linear", "all_x_embedder_2-1")
    adapter = read_adapter(saved(tmp_path, pairs(f"lora_unet_{n}" for n in z_image)))
    assert set(adapter.layers) == {
        "transformer.layers.3.attention.to_v",
        "transformer.all_final_layer.2-1.linear",
        "transformer.all_x_embedder.2-1",
    }
    chroma = (
        "lora_unet_double_blocks_3_txt_attn_proj",
        "lora_unet_distilled_guidance_layer_layers_1_in_layer",
        "lora_te1_encoder_block_3_layer_0_SelfAttention_q",
    )
    adapter = read_adapter(saved(tmp_path, pairs(chroma)))
    assert set(adapter.layers) == {
        "transformer.transformer_blocks.3.attn.to_add_out",
        "transformer.distilled_guidance_layer.layers.1.linear_1",
        "text_encoder.encoder.block.3.layer.0.SelfAttention.q",
    }


def deltas(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {n: v.scaling * v.delta.matrix().double() for n, v in adapter.layers.items()}


@pytest.mark.parametrize("rank", [2, 12])  # a pair of factors, a dense delta
@pytest.mark.parametrize("kernel", [(3, 3), (1, 1)])
def test_a_loha_may_have_factors_of_a_convolution(
    kernel: tuple[int, int], rank: int, tmp_path: Path
) -> None:
    """OneTrainer's."""
    flat, name = "lora_unet_mid_block_resnets_0_conv1", "unet.mid_block.resnets.0.conv1"
    if kernel == (1, 1):
        flat, name = flat.replace("conv1", "conv_shortcut"), name.replace("conv1", "conv_shortcut")
    generator = torch.Generator().manual_seed(rank)
    a1, a2 = (torch.randn(10, rank, 1, 1, generator=generator) for _ in range(2))
    b1, b2 = (torch.randn(rank, 6, *kernel, generator=generator) for _ in range(2))
    tensors = {f"{flat}.hada_w1_a": a1, f"{flat}.hada_w1_b": b1, f"{flat}.alpha": torch.tensor(1.0)}
    tensors |= {f"{flat}.hada_w2_a": a2, f"{flat}.hada_w2_b": b2}
    adapter = read_adapter(saved(tmp_path, tensors))
    first, second = ((a.flatten(1) @ b.flatten(1)).double() for a, b in ((a1, b1), (a2, b2)))
    (layer,) = adapter.layers.values()
    assert layer.shape == ((10, 6, 3, 3) if kernel == (3, 3) else (10, 6))
    torch.testing.assert_close(deltas(adapter)[name], first * second / rank, rtol=1e-4, atol=1e-5)


def test_a_loha_of_a_convolution_that_does_not_fit_is_named(tmp_path: Path) -> None:
    flat = "lora_unet_mid_block_resnets_0_conv1"
    shapes = {"w1_a": (10, 2, 1, 1), "w1_b": (2, 6, 3, 3), "w2_a": (10, 2, 1, 1)}
    for wrong in ((2, 6, 1, 3), (3, 6, 3, 3), (2, 54)):
        sizes = {**shapes, "w2_b": wrong}
        tensors = {f"{flat}.hada_{name}": torch.ones(size) for name, size in sizes.items()}
        with pytest.raises(LoraError, match="make no LoHa: expected a"):
            read_adapter(saved(tmp_path, tensors))


def extracted(kernel: tuple[int, ...], rest: torch.Tensor) -> dict[str, torch.Tensor]:
    flat = "lora_unet_mid_block_resnets_0_conv1"
    down, up = random_pair(10, 6, 4, kernel=kernel)
    sparse = rest.flatten(1).half().to_sparse().coalesce()
    return {
        f"{flat}.lora_down.weight": down,
        f"{flat}.lora_up.weight": up,
        f"{flat}.alpha": torch.tensor([4.0]).half(),
        f"{flat}.bias_indices": sparse.indices().to(torch.int16),
        f"{flat}.bias_values": sparse.values(),
        f"{flat}.bias_size": torch.tensor(sparse.shape, dtype=torch.int16),
    }


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_the_sparse_rest_of_an_extracted_layer_is_added(
    kernel: tuple[int, ...], tmp_path: Path
) -> None:
    """LyCORIS' ``extract_locon``."""
    rest = torch.zeros(10, 6, *kernel)
    rest[7, 2], rest[0, 5] = 0.5, -2.0
    tensors = extracted(kernel, rest)
    down, up = (
        tensors[f"lora_unet_mid_block_resnets_0_conv1.lora_{n}.weight"] for n in ("down", "up")
    )
    adapter = read_adapter(saved(tmp_path, tensors))
    expected = up.double().flatten(1) @ down.double().flatten(1) + rest.double().flatten(1)
    (found,) = deltas(adapter).values()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert {layer.pair for layer in adapter.layers.values()} == {None}


@pytest.mark.parametrize(
    ("end", "value", "problem"),
    [
        ("bias_size", torch.tensor([6, 10]), "its sparse rest is outside of a weight of"),
        ("bias_indices", torch.tensor([[7], [-1]]), "its sparse rest is outside of a weight of"),
        ("bias_indices", torch.tensor([[7], [6]]), "its sparse rest is outside of a weight of"),
        ("bias_indices", torch.tensor([[7, 8], [2, 2]]), "are not a sparse rest: expected indices"),
        ("bias_size", None, "are not a sparse rest: expected indices"),
    ],
)
def test_a_sparse_rest_that_does_not_fit_is_named(
    end: str, value: torch.Tensor | None, problem: str, tmp_path: Path
) -> None:
    rest = torch.zeros(10, 6)
    rest[7, 2] = 0.5
    tensors = extracted((), rest)
    (key,) = (name for name in tensors if name.endswith(end))
    del tensors[key]
    tensors |= {} if value is None else {key: value}
    with pytest.raises(LoraError, match=problem):
        read_adapter(saved(tmp_path, tensors))


# --- what may be left out -------------------------------------------------------------------------


@pytest.mark.parametrize("ignore", [False, True])
def test_a_part_of_a_layer_is_never_left_out(ignore: bool, tmp_path: Path) -> None:
    """Without it the rest of the layer means something else."""
    name = "transformer.transformer_blocks.3.attn.to_v"
    tensors = pairs([name], dotted=True) | {f"{name}.lora_gate": torch.ones(2)}
    with pytest.raises(LoraError) as caught:
        read_adapter(saved(tmp_path, tensors), ReadOptions(ignore_unknown=ignore))
    text = str(caught.value)
    assert "1 of 3 keys cannot be used" in text
    assert "--ignore-unknown does not leave these out" in text
    assert "leave them out with --ignore-unknown" not in text


def test_keys_of_other_layers_may_be_left_out(tmp_path: Path) -> None:
    name = "transformer.transformer_blocks.3.attn.to_v"
    tensors = pairs([name], dotted=True) | {f"{name}_2.lora_gate": torch.ones(2)}
    path = saved(tmp_path, tensors)
    with pytest.raises(LoraError, match="leave them out with --ignore-unknown"):
        read_adapter(path)
    assert set(read_adapter(path, ReadOptions(ignore_unknown=True)).layers) == {name}
