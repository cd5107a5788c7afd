"""Applying, changing and removing a fusion; what it does to the weights and what it leaves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from support.generation import TWO_STEPS, Case, build, generate
from support.handmade import (
    ATTENTION,
    State,
    delta_of,
    fusion_for,
    hand_entry,
    hand_fusion,
    weight_of,
)
from support.pairs import slow
from tiny_pipeline import SD_BETAS

from klora_runtime import apply_fusion, save_fusion
from klora_runtime.artifact.fusion import Fusion

TO_Q, TO_K = (f"unet.{ATTENTION}.{leaf}" for leaf in ("to_q", "to_k"))
CONV = "unet.down_blocks.0.resnets.0.conv1"
TEXT = "text_encoder.encoder.layers.0.self_attn.q_proj"


# Removing.


@pytest.mark.parametrize("rounds", [3, slow(100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_remove_gives_every_bit_back_after_many_rounds(
    dtype: torch.dtype, rounds: int, pipe: Any, fusion: Fusion, other_fusion: Fusion
) -> None:
    pipe.to(dtype)
    before, image = State.of(pipe), generate(pipe, TWO_STEPS)

    for _ in range(rounds):
        handle = apply_fusion(pipe, fusion)
        fused = generate(pipe, TWO_STEPS)
        handle.swap(other_fusion)
        handle.remove()

    assert not torch.equal(fused, image)
    assert State.of(pipe) == before
    assert torch.equal(generate(pipe, TWO_STEPS), image)


def test_remove_leaves_nothing_on_any_scheduler(pipe: Any, fusion: Fusion) -> None:
    first, plain = pipe.scheduler, type(pipe.scheduler)
    handle = apply_fusion(pipe, fusion)
    unused = copy.deepcopy(first)
    second = pipe.scheduler = DDIMScheduler(**SD_BETAS)
    third = pipe.scheduler = copy.deepcopy(second)
    generate(pipe, TWO_STEPS)
    assert type(first) is not plain
    assert type(third) is not DDIMScheduler

    handle.remove()
    before = State.of(pipe)
    pipe.scheduler = unused
    generate(pipe, TWO_STEPS)

    assert type(first) is plain
    assert type(second) is type(third) is DDIMScheduler
    assert State.of(pipe).bits == before.bits  # the copy that was never used does nothing


def test_remove_twice_is_remove_once(pipe: Any, fusion: Fusion) -> None:
    before = State.of(pipe)
    first = apply_fusion(pipe, fusion)
    first.remove()
    second = apply_fusion(pipe, fusion)

    first.remove()

    assert State.of(pipe) != before
    second.remove()
    assert State.of(pipe) == before


def test_a_model_converted_meanwhile_is_as_if_converted_before(pipe: Any, fusion: Fusion) -> None:
    plain = build(TWO_STEPS).to(torch.bfloat16)
    handle = apply_fusion(pipe, fusion)

    pipe.to(torch.bfloat16)
    handle.set(content=1.0)  # writes every layer
    with apply_fusion(plain, fusion):
        for layer in (TO_Q, TO_K, CONV, TEXT):
            assert torch.equal(weight_of(pipe, layer), weight_of(plain, layer))
    generate(pipe, TWO_STEPS)
    handle.remove()

    found, expected = State.of(pipe).bits, State.of(plain).bits
    assert {name: bits[-1] for name, bits in found.items()} == {
        name: bits[-1] for name, bits in expected.items()
    }


# Applying.


def test_every_layer_holds_its_base_and_delta_from_the_start(pipe: Any) -> None:
    early, late = fusion_for(pipe, [TO_Q, TEXT]), hand_entry(TO_K, (32, 32), switch=0.001)
    fusion = hand_fusion(*early.entries, late, hand_entry(CONV, (32, 32, 3, 3), switch=None))
    base = {entry.layer: weight_of(pipe, entry.layer).clone() for entry in fusion.entries}

    apply_fusion(pipe, fusion)

    for entry in fusion.entries:
        expected = base[entry.layer].double() + delta_of(entry, "content")
        torch.testing.assert_close(weight_of(pipe, entry.layer).double(), expected)


def test_a_file_and_the_fusion_in_it_do_the_same(pipe: Any, fusion: Fusion, tmp_path: Path) -> None:
    path = tmp_path / "a.klora.safetensors"
    save_fusion(fusion, path)
    with apply_fusion(pipe, fusion):
        expected = generate(pipe, TWO_STEPS)

    with apply_fusion(pipe, str(path)):
        assert torch.equal(generate(pipe, TWO_STEPS), expected)
    with apply_fusion(pipe, path, mode="merge"):
        assert torch.equal(generate(pipe, TWO_STEPS), expected)


def test_weights_go_into_the_storage_that_is_there(pipe: Any, fusion: Fusion) -> None:
    """So that compiled graphs stay valid."""
    before = {name: bits[:5] for name, bits in State.of(pipe).bits.items()}

    handle = apply_fusion(pipe, fusion)
    generate(pipe, TWO_STEPS)
    handle.set(content=0.5)

    assert {name: bits[:5] for name, bits in State.of(pipe).bits.items()} == before


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_convolutions(pipe: Any, layout: torch.memory_format, dtype: torch.dtype) -> None:
    """3x3 and 1x1, the latter also with factors as of a linear layer."""
    small = "unet.down_blocks.0.attentions.0.proj_in"
    pipe.unet.to(memory_format=layout, dtype=dtype)
    linear = hand_entry("unet.mid_block.attentions.0.proj_out", (64, 64), switch=None)
    fusion = hand_fusion(*fusion_for(pipe, [CONV, small], switch=None).entries, linear)
    before = State.of(pipe)
    base = {entry.layer: weight_of(pipe, entry.layer).clone() for entry in fusion.entries}

    handle = apply_fusion(pipe, fusion)

    for entry in fusion.entries:
        found = weight_of(pipe, entry.layer)
        expected = base[entry.layer].double() + delta_of(entry, "content").view(found.shape)
        torch.testing.assert_close(found, expected.to(dtype))
        assert found.stride() == base[entry.layer].stride()
    handle.remove()
    assert State.of(pipe) == before


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoders_with_and_without_the_prefix(prefix: str) -> None:
    """Of the two models one has it; of files some have it."""
    pipe = build(Case(2, kind="sdxl"))
    path = "encoder.layers.1.self_attn.v_proj"
    names = [f"text_encoder.{path}", f"text_encoder_2.text_model.{path}"]
    base = {name: weight_of(pipe, name).clone() for name in names}
    fusion = hand_fusion(
        hand_entry(f"text_encoder.{prefix}{path}", (32, 32), switch=None),
        hand_entry(f"text_encoder_2.{prefix}{path}", (32, 32), switch=None, seed=1),
    )

    with apply_fusion(pipe, fusion):
        for name, entry in zip(names, fusion.entries, strict=True):
            expected = base[name].double() + delta_of(entry, "content")
            torch.testing.assert_close(weight_of(pipe, name).double(), expected)
    for name in names:
        assert torch.equal(weight_of(pipe, name), base[name])


def test_components_may_be_chosen(pipe: Any, fusion: Fusion) -> None:
    before = State.of(pipe)

    with apply_fusion(pipe, fusion, components=["unet"]) as handle:
        assert changed(pipe, before) == {"unet"}
        assert handle.report().components == ("unet",)
    with apply_fusion(pipe, fusion, components=["text_encoder"]) as handle:
        assert changed(pipe, before) == {"text_encoder"}
        assert handle.report().switches == 0
    with apply_fusion(pipe, fusion):
        assert changed(pipe, before) == {"unet", "text_encoder"}
    assert State.of(pipe) == before


def changed(pipe: Any, before: State) -> set[str]:
    now = State.of(pipe).bits
    return {name.partition(".")[0] for name in now if now[name] != before.bits[name]}


def test_a_model_loaded_in_inference_mode(fusion: Fusion) -> None:
    """Its weights refuse writes under no_grad."""
    with torch.inference_mode():
        pipe = build(TWO_STEPS)
    assert weight_of(pipe, TO_Q).is_inference()
    before = State.of(pipe)

    handle = apply_fusion(pipe, fusion)
    generate(pipe, TWO_STEPS)
    handle.remove()

    assert State.of(pipe).bits == before.bits


@pytest.mark.parametrize("first_out", [0, 1])
def test_two_fusions_on_two_components_of_one_pipeline(
    first_out: int, pipe: Any, fusion: Fusion
) -> None:
    before = State.of(pipe)
    with apply_fusion(pipe, fusion):
        expected = generate(pipe, TWO_STEPS)

    handles = [apply_fusion(pipe, fusion, components=[name]) for name in ("unet", "text_encoder")]
    assert torch.equal(generate(pipe, TWO_STEPS), expected)
    handles[first_out].remove()
    pipe.scheduler = copy.deepcopy(pipe.scheduler)
    generate(pipe, TWO_STEPS)
    handles[1 - first_out].remove()

    assert State.of(pipe) == before


def test_two_pipelines_with_one_scheduler(pipe: Any, fusion: Fusion) -> None:
    with apply_fusion(pipe, fusion):
        expected = generate(pipe, TWO_STEPS)
    second = build(TWO_STEPS)
    second.scheduler = pipe.scheduler

    handles = [apply_fusion(each, fusion) for each in (pipe, second)]

    for each in (pipe, second):
        assert torch.equal(generate(each, TWO_STEPS), expected)
    for handle in handles:
        handle.remove()
    assert "step" not in vars(pipe.scheduler)
