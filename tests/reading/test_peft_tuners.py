"""Kinds of adapters that PEFT trains: each layer changes as PEFT merges it."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model
from peft.tuners.frod.model import _category_from_key
from safetensors.torch import load_file, save_file
from support.form_files import base_model
from support.lora_files import write_lora
from support.pairs import slow
from support.peft_kinds import CASES, LINEAR, kind, saved
from support.peft_models import base_folder, layers, merged_changes, randomise

from klora_compile import read_adapter
from klora_compile.reading.adapter import Adapter
from klora_compile.reading.forms.catalogue import PEFT_TYPES
from klora_compile.reading.forms.frod import _of_kind, _written_in
from klora_compile.reading.forms.parts import Header
from klora_compile.settings.read_options import ReadOptions
from klora_runtime.errors import LoraError


def assert_same(adapter: Adapter, added: dict[str, torch.Tensor]) -> None:
    mine = {f"{layer.module}.{layer.parameter}": layer for layer in adapter.layers.values()}
    assert set(mine) == set(added)
    shapes = {each.name: each.shape for each in adapter.survey.layers}
    assert {each.name: each.shape for each in mine.values()}.items() <= shapes.items()
    for name, layer in mine.items():
        delta = (layer.scaling * layer.delta.matrix()).reshape(added[name].shape)
        limit = 2e-5 * max(1.0, float(added[name].abs().max()))
        torch.testing.assert_close(delta, added[name].double(), rtol=0, atol=limit, msg=name)
        assert layer.error < 1e-6


#: Variants of a form are slow: what stands behind a comma.
SOME_CASES = [slow(case) if "," in case else case for case in CASES]


@pytest.mark.parametrize("case", SOME_CASES)
def test_the_change_is_what_peft_merges(case: str, tmp_path: Path) -> None:
    form, config = CASES[case]
    folder, added = saved(config, tmp_path)
    adapter = read_adapter(folder, ReadOptions(base=tmp_path / "base"))
    assert_same(adapter, added)
    assert {layer.form for layer in adapter.layers.values()} == {form}


def test_a_boft_of_several_stages(tmp_path: Path) -> None:
    """PEFT merges them on CUDA only; its own shuffles and Cayley transforms are joined here."""
    layer = torch.nn.Linear(16, 8, bias=False)
    model = torch.nn.ModuleDict({"conv_in": layer})
    config = peft.BOFTConfig(boft_block_size=4, target_modules=["conv_in"])
    boft = get_peft_model(model, config).base_model.model["conv_in"]
    stages, weight = torch.randn(3, 4, 4, 4), layer.weight.detach().double()
    rows = torch.randn(8, 1)
    turn = torch.eye(16, dtype=torch.float64)
    for stage, blocks in enumerate(boft.cayley_batch(stages.view(12, 4, 4)).view(3, 4, 4, 4)):
        order = boft.block_butterfly_perm(16, int(4 / 2**stage), 2, 2)
        shuffle = boft.perm2mat(order).double()
        turn = shuffle @ torch.block_diag(*blocks.double()) @ shuffle.T @ turn
    expected = (turn @ weight.T).T * rows - weight
    tensors = {"unet.conv_in.boft_R": stages, "unet.conv_in.boft_s": rows}
    base = base_model(tmp_path / "base", {("unet", "conv_in"): weight.numpy()})
    file = write_lora(tmp_path / "a.safetensors", tensors)
    (read,) = read_adapter(file, ReadOptions(base=base)).layers.values()
    torch.testing.assert_close(read.delta.matrix(), expected, rtol=0, atol=1e-5)


def poly(folder: Path, **settings: Any) -> tuple[Path, Any]:
    """A folder that PEFT saved, and the model."""
    tuned = randomise(get_peft_model(layers(), kind("Poly", LINEAR, r=3, **settings))).eval()
    tuned.save_pretrained(folder)
    return folder, tuned.base_model.model


@pytest.mark.parametrize(("skills", "splits"), [(4, 1), (3, 2)])
def test_a_poly_of_one_task_adds_what_peft_adds(skills: int, splits: int, tmp_path: Path) -> None:
    """PEFT does not merge it; a layer's output for each unit vector is its weight."""
    folder, model = poly(tmp_path, n_skills=skills, n_splits=splits)
    read = read_adapter(folder).layers.values()
    assert {layer.form for layer in read} == {"poly"}
    assert {layer.module.rpartition("attn1.")[2] for layer in read} == set(LINEAR)
    for layer in read:
        module = model.get_submodule(layer.module)
        units = torch.eye(module.in_features)[None]
        with torch.no_grad():
            added = module(units, task_ids=torch.tensor([0])) - module.base_layer(units)
        assert layer.rank == 3
        found = layer.scaling * layer.delta.matrix()
        torch.testing.assert_close(found, added[0].T.double(), rtol=0, atol=2e-6)


