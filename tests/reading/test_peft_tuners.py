"""Kinds of adapters that PEFT trains: each layer changes as PEFT merges it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file
from support.form_files import base_model
from support.lora_files import write_lora
from support.peft_models import base_folder, layers, merged_changes, randomise

from klora_compile import read_adapter
from klora_compile.reading.adapter import Adapter
from klora_compile.reading.forms.catalogue import PEFT_TYPES
from klora_compile.settings.read_options import ReadOptions
from klora_runtime.errors import LoraError

LINEAR = ["to_q", "to_k", "to_out.0"]
CONV = ["conv1"]
BOTH = [*LINEAR, *CONV]


def kind(name: str, targets: list[str], **settings: Any) -> Any:
    return getattr(peft, f"{name}Config")(target_modules=targets, **settings)


#: What is trained -> its configuration, and the form that a report names.
CASES: dict[str, tuple[str, Any]] = {
    "OFT": ("oft", kind("OFT", BOTH, r=0, oft_block_size=4)),
    "OFT, few terms": (
        "oft",
        kind("OFT", LINEAR, r=0, oft_block_size=4, num_cayley_neumann_terms=2),
    ),
    "OFT, exact": ("oft", kind("OFT", BOTH, r=2, oft_block_size=0, use_cayley_neumann=False)),
    "OFT, one block": ("oft", kind("OFT", BOTH, r=0, oft_block_size=4, block_share=True)),
    "OFT, constrained": ("oft", kind("OFT", LINEAR, r=0, oft_block_size=4, coft=True, eps=0.1)),
    "BOFT": ("boft", kind("BOFT", BOTH, boft_block_size=4)),
    "GLoRA": ("glora", kind("Glora", LINEAR, r=2)),
    "GLoRA, all": (
        "glora",
        kind("Glora", LINEAR, r=2, config_A_B="lora", config_C="lora", config_D_E="vector"),
    ),
    "GLoRA, vectors": (
        "glora",
        kind("Glora", LINEAR, config_A_B="vector", config_C="vector", config_D_E="constant"),
    ),
    "GLoRA, numbers": (
        "glora",
        kind("Glora", LINEAR, config_A_B="constant", config_C="none", config_D_E="none"),
    ),
    "IA3": ("ia3", kind("IA3", BOTH, feedforward_modules=["to_k"])),
    "VeRA": ("vera", kind("Vera", LINEAR, r=3)),
    "VeRA, by its seed": (
        "vera",
        kind("Vera", LINEAR, r=3, save_projection=False, projection_prng_key=7),
    ),
    "HiRA": ("hira", kind("Hira", BOTH, r=3)),
    "MiSS": ("miss", kind("Miss", LINEAR, r=5)),
    "MiSS, mini": ("miss", kind("Miss", LINEAR, r=4, mini_r=4, init_weights="mini")),
    "MiSS, bat": ("miss", kind("Miss", LINEAR, r=4, init_weights="bat")),
    "SHiRA": ("shira", kind("Shira", LINEAR, r=2)),
    "FourierFT": ("fourierft", kind("FourierFT", LINEAR, n_frequency=20, random_loc_seed=5)),
    "WaveFT": ("waveft", kind("WaveFT", LINEAR, n_frequency=20, random_loc_seed=5)),
    "WaveFT, as it is": (
        "waveft",
        kind("WaveFT", LINEAR, n_frequency=20, random_loc_seed=5, use_idwt=False),
    ),
    "DeLoRA": ("delora", kind("Delora", LINEAR, r=3)),
    "C3A": ("c3a", kind("C3A", LINEAR, block_size=4)),
    "GraLoRA": ("gralora", kind("Gralora", LINEAR, r=4, gralora_k=2, alpha=3)),
    "GraLoRA and LoRA": ("gralora", kind("Gralora", LINEAR, r=4, gralora_k=2, hybrid_r=2, alpha=3)),
    "RandLoRA": ("randlora", kind("RandLora", LINEAR, r=3, randlora_alpha=5)),
}


def saved(config: Any, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder that PEFT saved, and what merging it changes; the base model is beside it."""
    model = layers()
    base_folder(model, folder / "base")
    torch.manual_seed(0)
    tuned = randomise(get_peft_model(model, config))
    tuned.save_pretrained(folder / "adapter")
    return folder / "adapter", merged_changes(tuned, layers())


def assert_same(adapter: Adapter, added: dict[str, torch.Tensor]) -> None:
    mine = {f"{layer.module}.{layer.parameter}": layer for layer in adapter.layers.values()}
    assert set(mine) == set(added)
    for name, layer in mine.items():
        delta = (layer.scaling * layer.delta.matrix()).reshape(added[name].shape)
        limit = 2e-5 * max(1.0, float(added[name].abs().max()))
        torch.testing.assert_close(delta, added[name].double(), rtol=0, atol=limit, msg=name)


@pytest.mark.parametrize("case", CASES)
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


@pytest.mark.parametrize("name", sorted({each.value for each in peft.PeftType} - set(PEFT_TYPES)))
def test_all_other_types_are_refused_by_name(name: str, tmp_path: Path) -> None:
    save_file({"unet.conv_in.x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": name}))
    with pytest.raises(LoraError, match=f"peft_type: is {name}, which is not supported"):
        read_adapter(tmp_path)
