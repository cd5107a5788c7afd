"""Softened K-LoRA: between the plain sum and the choice of one LoRA."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from klora_compile.rules import Klora, Soft
from klora_compile.rules.kit.numbers import LayerNumbers, Side

DERIVED = {"gamma": {"unet": 2.0}}


def layer(s_c: float, s_s: float) -> LayerNumbers:
    """A layer with these Top-K sums; with gamma 2 its ratio is S_c / (2 S_s)."""
    sides = {
        slot: Side(rank=2, scaling=1.0, frobenius=1.0, l1=1.0, top_k=top_k)
        for slot, top_k in (("content", s_c), ("style", s_s))
    }
    return LayerNumbers("unet", 4, sides)


def rows(rule: Klora, numbers: LayerNumbers) -> list[tuple[float, float, float]]:
    segments = rule.choose(numbers, DERIVED).segments
    return [(start, row.get("content", 0.0), row.get("style", 0.0)) for start, row in segments]


@pytest.mark.parametrize("pattern", ["s", "s*"])
@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("ratio", [0.2, 1.0, 1.4, 5.0])
def test_the_weaker_one_acts_by_the_power_of_rho(
    ratio: float, sharpness: float, pattern: Any
) -> None:
    found = rows(Soft(sharpness=sharpness, pattern=pattern, parts=4), layer(2 * ratio, 1.0))
    assert [start for start, _, _ in found] == [0.0, 0.25, 0.5, 0.75]
    for start, content, style in found:
        t = start + 0.125
        s = 1.5 * t + 0.5 if pattern == "s" else (1.5 * t + 1.3) % 1.5
        rho = ratio / s
        assert content == pytest.approx(min(1.0, rho**sharpness), rel=1e-12)
        assert style == pytest.approx(min(1.0, rho**-sharpness), rel=1e-12)


def test_without_sharpness_it_is_the_sum() -> None:
    assert rows(Soft(sharpness=0.0, parts=2), layer(9.0, 1.0)) == [(0.0, 1.0, 1.0), (0.5, 1.0, 1.0)]


@pytest.mark.parametrize("ratio", [0.3, 0.9, 1.1, 1.9])
def test_with_much_of_it_one_acts_alone_as_k_lora_chooses(ratio: float) -> None:
    numbers, parts = layer(2 * ratio, 1.0), 16
    hard = Klora().choose(numbers, DERIVED)
    for start, content, style in rows(Soft(sharpness=100.0, parts=parts), numbers):
        middle = start + 0.5 / parts
        (wanted,) = [row for begin, row in hard.segments if begin <= middle][-1:]
        rho = ratio / (1.5 * middle + 0.5)
        if abs(rho - 1.0) > 0.1:
            assert {"content": content, "style": style} == {"content": 0.0, "style": 0.0} | wanted


def test_where_s_is_not_above_zero_the_content_acts_alone() -> None:
    found = rows(Soft(beta=-0.5, alpha=0.1, parts=2), layer(0.1, 9.0))
    assert found == [(0.0, 1.0, 0.0), (0.5, 1.0, 0.0)]


def test_settings_of_k_lora_hold() -> None:
    numbers = layer(2.0, 1.0)
    plain, biased = (rows(Soft(bias=bias, parts=1), numbers) for bias in (0.0, 0.5))
    assert plain == biased  # gamma has the bias in it, and is given here
    rule = Soft(sharpness=2.5, parts=3, pattern="s*", semantics="authors")
    assert Soft.from_parameters(rule.parameters()) == rule
    assert rule.text().startswith("sharpness 2.5 in 3 parts, pattern s*, authors semantics")
    assert rule.range() is None


def test_a_layer_of_one_role_is_as_before() -> None:
    numbers = layer(2.0, 1.0)
    contents = {"content.1": numbers.sides["content"], "content.2": numbers.sides["style"]}
    derived = {"l1.unet": {"content.1": 1.0, "content.2": 1.0}}
    found = Soft().choose(replace(numbers, sides=contents), derived)
    assert found.segments == ((0.0, {"content.1": 1.0}),)
