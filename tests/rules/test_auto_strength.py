"""Auto-strength against its definition on dense deltas."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.compiling import compiled, rescheduled
from support.few_layers import CONV, KEY, QUERY, SHAPES, TEXT, VALUE
from support.lora_files import peft_keys, random_pair, write_lora

from klora_compile import verify_fusion
from klora_compile.rules.auto_strength import scale_of
from klora_compile.rules.kit.numbers import LayerNumbers, Side
from klora_compile.sources import by_source
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.errors import ConfigError

NAMES = ("content", "style", "third")


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three LoRAs: the second is alike to the first in one layer, and opposite in another."""
    folder = tmp_path_factory.mktemp("strength")
    found = {}
    for number, (slot, rank) in enumerate(zip(NAMES, (2, 3, 2), strict=True)):
        tensors = {}
        for i, (name, (out, width, kernel)) in enumerate(SHAPES.items()):
            if name == VALUE and number:
                continue
            down, up = random_pair(out, width, rank, seed=31 * number + i, kernel=kernel)
            if name in (KEY, CONV):
                sign = -1.0 if name == KEY and number == 1 else 1.0
                shared = random_pair(out, width, rank, seed=100 + i, kernel=kernel)
                down, up = down * 0.1 + shared[0], sign * shared[1]
            tensors |= peft_keys({name: (down, up)}) | {f"{name}.alpha": torch.tensor(1.0 + rank)}
        tensors[f"{QUERY}.diff_b"] = torch.arange(8.0) - number
        found[slot] = write_lora(folder / f"{slot}.safetensors", tensors)
    return found


def dense(fusion: Fusion) -> dict[str, dict[str, torch.Tensor]]:
    """Layer of the denoiser -> slot -> scaled delta."""
    return {
        entry.layer: {
            slot: stored.scale * stored.delta.matrix() for slot, stored in entry.factors.items()
        }
        for entry in fusion.entries
        if entry.layer != TEXT
    }


def literal(layers: list[dict[str, torch.Tensor]]) -> float:
    """min(1, the strongest LoRA's norm over the sum's), with all layers laid end to end."""
    slots = sorted({slot for own in layers for slot in own})
    whole = {
        slot: torch.cat([own.get(slot, 0 * next(iter(own.values()))).flatten() for own in layers])
        for slot in slots
    }
    strongest = max(float(each.norm()) for each in whole.values())
    return min(1.0, strongest / float(sum(whole.values()).norm()))  # type: ignore[union-attr]


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("per", ["model", "layer"])
def test_the_sum_has_the_norm_of_the_strongest(
    loras: dict[str, Path], per: str, count: int
) -> None:
    contents = [loras["content"], *([loras["third"]] if count == 3 else [])]
    fusion = compiled(contents, loras["style"], "auto-strength", per=per, style_weight=0.5)
    deltas = dense(fusion)
    alike = literal(list(deltas.values()))
    assert 0.1 < alike < 0.99
    scales = set()
    for entry in fusion.entries:
        row = entry.timeline.at(0.5)
        if entry.layer == TEXT:
            assert row["style"] == 0.5
            continue
        wanted = alike if per == "model" else literal([deltas[entry.layer]])
        scales.add(wanted)
        for slot in entry.factors:
            factor = 0.5 if slot == "style" else 1.0
            assert row[slot] == pytest.approx(factor * wanted, rel=1e-9)
    if per == "model":
        assert fusion.rule.derived["strength"]["unet"] == pytest.approx(alike, rel=1e-12)
    else:
        assert fusion.rule.derived == {}
        assert len(scales) > 2
        assert 1.0 in scales  # where one LoRA stands alone


def norms(c: float, s: float, product: float) -> list[LayerNumbers]:
    sides = {"content": Side(1, 1.0, c), "style": Side(1, 1.0, s)}
    return [LayerNumbers("unet", None, sides, products={("content", "style"): product})]


@pytest.mark.parametrize(
    ("numbers", "wanted"),
    [
        ((3.0, 3.0, 9.0), 0.5),  # equal deltas
        ((3.0, 3.0, 0.0), math.sqrt(0.5)),
        ((3.0, 4.0, 0.0), 0.8),
        ((3.0, 3.0, -9.0), 1.0),  # they cancel: nothing is amplified
        ((3.0, 0.0, 0.0), 1.0),
        ((0.0, 0.0, 0.0), 1.0),
    ],
)
def test_scales_that_are_known(numbers: tuple[float, float, float], wanted: float) -> None:
    assert scale_of(norms(*numbers)) == pytest.approx(wanted, rel=1e-12)


def test_it_is_verified_and_survives_other_rules_and_back(loras: dict[str, Path]) -> None:
    sources = by_source(loras["content"], loras["style"])
    fusion = compiled(loras["content"], loras["style"], "auto-strength", per="layer")
    assert verify_fusion(fusion, sources) == []
    direct = rescheduled(fusion, "direct")
    assert verify_fusion(direct, sources) == []
    back = rescheduled(rescheduled(direct, "est"), "auto-strength", per="layer")
    assert [e.timeline for e in back.entries] == [e.timeline for e in fusion.entries]
    plain = compiled(loras["content"], loras["style"], "direct")
    with pytest.raises(ConfigError, match="needs the inner products of the LoRAs, which rule dir"):
        rescheduled(plain, "auto-strength")
