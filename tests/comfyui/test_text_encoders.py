"""Text encoders get an ordinary LoRA of ComfyUI."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.comfyui.literal import constant
from support.comfyui.models import add, filled
from support.handmade import delta_of, hand_entry, hand_fusion
from torch import nn

from klora_runtime.artifact.delta import Dense, Stored
from klora_runtime.errors import IncompatibleModelError

_LAYER = "encoder.layers.0"
_INSIDE = "clip_l.transformer.text_model.encoder.layers.0"


@pytest.fixture(scope="session")
def text_encoders(acting: Any) -> Any:
    import importlib

    return importlib.import_module(f"{acting.__package__}.text_encoders")


class Clip:
    """ComfyUI's ``CLIP``: a model, and the patcher that patches it."""

    def __init__(self, kit: Any) -> None:
        self.cond_stage_model = nn.Module()
        for name in ("self_attn.q_proj", "mlp.fc1"):
            add(self.cond_stage_model, f"{_INSIDE}.{name}", nn.Linear(8, 8))
        add(self.cond_stage_model, f"{_INSIDE}.layer_norm1", nn.LayerNorm(8))
        filled(self.cond_stage_model)
        self.patcher = kit.patcher(self.cond_stage_model)

    def clone(self) -> Any:
        new = copy.copy(self)
        new.patcher = self.patcher.clone()
        return new

    def add_patches(self, patches: Any, strength: float) -> Any:
        return self.patcher.add_patches(patches, strength)


def a_fusion() -> Any:
    """Both LoRAs at constant weight, in factors; and a bias and a norm."""
    entries = []
    for seed, name in enumerate(("self_attn.q_proj", "mlp.fc1")):
        entry = hand_entry(f"text_encoder.{_LAYER}.{name}", (8, 8), seed=seed)
        entries.append(constant(entry))
    ones = {"content": Stored(0.5, Dense(torch.arange(8.0)))}
    small = replace(
        hand_entry(f"text_encoder.{_LAYER}.layer_norm1", (8, 1), switch=None), factors=ones
    )
    entries.append(replace(small, shape=(8,)))
    entries.append(replace(small, module=f"{_LAYER}.mlp.fc1", parameter="bias", shape=(8,)))
    return hand_fusion(*entries, family="sd1")


def test_a_clip_gets_what_both_loras_add(kit: Any, text_encoders: Any) -> None:
    clip, fusion = Clip(kit), a_fusion()
    before = {name: p.clone() for name, p in clip.cond_stage_model.named_parameters()}
    new = text_encoders.apply_to_clip(clip, fusion, {"style": 0.6})
    assert clip.patcher.patches == {}
    kit.load(new.patcher)
    for entry in fusion.entries:
        name = f"{_INSIDE}.{entry.module.removeprefix(_LAYER + '.')}.{entry.parameter}"
        added = clip.cond_stage_model.get_parameter(name) - before[name]
        row, total = entry.timeline.at(0.0), torch.zeros(entry.shape, dtype=torch.float64)
        for slot, stored in entry.factors.items():
            factor = row[slot] * {"style": 0.6}.get(slot, 1.0)
            delta = stored.delta
            whole = (
                stored.scale * delta.values if isinstance(delta, Dense) else delta_of(entry, slot)
            )
            total += factor * whole
        torch.testing.assert_close(added.double(), total, atol=1e-6, rtol=1e-5)


def test_layers_that_a_clip_lacks_are_refused(kit: Any, text_encoders: Any) -> None:
    entry = hand_entry(f"text_encoder.{_LAYER}.self_attn.v_proj", (8, 8), switch=None)
    fusion = hand_fusion(*a_fusion().entries, entry, family="sd1")
    with pytest.raises(IncompatibleModelError, match=r"^1 of 5 layers of text encoders") as e:
        text_encoders.apply_to_clip(Clip(kit), fusion, {})
    assert e.value.issues == (f"text_encoder.{_LAYER}.self_attn.v_proj",)


def test_an_artifact_without_text_encoders_leaves_a_clip_as_it_is(
    kit: Any, text_encoders: Any
) -> None:
    fusion = hand_fusion(hand_entry("unet.conv_in", (4, 4, 3, 3)), family="sd1")
    clip = Clip(kit)
    new = text_encoders.apply_to_clip(clip, fusion, {})
    assert new is not clip
    assert new.patcher.patches == {}
