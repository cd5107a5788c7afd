"""Mode branch multiplies with the slots that act now; the others wait for their turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.applying import live_of
from support.generation import TWO_STEPS, generate
from support.handmade import ATTENTION, delta_of, fusion_for, hand_entry, hand_fusion
from tiny_pipeline import relative_difference

from klora_runtime import apply_fusion
from klora_runtime.artifact.delta import LowRank
from klora_runtime.artifact.fusion import Entry
from klora_runtime.artifact.timeline import Timeline
from klora_runtime.layers import branch_factors
from klora_runtime.layers.turns import rank_in_turns, turns_of

TO_Q, TO_K, TO_V = (f"unet.{ATTENTION}.{leaf}" for leaf in ("to_q", "to_k", "to_v"))
CONV = "unet.down_blocks.0.resnets.0.conv1"

#: Alone, together, the other alone, neither, and the first again at another weight.
MANY = Timeline(
    (0.0, 0.2, 0.4, 0.6, 0.8),
    {"content": (1.0, 0.5, 0.0, 0.0, 2.0), "style": (0.0, 0.7, 1.0, 0.0, 0.0)},
)


def varied(layer: str, shape: tuple[int, ...], timeline: Timeline = MANY) -> Entry:
    """A layer with a content of rank 3 and a style of rank 6."""
    content, style = (hand_entry(layer, shape, rank=rank, seed=rank) for rank in (3, 6))
    factors = {"content": content.factors["content"], "style": style.factors["style"]}
    return replace(content, timeline=timeline, factors=factors)


def module_of(pipe: Any, layer: str) -> Any:
    return pipe.unet.get_submodule(layer.removeprefix("unet."))


def test_slots_that_act_stand_side_by_side() -> None:
    ranks = {"content": 3, "style": 6}

    assert turns_of(MANY, ranks) == [
        {"content": 0},
        {"content": 0, "style": 3},
        {"style": 0},
        {},
        {"content": 0},
    ]
    assert rank_in_turns(MANY, ranks) == 9
    assert rank_in_turns(Timeline((0.0, 0.5), {"content": (1, 0), "style": (0, 1)}), ranks) == 6


@pytest.mark.parametrize("layer", [TO_Q, CONV])
def test_each_turn_computes_with_its_own_factors(layer: str, pipe: Any) -> None:
    """Forward, back, over several breakpoints at once; whatever was held before is gone."""
    module = module_of(pipe, layer)
    entry = varied(layer, tuple(module.weight.shape))
    x = torch.randn(2, 32, *((6, 6) if layer == CONV else (32,))[: module.weight.dim() - 2 or 1])
    plain, deltas = module.weight.data.clone(), {s: delta_of(entry, s) for s in entry.factors}
    handle = apply_fusion(pipe, hand_fusion(entry), mode="branch", weights={"style": 0.5})
    pipe.scheduler.set_timesteps(2)

    for progress in (0.1, 0.3, 0.5, 0.9, 0.1, 0.7, 0.3, 0.5, 0.1):
        live_of(handle).move(progress)
        row = MANY.at(progress)
        delta = row["content"] * deltas["content"] + 0.5 * row["style"] * deltas["style"]
        expected = twin(module, plain.double() + delta)(x.double())
        assert relative_difference(module(x), expected) < 1e-6


def twin(module: Any, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    bias = None if module.bias is None else module.bias.double()
    if weight.dim() == 2:
        return lambda x: torch.nn.functional.linear(x, weight, bias)
    return lambda x: torch.nn.functional.conv2d(x, weight, bias, module.stride, module.padding)


def test_buffers_are_as_wide_as_what_acts_at_once(pipe: Any) -> None:
    alternating = Timeline((0.0, 0.5), {"content": (1.0, 0.0), "style": (0.0, 1.0)})
    both = Timeline.constant({"content": 1.0, "style": 1.0})
    entries = [varied(TO_Q, (32, 32), alternating), varied(TO_K, (32, 32), both)]

    handle = apply_fusion(pipe, hand_fusion(*entries), mode="branch")

    assert module_of(pipe, TO_Q)._klora_down.shape == (8, 32)
    assert module_of(pipe, TO_K)._klora_down.shape == (16, 32)
    waiting = (3 + 6) * (32 + 32) * 4  # of TO_Q; those of TO_K stay in their buffers
    assert handle.report().nbytes["factors on cpu"] == (8 + 16) * (32 + 32) * 4 + waiting


def test_gates_alone_change_where_the_slots_stay(pipe: Any) -> None:
    fading = Timeline((0.0, 0.5), {"content": (1.0, 0.3), "style": (0.2, 1.0)})
    handle = apply_fusion(pipe, hand_fusion(varied(TO_Q, (32, 32), fading)), mode="branch")

    assert handle.report().nbytes["factors on cpu"] == 16 * (32 + 32) * 4


def test_a_turn_that_fails_is_made_good(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the next call is for the very turn whose factors were not copied."""
    handle = apply_fusion(pipe, fusion_for(pipe, [TO_Q, CONV], size=0.3), mode="branch")
    module, x = module_of(pipe, TO_Q), torch.randn(2, 5, 32)
    pipe.scheduler.set_timesteps(2)
    live_of(handle).move(0.75)
    expected = module(x)
    live_of(handle).move(0.25)

    def failing(*tensors: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", failing)
        with pytest.raises(MemoryError):
            live_of(handle).move(0.75)
    live_of(handle).move(0.75)

    assert torch.equal(module(x), expected)


def test_factors_are_converted_a_portion_at_a_time(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no float32 copy of all of them is ever there."""
    fusion = fusion_for(pipe, [TO_Q, TO_K, TO_V], size=0.3)
    with apply_fusion(pipe, fusion, mode="branch"):
        expected = generate(pipe, TWO_STEPS)
    layer = 4 * 2 * 2 * (32 + 32)
    sizes: list[int] = []
    balanced = branch_factors.balanced

    def seen(deltas: list[LowRank]) -> list[LowRank]:
        sizes.append(sum(delta.nbytes for delta in deltas))
        return balanced(deltas)

    monkeypatch.setattr(branch_factors, "balanced", seen)
    monkeypatch.setattr(branch_factors, "PORTION", 2 * layer)
    apply_fusion(pipe, fusion, mode="branch")

    assert sizes == [2 * layer, layer]
    assert torch.equal(generate(pipe, TWO_STEPS), expected)
