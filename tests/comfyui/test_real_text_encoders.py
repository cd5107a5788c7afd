"""Fusions on tiny text encoders of ComfyUI's own classes, against transformers' models."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from support.comfyui.kits import CHECKOUT, NEEDS_COMFYUI, Comfy
from support.comfyui.literal import constant, error, whole_delta
from support.handmade import hand_entry, hand_fusion

from klora_runtime.artifact.fusion import Entry, Fusion

pytestmark = pytest.mark.skipif(not CHECKOUT, reason=NEEDS_COMFYUI)

PROMPT = "a fox in ink, very small"
WEIGHTS = {"style": 0.6}


@pytest.fixture(scope="module", autouse=True)
def comfy() -> Comfy:
    return Comfy()


@pytest.fixture(scope="module")
def text_encoders(acting: Any) -> Any:
    return importlib.import_module(f"{acting.__package__}.text_encoders")


def fusion_of(family: str, clip: Any) -> Fusion:
    """A fusion of every projection of every encoder; both LoRAs act at all times."""
    from support.comfyui.encoders import ENCODERS

    entries: list[Entry] = []
    for encoder in ENCODERS[family]:
        for path, module in encoder.twin().named_modules():
            if isinstance(module, torch.nn.Linear):
                name = f"{encoder.component}.{path.removeprefix('text_model.')}"
                entry = hand_entry(name, tuple(module.weight.shape), seed=len(entries), size=0.02)
                entries.append(constant(entry))
    assert len(entries) >= 12
    return hand_fusion(*entries, family=family)


def encoded(encoder: Any, clip: Any) -> torch.Tensor:
    """What one encoder makes of the prompt, as ComfyUI's node encodes it."""
    clip.load_model()
    tokens = clip.tokenize(PROMPT)[encoder.tokens]
    found: torch.Tensor = encoder.of(clip).encode_token_weights(tokens)[0]
    return found.float()


def expected_of(encoder: Any, clip: Any, fusion: Fusion) -> torch.Tensor:
    """What transformers makes of it with the deltas in the weights."""
    twin = encoder.twin_of(clip)
    modules = {path.removeprefix("text_model."): m for path, m in twin.named_modules()}
    for entry in fusion.entries:
        if entry.component == encoder.component:
            row = entry.timeline.at(0.0)
            deltas = [row[s] * WEIGHTS.get(s, 1.0) * whole_delta(entry, s) for s in entry.factors]
            modules[entry.module].weight += sum(deltas).float()
    weighted = clip.tokenize(PROMPT)[encoder.tokens]
    tokens = torch.tensor([[token for token, _ in chunk] for chunk in weighted])
    hidden = twin(input_ids=tokens, output_hidden_states=True)
    if encoder.of(clip).layer == "hidden":
        states: torch.Tensor = hidden.hidden_states[encoder.of(clip).layer_idx]
    else:
        states = hidden.last_hidden_state
    return states


@pytest.mark.parametrize("family", ["sd1", "sdxl", "flux.1"])
def test_text_encoders_equal_those_of_transformers(text_encoders: Any, family: str) -> None:
    from support.comfyui.encoders import ENCODERS, tiny_clip

    clip = tiny_clip(family)
    fusion = fusion_of(family, clip)
    own = text_encoders.apply_to_clip(clip, fusion, WEIGHTS)
    for encoder in ENCODERS[family]:
        bare = encoded(encoder, clip)
        expected = expected_of(encoder, clip, fusion)
        found = encoded(encoder, own)
        assert error(found, expected) < 1e-4, encoder
        assert error(found, bare) > 1e-2, encoder
        assert torch.equal(encoded(encoder, clip), bare)


def test_an_encoder_that_a_clip_lacks_is_refused(text_encoders: Any) -> None:
    from support.comfyui.encoders import tiny_clip

    fusion = fusion_of("flux.1", tiny_clip("flux.1"))
    clip = tiny_clip("sd1")
    with pytest.raises(text_encoders.IncompatibleModelError) as e:
        text_encoders.apply_to_clip(clip, fusion, {})
    assert "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q" in e.value.issues
    assert clip.patcher.patches == {}
