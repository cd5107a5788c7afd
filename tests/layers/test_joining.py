"""Entries that change rows of one parameter, joined to one entry, equal their sum at any moment."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.handmade import delta_of, hand_entry, hand_fusion
from torch import nn

from klora_runtime.artifact.delta import Dense, Stored
from klora_runtime.artifact.fusion import Entry
from klora_runtime.layers.choice import choose
from klora_runtime.layers.joining import Part, joined_entry
from klora_runtime.layers.live_fusion import LiveFusion
from klora_runtime.layers.targets import find_targets

X = torch.randn(4, 7, generator=torch.Generator().manual_seed(3))


def parts() -> list[Part]:
    """A query, a value whose halves are swapped, and another fusion on all rows."""
    query, value, whole = (
        hand_entry(f"transformer.{name}", (out, 7), switch=switch, size=1.0, seed=seed)
        for seed, (name, out, switch) in enumerate((("q", 4, 0.3), ("v", 4, 0.6), ("all", 12, 0.6)))
    )
    dense = {slot: Stored(0.5, Dense(delta_of(value, slot).float())) for slot in value.factors}
    return [
        Part(query, (range(4),)),
        Part(replace(value, factors=dense), (range(10, 12), range(8, 10))),
        Part(whole, weights={"style": 0.25}),
    ]


def literal(progress: float) -> torch.Tensor:
    total = torch.zeros(12, 7, dtype=torch.float64)
    for part in parts():
        entry, own = part.entry, torch.zeros(part.entry.shape, dtype=torch.float64)
        for slot, coefficient in entry.timeline.at(progress).items():
            weight = coefficient * part.weights.get(slot, 1.0)
            own += weight * whole_delta(entry, slot)
        if part.rows is None:
            total += own
        else:
            for row, values in zip((r for rows in part.rows for r in rows), own, strict=True):
                total[row] += values
    return total


def whole_delta(entry: Entry, slot: str) -> torch.Tensor:
    stored = entry.factors[slot]
    if isinstance(stored.delta, Dense):
        return stored.scale * stored.delta.values.double()
    return delta_of(entry, slot)


@pytest.mark.parametrize("mode", ["merge", "branch"])
def test_a_joined_entry_acts_as_its_parts(mode: str) -> None:
    model = nn.Sequential()
    model.add_module("qkv", nn.Linear(7, 12))
    model.requires_grad_(False)
    bare = model(X)
    entry = joined_entry("transformer", "qkv", "weight", (12, 7), parts())
    assert entry.timeline.starts == (0.0, 0.3, 0.6)
    fusion = hand_fusion(entry)
    targets = find_targets({"transformer": model}, fusion)
    live = LiveFusion(fusion, choose(mode, targets, {})[0], {})
    live.write()
    for progress in (0.1, 0.45, 0.9, 0.2):
        live.move(progress)
        torch.testing.assert_close(model(X), bare + X @ literal(progress).float().T)
    live.release()
    assert torch.equal(model(X), bare)


def test_a_part_of_all_rows_keeps_its_factors() -> None:
    (*_, whole) = parts()
    entry = joined_entry("transformer", "qkv", "weight", (12, 7), [whole])
    for slot, stored in whole.entry.factors.items():
        assert entry.factors[f"0.{slot}"].delta is stored.delta
    scale = whole.entry.factors["style"].scale
    assert entry.factors["0.style"].scale == 0.25 * scale
