"""Layers that the model at hand lacks: refused, or left out by name and reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.generation import TWO_STEPS, build, generate
from support.handmade import hand_entry, hand_fusion
from support.shipped import Shipped, error_of, klora
from torch import nn
from torch.nn.utils import parametrizations

from klora_runtime import apply_fusion, load_fusion, save_fusion
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.errors import ConfigError, IncompatibleModelError

BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
TO_Q = f"{BLOCK}.to_q"
K_IMG = f"{BLOCK}.add_k_proj"  # this model has no images beside the prompt
SQUARE = (32, 32)


@pytest.fixture
def pipe() -> Any:
    return build(TWO_STEPS)


def fusion_of(*names: str, **fields: Any) -> Fusion:
    return hand_fusion(*(hand_entry(name, SQUARE, size=1.0) for name in sorted(names)), **fields)


@pytest.mark.parametrize("mode", ["merge", "branch"])
def test_the_others_act_and_the_report_names_the_rest(mode: str, pipe: Any) -> None:
    with apply_fusion(pipe, fusion_of(TO_Q), mode):
        expected = generate(pipe, TWO_STEPS)
    both = fusion_of(TO_Q, K_IMG)
    with apply_fusion(pipe, both, mode, missing="skip") as handle:
        assert torch.equal(generate(pipe, TWO_STEPS), expected)
        report = handle.report()
        assert report.missing == (K_IMG,)
        assert sum(report.layers.values()) == 1
        for text in (str(report), repr(report)):
            assert "1 left out that the model lacks" in text
        handle.swap(fusion_of(TO_Q))
        assert handle.report().missing == ()
        assert "left out" not in str(handle.report())
        handle.swap(both)
        assert handle.report().missing == (K_IMG,)
        assert torch.equal(generate(pipe, TWO_STEPS), expected)
        assert handle.fusion is both


def test_a_parameter_may_be_missing_too(pipe: Any) -> None:
    bias = replace(hand_entry(f"{TO_Q}.bias", (32,), size=1.0), module=TO_Q.partition(".")[2])
    fusion = hand_fusion(hand_entry(TO_Q, SQUARE, size=1.0))
    fusion = replace(fusion, entries=(replace(bias, parameter="bias"), *fusion.entries))
    with pytest.raises(IncompatibleModelError, match="has no parameter bias"):
        apply_fusion(pipe, fusion)
    with apply_fusion(pipe, fusion, missing="skip") as handle:
        assert handle.report().missing == (f"{TO_Q}.bias",)


class _Packed(nn.Linear):
    """A layer of a library that packs the weight under another name."""

    def __init__(self, other: nn.Linear) -> None:
        super().__init__(other.in_features, other.out_features, other.bias is not None)
        self.register_buffer("qweight", self.weight.detach().clone())
        del self.weight


def _parametrized(layer: nn.Linear) -> nn.Linear:
    return parametrizations.weight_norm(layer)


@pytest.mark.parametrize("change", [_Packed, _parametrized])
def test_a_weight_that_is_held_in_another_way_is_not_missing(change: Any, pipe: Any) -> None:
    """The model has the layer, so leaving it out would be a wrong picture."""
    block = pipe.unet.get_submodule(BLOCK.partition(".")[2])
    block.to_k = change(block.to_k)
    with pytest.raises(IncompatibleModelError, match="1 of 2 layers") as caught:
        apply_fusion(pipe, fusion_of(TO_Q, f"{BLOCK}.to_k"), missing="skip")
    assert caught.value.issues == (f"{BLOCK}.to_k: has no parameter weight",)
    assert "skip" not in str(caught.value)


def test_it_is_an_error_unless_asked_for(pipe: Any) -> None:
    for options in ({}, {"missing": "error"}):
        with pytest.raises(IncompatibleModelError, match='others, add missing="skip"'):
            apply_fusion(pipe, fusion_of(TO_Q, K_IMG), **options)
    with pytest.raises(ConfigError, match="missing=True: expected error or skip"):
        apply_fusion(pipe, fusion_of(TO_Q), missing=True)  # type: ignore[arg-type]


def test_a_model_without_any_of_the_layers_and_other_shapes_are_refused(pipe: Any) -> None:
    with pytest.raises(IncompatibleModelError, match="no layer of the fusion fits") as caught:
        apply_fusion(pipe, fusion_of(K_IMG), missing="skip")
    assert "skip" not in str(caught.value)
    other = hand_fusion(hand_entry(K_IMG, SQUARE), hand_entry(TO_Q, (48, 32)))
    with pytest.raises(IncompatibleModelError, match=r"to_q: weight has shape") as caught:
        apply_fusion(pipe, other, missing="skip")
    with pytest.raises(IncompatibleModelError, match="no layer of the fusion fits") as caught:
        apply_fusion(pipe, other)
    assert "skip" not in str(caught.value)


def test_sample_skips_on_request(tmp_path: Path) -> None:
    shipped = Shipped.into(tmp_path)
    fusion = load_fusion(shipped.artifact)
    extra = fusion_of(K_IMG).entries[0]
    entries = sorted((*fusion.entries, extra), key=lambda e: (e.component, e.module, e.parameter))
    more = tmp_path / "more.klora.safetensors"
    save_fusion(replace(fusion, entries=tuple(entries)), more)
    output = tmp_path / "a.png"
    command = ("sample", more, "--model", shipped.model, "--prompt", "a", "--steps", 1,
               "--device", "cpu", "-o", output)  # fmt: skip
    assert "--missing skip" in error_of(klora(*command), 1)
    made = klora(*command, "--missing", "skip")
    assert made.exit_code == 0, made.stderr
    assert f"left out 1 layers that the model lacks (first: {K_IMG})" in made.stdout
