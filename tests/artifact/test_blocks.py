"""The map of a schedule: blocks in the order in which data flows through the base model."""

from __future__ import annotations

import pytest
from support.handmade import hand_entry, hand_fusion

from klora_runtime.artifact.blocks import blocks
from klora_runtime.families.catalogue import FAMILIES


def names(*layers: str, family: str | None) -> list[str]:
    fusion = hand_fusion(*(hand_entry(layer, (4, 4)) for layer in layers), family=family)
    return [block.name for block in blocks(fusion)]


@pytest.mark.parametrize("key", FAMILIES)
def test_blocks_follow_each_other_as_in_the_record(key: str) -> None:
    family = FAMILIES[key]
    component = family.denoisers[0]
    paths = [f"{component}.{name}.{i}.layer" for name in family.blocks for i in (0, 2, 10)]
    other = f"{component}.aaa"
    found = names(other, *reversed(paths), family=key)
    assert found == [*(path.removesuffix(".layer") for path in paths), other]


def test_a_model_that_is_not_known_has_the_order_of_those_that_are() -> None:
    layers = ["unet.up_blocks.0.a", "unet.mid_block.a.a", "unet.down_blocks.1.a", "unet.conv_in"]
    expected = ["unet.down_blocks.1", "unet.mid_block", "unet.up_blocks.0", "unet.conv_in"]
    assert names(*layers, family=None) == names(*layers, family="of tomorrow") == expected
