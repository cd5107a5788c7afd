"""Copies of base weights go where there is room for all of them together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.applying import live_of
from support.handmade import ATTENTION, CROSS_ATTENTION, State, fusion_for

from klora_runtime import apply_fusion
from klora_runtime.layers.merge import Merge
from klora_runtime.layers.pristine import copies
from klora_runtime.layers.pristine.copies import Copies

LAYERS = [f"unet.{ATTENTION}.to_q", f"unet.{ATTENTION}.to_k", f"unet.{CROSS_ATTENTION}.to_q"]

#: Stands for the device that the parameters were on before they were moved here.
ELSEWHERE = torch.device("meta")


def copies_of(handle: Any) -> Copies:
    mode = live_of(handle).mode
    assert isinstance(mode, Merge)
    return mode._pristine._copies


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many copies were placed together, each time some were."""
    counts: list[int] = []
    places = copies._places

    def counting(targets: Any) -> Any:
        listed = list(targets)
        counts.append(len(listed))
        return places(listed)

    monkeypatch.setattr(copies, "_places", counting)
    return counts


def test_copies_of_a_moved_model_are_placed_together(pipe: Any, placed: list[int]) -> None:
    bare = State.of(pipe).bits
    handle = apply_fusion(pipe, fusion_for(pipe, LAYERS), mode="merge")
    copies_of(handle)._homes = dict.fromkeys(copies_of(handle)._homes, ELSEWHERE)
    placed.clear()
    handle.set(content=0.5)
    handle.set(content=0.7)
    assert placed == [3]
    handle.remove()
    assert State.of(pipe).bits == bare


def test_a_swap_remembers_where_copies_were_placed(pipe: Any, placed: list[int]) -> None:
    handle = apply_fusion(pipe, fusion_for(pipe, LAYERS[:2]), mode="merge")
    copies_of(handle)._homes = dict.fromkeys(copies_of(handle)._homes, ELSEWHERE)
    placed.clear()
    handle.swap(fusion_for(pipe, LAYERS[1:]))
    assert placed == [1, 2, 1]  # the new one; those before, to give one back; the one of both
    assert set(copies_of(handle)._homes.values()) == {torch.device("cpu")}
