"""Scales that a file states beside its tensors: in its metadata, or in a JSON beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.lora_files import peft_keys, random_pair

from klora_compile import read_adapter
from klora_compile.reading.adapter import Adapter, look_into
from klora_compile.reading.scale.entries import entries_of
from klora_compile.report.lora import lora_lines
from klora_compile.settings.read_options import ReadOptions
from klora_runtime.errors import LoraError

BLOCK = "transformer_blocks.7.attn"
QUERY, ENCODER = f"transformer.{BLOCK}.to_q", "text_encoder.encoder.layers.3.self_attn.q_proj"
RANK = 8


def saved(
    folder: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> Path:
    path = folder / "stated.safetensors"
    save_file({name: t.contiguous() for name, t in tensors.items()}, str(path), metadata=metadata)
    return path


def scales(adapter: Adapter) -> dict[str, tuple[float, str]]:
    return {name: (v.scaling, v.alpha_source) for name, v in adapter.layers.items()}


def of_both(folder: Path, metadata: dict[str, str]) -> dict[str, tuple[float, str]]:
    """Of a layer of the denoiser and one of the text encoder, both of rank 8."""
    pairs = {name: random_pair(12, 10, RANK) for name in (QUERY, ENCODER)}
    return scales(read_adapter(saved(folder, peft_keys(pairs), metadata)))


# --- entries of the metadata ------------------------------------------------------------------

ONE = (1.0, "rank")
ENTRIES: dict[str, tuple[dict[str, str], Any, Any]] = {
    "alpha": ({"alpha": "2"}, (0.25, "alpha"), (0.25, "alpha")),
    "lora_alpha": ({"lora_alpha": "16.0"}, (2.0, "lora_alpha"), (2.0, "lora_alpha")),
    "network_alpha": ({"network_alpha": "2"}, (0.25, "network_alpha"), (0.25, "network_alpha")),
    "of a component": (
        {"transformer.lora_alpha": "4", "text_encoder.alpha": "2"},
        (0.5, "transformer.lora_alpha"),
        (0.25, "text_encoder.alpha"),
    ),
    "of one component": ({"text_encoder.lora_alpha": "2"}, ONE, (0.25, "text_encoder.lora_alpha")),
    "with its rank": (
        {"transformer.lora_alpha": "4", "transformer.r": "8"},
        (0.5, "transformer.lora_alpha"),
        ONE,
    ),
    "of a module": ({f"{QUERY}.alpha": "4"}, (0.5, f"{QUERY}.alpha"), ONE),
    "of another module": ({f"{QUERY}_2.alpha": "4"}, ONE, ONE),
    "of the training": ({"training.lora_alpha": "4"}, *[(0.5, "training.lora_alpha")] * 2),
    "two that agree": ({"alpha": "4", "transformer.lora_alpha": "4.0"}, *[(0.5, "alpha")] * 2),
    "another word": ({"alphabet": "4", "my_alpha": "4", "alpha.mask": "4"}, ONE, ONE),
    "unset": ({"alpha": "", "lora_alpha": "None"}, ONE, ONE),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_an_entry_named_alpha_states_the_scale(case: str, tmp_path: Path) -> None:
    metadata, denoiser, encoder = ENTRIES[case]
    assert of_both(tmp_path, metadata) == {QUERY: denoiser, ENCODER: encoder}


def test_entries_that_differ_are_refused_or_the_first_is_taken(tmp_path: Path) -> None:
    pairs = peft_keys({QUERY: random_pair(12, 10, RANK)})
    path = saved(tmp_path, pairs, {"alpha": "4", "transformer.lora_alpha": "2"})
    with pytest.raises(LoraError) as caught:
        read_adapter(path)
    assert caught.value.issues == (
        f"{QUERY}: alpha is 4 by alpha and 2 by transformer.lora_alpha; "
        "--alpha-conflict first takes the first",
    )
    first = read_adapter(path, ReadOptions(alpha_conflict="first"))
    assert scales(first) == {QUERY: (0.5, "alpha")}


def test_a_configuration_and_an_entry_that_differ_are_refused(tmp_path: Path) -> None:
    config = json.dumps({"transformer.lora_alpha": 4})
    with pytest.raises(LoraError, match="4 by lora_adapter_metadata and 2 by alpha"):
        of_both(tmp_path, {"lora_adapter_metadata": config, "alpha": "2"})


# --- configurations ---------------------------------------------------------------------------


def test_finetrainers_states_rank_and_alpha_in_its_own_entry(tmp_path: Path) -> None:
    config = {"r": RANK, "lora_alpha": 2, "init_lora_weights": True, "target_modules": "to_q"}
    found = of_both(tmp_path, {"lora_config": json.dumps(config, indent=4)})
    assert set(found.values()) == {(0.25, "lora_config")}


def test_rank_and_alpha_may_have_their_plain_names(tmp_path: Path) -> None:
    found = of_both(tmp_path, {"lora_config": json.dumps({"rank": RANK, "alpha": 24.0})})
    assert set(found.values()) == {(3.0, "lora_config")}


def test_two_configurations_that_differ_are_refused(tmp_path: Path) -> None:
    texts = {"lora_adapter_metadata": '{"lora_alpha": 4}', "lora_config": '{"lora_alpha": 8}'}
    with pytest.raises(LoraError, match="4 by lora_adapter_metadata and 8 by lora_config"):
        of_both(tmp_path, texts)


def test_the_research_script_of_diffusers_states_a_scale_for_each_model(tmp_path: Path) -> None:
    """``N_lora.pt`` and ``N_lora_config.json``, the text encoder's keys after its own words."""
    unet = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    clip = "encoder.layers.3.self_attn.q_proj"
    pairs = {
        f"base_model.model.{unet}": random_pair(12, 10, RANK),
        f"text_encoder_base_model.model.text_model.{clip}": random_pair(12, 10, 4),
    }
    torch.save(peft_keys(pairs), tmp_path / "1500_lora.pt")
    config = {
        "peft_config": {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "bias": "none"},
        "text_encoder_peft_config": {"peft_type": "LORA", "r": 4, "lora_alpha": 2},
    }
    (tmp_path / "1500_lora_config.json").write_text(json.dumps(config))
    source = "1500_lora_config.json"
    assert scales(read_adapter(tmp_path / "1500_lora.pt")) == {
        f"unet.{unet}": (2.0, source),
        f"text_encoder.{clip}": (0.5, source),
    }


