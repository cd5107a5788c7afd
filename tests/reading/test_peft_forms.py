"""Adapters that PEFT itself trained and saved: each layer's change is what PEFT computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_pipeline import tiny_pipeline

from klora_compile import read_adapter
from klora_compile.reading.adapter import Adapter
from klora_compile.settings.read_options import ReadOptions
from klora_runtime.errors import LoraError

LINEAR = ["to_q", "to_k", "to_out.0", "time_emb_proj"]
CONV = ["conv1", "conv_in", "proj_in", "conv_shortcut"]


def trained(folder: Path, config: Any) -> tuple[Adapter, dict[str, torch.Tensor]]:
    """The adapter as read from PEFT's folder, and what merging it adds to each parameter."""
    unet = tiny_pipeline("sd1").unet
    tiny_pipeline("sd1").save_pretrained(folder / "base")
    before = {name: value.detach().clone() for name, value in unet.named_parameters()}
    torch.manual_seed(0)
    model = get_peft_model(unet, config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value) * (0.01 if "magnitude" in name else 0.3))
    model.save_pretrained(folder / "adapter")
    adapter = read_adapter(folder / "adapter", ReadOptions(base=folder / "base"))
    merged = model.merge_and_unload()
    added = {name: value.detach() - before[name] for name, value in merged.named_parameters()}
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    return adapter, {name: value for name, value in added.items() if value.abs().max() > 0}


def assert_same(adapter: Adapter, added: dict[str, torch.Tensor]) -> None:
    mine = {f"{layer.module}.{layer.parameter}": layer for layer in adapter.layers.values()}
    assert set(mine) == set(added)
    for name, layer in mine.items():
        delta = layer.scaling * layer.delta.matrix().reshape(added[name].shape)
        limit = 1e-5 * max(1.0, float(added[name].abs().max()))
        torch.testing.assert_close(delta, added[name].double(), rtol=0, atol=limit)


CONFIGS: dict[str, Any] = {
    "LoHa": LoHaConfig(r=3, alpha=5, target_modules=LINEAR, init_weights=False),
    "LoHa of convolutions": LoHaConfig(r=2, alpha=3, target_modules=CONV, init_weights=False),
    "LoHa with cores": LoHaConfig(
        r=2, alpha=3, target_modules=CONV, init_weights=False, use_effective_conv2d=True
    ),
    "LoKr": LoKrConfig(r=2, alpha=3, target_modules=LINEAR, init_weights=False),
    "LoKr, factored": LoKrConfig(
        r=2, alpha=3, target_modules=LINEAR, init_weights=False, decompose_both=True
    ),
    "LoKr, whole": LoKrConfig(r=64, alpha=32, target_modules=LINEAR, init_weights=False),
    "LoKr of convolutions": LoKrConfig(r=2, alpha=3, target_modules=CONV, init_weights=False),
    "LoKr with cores": LoKrConfig(
        r=2, alpha=3, target_modules=CONV, init_weights=False, use_effective_conv2d=True
    ),
    "LoRA with bias": LoraConfig(
        r=2, lora_alpha=3, target_modules=["to_out.0"], lora_bias=True, init_lora_weights=False
    ),
    "DoRA": LoraConfig(
        r=2, lora_alpha=3, target_modules=LINEAR, use_dora=True, init_lora_weights=False
    ),
    "DoRA of convolutions": LoraConfig(
        r=2, lora_alpha=3, target_modules=CONV, use_dora=True, init_lora_weights=False
    ),
}
FORM = {"LoHa": "loha", "LoKr": "lokr", "DoRA": "dora", "LoRA": "lora"}


@pytest.mark.parametrize("case", CONFIGS)
def test_deltas_are_those_that_peft_merges(case: str, tmp_path: Path) -> None:
    adapter, added = trained(tmp_path, CONFIGS[case])
    assert_same(adapter, added)
    forms = {layer.form for layer in adapter.layers.values() if layer.parameter == "weight"}
    assert forms == {FORM[case[:4]]}
    assert adapter.survey.origin.trainer == "PEFT"


@pytest.mark.parametrize("kind", ["PSOFT", "TRAINABLE_TOKENS", "XLORA"])
def test_other_types_of_peft_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    assert kind in peft.PeftType.__members__
    trained(tmp_path, CONFIGS["LoHa"])
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": kind}))
    with pytest.raises(LoraError, match=f"peft_type: is {kind}, which klora does not read: "):
        read_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("value", [["LOKR"], 3, "lokr"])
def test_a_type_that_is_none(value: Any, tmp_path: Path) -> None:
    trained(tmp_path, CONFIGS["LoKr"])
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": value}))
    with pytest.raises(LoraError) as caught:
        read_adapter(tmp_path / "adapter")
    (issue,) = caught.value.issues
    assert issue.startswith("peft_type: is ")


def test_ranks_of_a_whole_lokr_by_patterns(tmp_path: Path) -> None:
    """Names of modules are followed, other expressions refused: the scale depends on them."""
    config = LoKrConfig(
        r=64,
        alpha=32,
        target_modules=["to_q", "to_k"],
        init_weights=False,
        rank_pattern={"attn1.to_q": 128},
    )
    adapter, added = trained(tmp_path, config)
    assert_same(adapter, added)
    assert {layer.rank for layer in adapter.layers.values()} == {64, 128}
    path = tmp_path / "adapter" / "adapter_config.json"
    for patterns in ({"attn.*": 128}, {"to_q": 10**400}, {"to_q": 0}):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": patterns}))
        with pytest.raises(LoraError) as caught:
            read_adapter(tmp_path / "adapter")
        assert caught.value.issues[0].startswith("rank_pattern")
