"""Weights by groups of layers: products of the rows that match."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.compiling import compiled, rescheduled
from support.lora_files import peft_keys, random_pair, write_lora
from support.shipped import error_of, klora

from klora_compile import ConfigError
from klora_compile.rules import Groups
from klora_compile.rules.kit.numbers import LayerNumbers, Side
from klora_compile.settings.config import Config

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


FLUX = {
    "transformer.single_transformer_blocks.0.attn.to_q": (1.0, 0.5),
    "transformer.single_transformer_blocks.9.proj_out": (1.0, 0.5),
    "transformer.single_transformer_blocks.10.attn.to_q": (0.5, 1.0),
    "transformer.single_transformer_blocks.37.proj_mlp": (0.5, 1.0),
    "transformer.transformer_blocks.18.attn.to_q": (1.0, 1.0),
}


def test_the_blocks_of_flux_are_those_of_the_paper() -> None:
    """SplitFlux: of the single-stream blocks the first ten are the content's, the rest style's."""
    rule = Groups(table="flux-blocks")
    for name, (content, style) in FLUX.items():
        found = rule.choose(layer(name), {}).segments
        assert found == ((0.0, {"content": content, "style": style}),)
    assert rule.text() == "flux-blocks"
    assert Groups.from_parameters(rule.parameters()).text() == "flux-blocks"
    assert Groups(table={"style *": "0:2"}).text() == "1 rows"


def test_a_table_of_one_base_model_is_refused_for_others(tmp_path: Path) -> None:
    rule = Groups(table="flux-blocks")
    assert rule.misfit_of_base({"flux.1", "chroma"}) is None
    assert rule.misfit_of_base(()) == (
        "table: flux-blocks is for FLUX.1, and these LoRAs are for an unknown family. Write a "
        "table with patterns of their layers, or take another rule."
    )
    assert Groups().misfit_of_base({"sdxl"}) is None
    names = [f"unet.{MID.removeprefix('unet.')}.attn2.to_{part}" for part in "kv"]
    for seed, each in enumerate(("content", "style")):
        pairs = {name: random_pair(320, 1024, 2, seed=seed) for name in names}
        write_lora(tmp_path / each, peft_keys(pairs))
    loras = (tmp_path / "content", tmp_path / "style")
    with pytest.raises(
        ConfigError, match=r"table: flux-blocks is for FLUX\.1, and these LoRAs are"
    ):
        compiled(*loras, "groups", table="flux-blocks")
    own = compiled(*loras, "groups")
    with pytest.raises(
        ConfigError, match=r"table: flux-blocks is for FLUX\.1, and these LoRAs are"
    ):
        rescheduled(own, None, table="flux-blocks")


def test_rows_that_match_no_layer_are_counted_and_a_table_of_such_rows_is_refused() -> None:
    layers = {name: layer(name) for name in FLUX}
    some = Groups(table={"style *.attn.*": "0:2", "style *.ff.*": "0:3", "content *conv*": "0:1"})
    assert some.weigh(layers) == {"idle_rows": 2}
    assert Groups(table={"style *.attn.*": "0:2"}).weigh(layers) == {}
    assert Groups(table={}).weigh(layers) == {}
    with pytest.raises(ConfigError) as caught:
        Groups().weigh(layers)
    assert str(caught.value) == (
        "table: no row of the table unet-demo matches a layer of these LoRAs, such as "
        "transformer.single_transformer_blocks.0.attn.to_q. Write a table with patterns of their "
        "layers."
    )


@pytest.mark.parametrize("table", ["flux-block", 3])
def test_a_table_that_is_not_known_by_name_is_refused(table: object) -> None:
    with pytest.raises(ConfigError, match="table: expected "):
        Groups(table=table)  # type: ignore[arg-type]


def test_a_file_that_is_no_table_is_one_error(tmp_path: Path) -> None:
    for text, said in (("[1]", "is no JSON object"), ("{", "is no JSON file")):
        path = tmp_path / "table.json"
        path.write_text(text)
        refused = klora("compile", path, path, "-o", path, "--rule", "groups", "--table", path)
        assert said in error_of(refused, 2)


def test_another_table_takes_the_place_of_the_first() -> None:
    before = Config.named("groups", table={"style *": "0:2"}, weights={"style": 0.5})
    after = before.changed(None, table={"content *": "0:3"}, weights={"content": 2.0})
    assert after.rule.parameters() == {"table": {"content *": "0:3"}}
    assert after.settings.weights == {"style": 0.5, "content": 2.0}
