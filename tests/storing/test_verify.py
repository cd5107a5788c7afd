"""``klora verify --against`` notices each thing that can be wrong about an artifact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_pipeline import tiny_lora, tiny_pipeline

from klora_compile import Config, compile_fusion, read_adapter
from klora_compile.reading.adapter import Adapter
from klora_compile.verify import differences
from klora_runtime.artifact.fusion import Entry, Fusion, Rule
from klora_runtime.artifact.timeline import Timeline
from klora_runtime.errors import KloraError


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Adapter, Adapter]:
    folder = tmp_path_factory.mktemp("loras")
    pipe = tiny_pipeline("sd1")
    content = tiny_lora(pipe, folder / "content.safetensors", seed=1)
    return read_adapter(content), read_adapter(
        tiny_lora(pipe, folder / "style.safetensors", seed=2)
    )


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config.named("klora", semantics="authors", pattern="s*", top_k=7),
        Config.named("klora", gamma=2.0, style_weight=0.5),
    ],
)
def test_a_fusion_equals_its_sources(adapters: tuple[Adapter, Adapter], config: Config) -> None:
    assert differences(compile_fusion(*adapters, config), *adapters) == []


def first_switching(fusion: Fusion) -> int:
    return next(i for i, entry in enumerate(fusion.entries) if entry.fate == "switching")


def with_entry(fusion: Fusion, change: Callable[[Entry], Entry]) -> Fusion:
    entries = list(fusion.entries)
    index = first_switching(fusion)
    entries[index] = change(entries[index])
    return replace(fusion, entries=tuple(entries))


def later_switch(entry: Entry) -> Entry:
    starts = (0.0, entry.timeline.starts[1] + 1e-3)
    return replace(entry, timeline=Timeline(starts, entry.timeline.coefficients))


def other_scores(entry: Entry) -> Entry:
    scores = {**entry.scores["klora"], "ratio": entry.scores["klora"]["ratio"] * (1 + 1e-5)}
    return replace(entry, scores={"klora": scores})


def flipped_factor(entry: Entry) -> Entry:
    content = entry.factors["content"]
    up = content.delta.up.clone()
    up[0, 0] += 1e-6
    delta = replace(content.delta, up=up)
    return replace(entry, factors={**entry.factors, "content": replace(content, delta=delta)})


def other_scale(entry: Entry) -> Entry:
    content = entry.factors["content"]
    return replace(entry, factors={**entry.factors, "content": replace(content, scale=1.5)})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (later_switch, "timeline differs"),
        (other_scores, "scores differs"),
        (flipped_factor, "factors of content differs"),
        (other_scale, "scale of content differs"),
        (lambda entry: replace(entry, fate="always style"), "fate differs"),
        (lambda entry: replace(entry, factors={}), "set of stored slots differs"),
    ],
)
def test_an_altered_layer_is_named(
    adapters: tuple[Adapter, Adapter], change: Callable[[Entry], Entry], text: str
) -> None:
    fusion = compile_fusion(*adapters)
    layer = fusion.entries[first_switching(fusion)].layer
    assert differences(with_entry(fusion, change), *adapters) == [f"{layer}.weight: {text}"]


def test_a_missing_and_an_extra_layer_are_named(adapters: tuple[Adapter, Adapter]) -> None:
    fusion = compile_fusion(*adapters)
    first, *rest = fusion.entries
    renamed = replace(first, module="elsewhere")
    assert differences(replace(fusion, entries=(renamed, *rest)), *adapters) == [
        f"{first.component}.elsewhere.weight: is in no source",
        f"{first.layer}.weight: is missing",
    ]


def test_another_gamma_is_noticed(adapters: tuple[Adapter, Adapter]) -> None:
    fusion = compile_fusion(*adapters)
    rule = Rule(fusion.rule.name, fusion.rule.parameters, {"gamma": {"unet": 9.0}})
    found = differences(replace(fusion, rule=rule), *adapters)
    assert found == ["rule.derived: stated and computed values differ"]


def test_parameters_that_are_no_config(adapters: tuple[Adapter, Adapter]) -> None:
    fusion = compile_fusion(*adapters)
    rule = Rule("klora", {**fusion.rule.parameters, "pattern": "z"}, fusion.rule.derived)
    (found,) = differences(replace(fusion, rule=rule), *adapters)
    assert "pattern: expected one of s, s*" in found


def test_an_unknown_rule_is_an_error(adapters: tuple[Adapter, Adapter]) -> None:
    fusion = compile_fusion(*adapters)
    with pytest.raises(KloraError, match="rule later is unknown to this klora"):
        differences(replace(fusion, rule=Rule("later", {}, {})), *adapters)


def test_other_files_are_named_before_any_work(
    adapters: tuple[Adapter, Adapter], tmp_path: Path
) -> None:
    fusion = compile_fusion(*adapters)
    content, style = adapters
    found = differences(fusion, style, content)
    assert [text.split(":")[0] for text in found] == ["sources.content", "sources.style"]