def test_a_poly_of_several_tasks_is_refused(tmp_path: Path) -> None:
    folder, _ = poly(tmp_path, n_tasks=2)
    with pytest.raises(LoraError, match="it has 2 tasks, and its delta depends on the number of"):
        read_adapter(folder)


def changed(folder: Path, **settings: Any) -> None:
    """Other settings beside a folder's weights."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_ranks_that_adalora_pruned(tmp_path: Path) -> None:
    """Of all, of some, and of none; the scale stays that of the rank before."""
    model = layers()
    base_folder(model, tmp_path / "base")
    tuned = randomise(get_peft_model(model, copy.deepcopy(CASES["AdaLoRA"][1])))
    left = {"to_q": [True, False, True, True], "to_k": [False] * 4, "to_out.0": [True] * 4}
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    with torch.no_grad():
        for name, kept in left.items():
            gains = tuned.base_model.model.get_submodule(f"{module}.{name}").lora_E["default"]
            gains[[not each for each in kept]] = 0.0
    names = {f"{module}.{name}.lora_E.default": kept for name, kept in left.items()}
    tuned.peft_config["default"].rank_pattern = names
    tuned.save_pretrained(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter", ReadOptions(base=tmp_path / "base"))
    layers_left = dict(adapter.layers)
    assert not layers_left.pop(f"unet.{module}.to_k").delta.matrix().any()
    assert_same(replace(adapter, layers=layers_left), merged_changes(tuned, layers()))


@pytest.mark.parametrize("case", ["VeRA", "PVeRA"])
def test_a_saved_pair_beats_the_seed_of_another(case: str, tmp_path: Path) -> None:
    folder, added = saved(CASES[case][1], tmp_path)
    changed(folder, projection_prng_key=99)
    assert_same(read_adapter(folder, ReadOptions(base=tmp_path / "base")), added)


def test_only_wavelets_but_haars_need_pywavelets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pywt", None)
    folder, added = saved(CASES["WaveFT"][1], tmp_path)
    assert_same(read_adapter(folder, ReadOptions(base=tmp_path / "base")), added)
    changed(folder, wavelet_family="db2")
    with pytest.raises(LoraError, match="its wavelet db2 needs PyWavelets; install pywavelets"):
        read_adapter(folder, ReadOptions(base=tmp_path / "base"))


@pytest.mark.parametrize(
    "name",
    [
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "base_model.model.transformer_blocks.3.attn.to_out.0",
        "text_encoder.encoder.layer.0.attention.output.dense",
        "text_encoder.encoder.layer.0.output.dense",
        "conv_in",
    ],
)
def test_the_kind_of_a_layer_is_what_frod_calls_it(name: str) -> None:
    basis, places = _of_kind(Header({}, spelled=name))
    kind = _category_from_key(name)
    assert (basis.name, places.name) == (f"frod_V.{kind}", f"frod_s_indices.{kind}")


def test_a_weight_is_written_in_a_singular_basis() -> None:
    basis = torch.diag(torch.tensor([2.0, 3.0, 0.0], dtype=torch.float64))
    weight = torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(_written_in(basis, weight) @ basis.T, weight)


def test_a_direction_of_zero_is_no_mirror(tmp_path: Path) -> None:
    folder, _ = saved(CASES["HRA"][1], tmp_path)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[:, 1] = 0.0
    save_file(tensors, file)
    with pytest.raises(LoraError, match="a direction of its hra_u is zero"):
        read_adapter(folder, ReadOptions(base=tmp_path / "base"))


def test_the_vector_of_a_tiny_lora_is_found_by_what_grew_from_the_seed(tmp_path: Path) -> None:
    folder, _ = saved(CASES["TinyLoRA"][1], tmp_path)
    changed(folder, projection_seed=43)
    with pytest.raises(LoraError, match="nothing tells which vector is its own") as caught:
        read_adapter(folder)
    assert len(caught.value.issues) == 1  # the others grew from the seed before


@pytest.mark.parametrize(
    ("case", "settings", "problem"),
    [
        ("WaveFT", {"wavelet_family": "coif4"}, "is WaveFT of coif4, and klora computes db1 to"),
        ("PEANuT", {"act_fn": "mish"}, "its act_fn is mish, and klora computes relu, silu"),
        ("VB-LoRA", {"topk": 7}, "how many vectors are mixed"),
        ("RoAd", {"group_size": 7}, "in groups of 7 do not fit the base model's weight"),
        ("HRA", {"apply_GS": None}, "how its directions are meant"),
        ("DEFT", {"decomposition_method": "svd"}, "how its deft_P is meant"),
        ("TinyLoRA", {"weight_tying": 2.0}, "whose its vectors are"),
        ("AdaLoRA", {"init_r": 0}, "its lora_alpha and init_r"),
    ],
)
def test_settings_that_say_nothing_to_klora_are_named(
    case: str, settings: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    folder, _ = saved(CASES[case][1], tmp_path)
    changed(folder, **settings)
    with pytest.raises(LoraError, match=problem):
        read_adapter(folder, ReadOptions(base=tmp_path / "base"))


@pytest.mark.parametrize(
    ("case", "key", "problem"),
    [
        ("VB-LoRA, chosen", "vblora_logits_A_topk_indices", "are not indices of 6 vectors"),
        ("Uni-LoRA", "unilora_indices_B", "are not indices of 20 numbers"),
        ("Super", "supertuning_indices", "are outside of the base model's weight"),
        ("FRoD", "frod_s_indices.attn1_to_k", "its indices are outside of"),
    ],
)
def test_places_that_are_none_are_named(case: str, key: str, problem: str, tmp_path: Path) -> None:
    folder, _ = saved(CASES[case][1], tmp_path)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    places = next(tensor for name, tensor in tensors.items() if name.endswith(key)).view(-1)
    for wrong in (255,) if places.dtype == torch.uint8 else (10**6, -1):
        places[0] = wrong
        save_file(tensors, file)
        with pytest.raises(LoraError, match=problem):
            read_adapter(folder, ReadOptions(base=tmp_path / "base"))


def test_a_uni_lora_without_its_indices_is_refused(tmp_path: Path) -> None:
    folder, _ = saved(kind("UniLora", LINEAR, r=3, theta_d_length=20), tmp_path)
    with pytest.raises(LoraError, match="which layers take its numbers; save it with save_indices"):
        read_adapter(folder)


@pytest.mark.parametrize("name", sorted({each.value for each in peft.PeftType} - set(PEFT_TYPES)))
def test_all_other_types_are_refused_by_name(name: str, tmp_path: Path) -> None:
    save_file({"unet.conv_in.x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": name}))
    with pytest.raises(LoraError, match=f"peft_type: is {name}, which klora does not read: "):
        read_adapter(tmp_path)