# --- a rank that is not the tensors' ----------------------------------------------------------


@pytest.mark.parametrize(
    "metadata",
    [
        {"lora_adapter_metadata": '{"transformer.r": 4, "transformer.lora_alpha": 4}'},
        {"lora_config": '{"r": 4, "lora_alpha": 4}'},
        {"transformer.r": "4", "transformer.lora_alpha": "4"},
    ],
)
def test_a_stated_rank_that_the_tensors_do_not_have_is_refused(
    metadata: dict[str, str], tmp_path: Path
) -> None:
    """A fused pair of three times the rank; PEFT refuses it for its size."""
    path = saved(tmp_path, peft_keys({QUERY: random_pair(36, 10, 12)}), metadata)
    for options in (ReadOptions(), ReadOptions(alpha_conflict="first")):
        with pytest.raises(LoraError) as caught:
            read_adapter(path, options)
        (issue,) = caught.value.issues
        assert issue.startswith(f"{QUERY}: its rank is 12 by its tensors and 4 by ")


def test_a_rank_of_a_pattern_is_the_rank_of_its_modules(tmp_path: Path) -> None:
    config = {"r": 4, "lora_alpha": 4, "rank_pattern": {"to_q": 12}}
    path = saved(
        tmp_path,
        peft_keys({QUERY: random_pair(36, 10, 12)}),
        {"lora_adapter_metadata": json.dumps(config)},
    )
    assert scales(read_adapter(path)) == {QUERY: (4 / 12, "lora_adapter_metadata")}


def test_a_tensor_agrees_with_a_configuration_of_the_same_scale(tmp_path: Path) -> None:
    """Joined to three times the rank and three times the alpha; the configuration says 4 / 4."""
    tensors = peft_keys({QUERY: random_pair(36, 10, 12)}) | {f"{QUERY}.alpha": torch.tensor(12.0)}
    path = saved(tmp_path, tensors, {"lora_config": '{"r": 4, "lora_alpha": 4}'})
    assert scales(read_adapter(path)) == {QUERY: (1.0, "tensor")}


# --- kohya's record ---------------------------------------------------------------------------


def flat_pair(name: str, out: int, rank: int, alpha: float | None) -> dict[str, torch.Tensor]:
    down, up = random_pair(out, 16, rank)
    found = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    return found if alpha is None else found | {f"{name}.alpha": torch.tensor(alpha)}


