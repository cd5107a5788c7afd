"""Weights by groups of layers: products of the rows that match."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.shipped import error_of, klora

from klora_compile import ConfigError
from klora_compile.rules import Groups
from klora_compile.rules.kit.numbers import LayerNumbers, Side

MID = "unet.mid_block.attentions.0.transformer_blocks.0"


def layer(name: str, *slots: str) -> LayerNumbers:
    side = Side(rank=2, scaling=1.0, frobenius=1.0)
    return LayerNumbers("unet", None, dict.fromkeys(slots or ("content", "style"), side), name=name)


def test_rows_that_match_are_multiplied_whatever_their_order() -> None:
    table = {
        "style *attn2*": "0:0.5,0.5:2",
        "style *mid_block*": "0:3,0.25:1",
        "content *": "0:0.1",
    }
    for each in (table, dict(reversed(table.items()))):
        found = Groups(table=each).choose(layer(f"{MID}.attn2.to_q"), {})
        assert found.segments == (
            (0.0, {"content": 0.1, "style": 1.5}),
            (0.25, {"content": 0.1, "style": 0.5}),
            (0.5, {"content": 0.1, "style": 2.0}),
        )


def test_a_layer_without_a_row_has_the_sum() -> None:
    found = Groups(table={"style *attn2*": "0:0.5"}).choose(layer("unet.conv_in"), {})
    assert found.segments == ((0.0, {"content": 1.0, "style": 1.0}),)


def test_a_row_may_name_one_of_several() -> None:
    rule = Groups(table={"content.2 *": "0:0.5", "content *": "0:4"})
    found = rule.choose(layer("unet.conv_in", "content.1", "content.2"), {})
    assert found.segments == ((0.0, {"content.1": 4.0, "content.2": 2.0}),)


def test_the_table_that_was_found_is_the_default() -> None:
    found = Groups().choose(layer(f"{MID}.ff.net.2"), {}).segments
    assert found[0] == (0.0, {"content": 1.7, "style": 0.2})
    assert found[-1] == (0.667, {"content": 0.8, "style": 0.5})
    assert Groups.from_parameters(Groups().parameters()) == Groups()
    assert Groups().misfit(["content"]) is None


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ({"style": "0:1"}, "table: expected rows of a role or slot and a pattern of layers"),
        ({"style a b": "0:1"}, "table: expected rows of a role or slot and a pattern of layers"),
        ({"style *": "1"}, "table, style *: expected progress:weight"),
        ({"style *": "0:101"}, "a weight of table, style *: expected a number from -100"),
        ([1], "table: expected rows ROLE PATTERN with progress:weight"),
    ],
)
def test_rows_that_say_nothing_are_refused(table: object, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Groups(table=table)  # type: ignore[arg-type]
    assert text in str(caught.value)


def test_rows_of_other_loras_are_refused() -> None:
    assert "there is no LoRA 'styles'; name one of content, style" in str(
        Groups(table={"styles *": "0:1"}).misfit(["content", "style"])
    )


def test_a_file_that_is_no_table_is_one_error(tmp_path: Path) -> None:
    for text, said in (("[1]", "is no JSON object"), ("{", "is no JSON file")):
        path = tmp_path / "table.json"
        path.write_text(text)
        refused = klora("compile", path, path, "-o", path, "--rule", "groups", "--table", path)
        assert said in error_of(refused, 2)
