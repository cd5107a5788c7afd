"""Fusions put together by hand, and the whole state of a pipeline to compare with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from klora_runtime.artifact.delta import LowRank, Stored
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.artifact.schedule import Rule, Slot
from klora_runtime.artifact.timeline import Timeline

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
CROSS_ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"


def hand_entry(
    layer: str,
    shape: Sequence[int],
    *,
    switch: float | None = 0.5,
    rank: int = 2,
    size: float = 0.1,
    seed: int = 0,
) -> Entry:
    """A layer whose content acts before progress ``switch`` and whose style acts from there.

    Args:
        layer: component, dot, module path.
        shape: of its weight.
        switch: None for content at all times.
        size: standard deviation of the deltas' elements, roughly.
    """
    component, _, module = layer.partition(".")
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for slot in ("content",) if switch is None else ("content", "style"):
        down = torch.randn(rank, *shape[1:], generator=generator)
        up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator)
        factors[slot] = Stored(size / rank**0.5, LowRank(down, up))
    if switch is None:
        timeline = Timeline.constant({"content": 1.0, "style": 0.0})
    else:
        timeline = Timeline((0.0, switch), {"content": (1.0, 0.0), "style": (0.0, 1.0)})
    fate = "always content" if switch is None else "switching"
    return Entry(component, module, "weight", tuple(shape), fate, timeline, factors, {})


def hand_fusion(*entries: Entry, family: str | None = None) -> Fusion:
    slots = {name: Slot(name, ()) for name in ("content", "style")}
    ordered = tuple(sorted(entries, key=lambda entry: entry.layer))
    return Fusion({}, slots, Rule("by hand", {}, {}), family, ordered, "klora tests")


def fusion_for(pipe: Any, layers: Iterable[str], **settings: Any) -> Fusion:
    """A fusion of these layers in the shapes that the pipeline has."""
    entries = []
    for seed, layer in enumerate(layers):
        shape = weight_of(pipe, layer).shape
        entries.append(hand_entry(layer, shape, **{"seed": seed, **settings}))
    return hand_fusion(*entries)


def delta_of(entry: Entry, slot: str) -> torch.Tensor:
    """The dense delta of one slot, in the shape of the weight."""
    stored = entry.factors[slot]
    up, down = stored.delta.up.double().flatten(1), stored.delta.down.double().flatten(1)
    return (stored.scale * (up @ down)).reshape(entry.shape)


def weight_of(pipe: Any, layer: str) -> torch.Tensor:
    component, _, module = layer.partition(".")
    weight = getattr(pipe, component).get_submodule(module).weight
    assert isinstance(weight, torch.Tensor)
    return weight.data


@dataclass(frozen=True)
class State:
    """Everything about a pipeline that applying could change."""

    pipeline: Any
    scheduler: Any
    modules: dict[str, Any]
    bits: dict[str, Any]

    @classmethod
    def of(cls, pipe: Any) -> State:
        modules, bits = {}, {}
        for component, model in pipe.components.items():
            if not isinstance(model, nn.Module):
                continue
            for path, module in model.named_modules():
                hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
                modules[f"{component}.{path}"] = type(module), sorted(vars(module)), hooks
            for path, parameter in model.named_parameters(remove_duplicate=False):
                bits[f"{component}.{path}"] = (
                    id(parameter),
                    parameter.data_ptr(),
                    parameter.dtype,
                    parameter.stride(),
                    parameter.requires_grad,
                    _bits(parameter),
                )
        scheduler = getattr(pipe, "scheduler", None)
        own = None if scheduler is None else (type(scheduler), sorted(vars(scheduler)))
        return cls((type(pipe), sorted(vars(pipe))), own, modules, bits)


def _bits(tensor: torch.Tensor) -> bytes:
    if tensor.is_meta:
        return b""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