def test_a_record_that_other_layers_contradict_scales_nothing(tmp_path: Path) -> None:
    """A converter folded the scale into the weights of all and wrote some alphas."""
    value = "lora_unet_transformer_blocks_7_attn_to_v"
    key = "lora_unet_transformer_blocks_7_attn_add_k_proj"
    record = {"ss_network_alpha": "1", "ss_network_dim": "8"}
    plain = flat_pair(key, 16, RANK, None)
    alone = read_adapter(saved(tmp_path, plain, record))
    assert set(scales(alone).values()) == {(0.125, "ss_network_alpha")}
    folded = plain | flat_pair(value, 16, RANK, float(RANK))
    found = read_adapter(saved(tmp_path, folded, record))
    assert set(scales(found).values()) == {(1.0, "rank"), (1.0, "tensor")}
    as_recorded = plain | flat_pair(value, 16, RANK, 1.0)
    found = read_adapter(saved(tmp_path, as_recorded, record))
    assert set(scales(found).values()) == {(0.125, "ss_network_alpha"), (0.125, "tensor")}


FLUX, SD3 = "lora_unet_double_blocks_4_", "lora_unet_joint_blocks_4_"
#: Module -> its rows, and how many pairs it joins.
JOINED = {
    f"{FLUX}img_attn_qkv": (48, 3),
    f"{FLUX}txt_attn_qkv": (48, 3),
    "lora_unet_single_blocks_4_linear1": (112, 4),
}
JOINED_SD3 = {f"{SD3}x_block_attn_qkv": (48, 3), f"{SD3}context_block_attn_qkv": (48, 3)}


def record_of(**args: str) -> dict[str, str]:
    return {
        "ss_network_dim": "4",
        "ss_network_alpha": "2.0",
        "ss_network_args": json.dumps(args),
    }


def scales_of(
    folder: Path, modules: Mapping[str, tuple[int, int]], dim: int, alpha: float, **args: str
) -> set[tuple[float, str]]:
    tensors: dict[str, torch.Tensor] = {}
    for name, (out, pairs) in modules.items():
        tensors |= flat_pair(name, out, pairs * dim, alpha)
    return set(scales(read_adapter(saved(folder, tensors, record_of(**args)))).values())


@pytest.mark.parametrize("modules", [JOINED, JOINED_SD3])
def test_pairs_that_were_trained_apart_keep_their_scale(
    modules: Mapping[str, tuple[int, int]], tmp_path: Path
) -> None:
    found = scales_of(tmp_path, modules, 4, 2.0, split_qkv="True")
    counts = {pairs for _, pairs in modules.values()}
    assert found == {(0.5, f"tensor, times the {n} pairs of split_qkv") for n in counts}


def test_a_rank_of_its_own_is_that_of_each_pair(tmp_path: Path) -> None:
    modules = {f"{FLUX}img_attn_qkv": (48, 3)}
    found = scales_of(tmp_path, modules, 2, 2.0, split_qkv="True", img_attn_dim="2")
    assert found == {(1.0, "tensor, times the 3 pairs of split_qkv")}


@pytest.mark.parametrize(
    ("dim", "alpha", "args", "scale"),
    [
        (4, 2.0, {}, 2 / 12),  # not trained so
        (4, 2.0, {"split_qkv": "False"}, 2 / 12),
        (4, 6.0, {"split_qkv": "True"}, 6 / 12),  # a tool wrote the alpha of three
        (3, 2.0, {"split_qkv": "True"}, 2 / 9),  # no multiple of the stated rank
    ],
)
def test_other_joined_pairs_are_scaled_by_their_tensors(
    dim: int, alpha: float, args: dict[str, str], scale: float, tmp_path: Path
) -> None:
    modules = {f"{FLUX}img_attn_qkv": (48, 3)}
    assert scales_of(tmp_path, modules, dim, alpha, **args) == {(scale, "tensor")}


def test_inspect_says_that_pairs_were_trained_apart(tmp_path: Path) -> None:
    tensors = flat_pair(f"{FLUX}img_attn_qkv", 48, 12, 2.0)
    tensors |= flat_pair(f"{FLUX}img_attn_proj", 16, 4, 2.0)
    found, _ = look_into(saved(tmp_path, tensors, record_of(split_qkv="True")))
    lines = [text for _, text in lora_lines(found, None)]
    assert "6, from tensor, times the 3 pairs of split_qkv" in lines
    assert "2, from tensor" in lines


def test_the_order_of_entries_does_not_matter() -> None:
    """safetensors writes metadata in another order each time."""
    metadata = {"transformer.lora_alpha": "4", "alpha": "4", "transformer.r": "8"}
    turned = dict(reversed(metadata.items()))
    found = [entries_of(each, "LoRA file a.safetensors") for each in (metadata, turned)]
    assert found[0] == found[1]
    assert [entry.key for entry in found[0]] == ["alpha", "transformer.lora_alpha"]
