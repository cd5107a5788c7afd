"""``klora verify --against`` notices each thing that can be wrong about an artifact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.lora_files import peft_keys, random_pair, write_lora
from tiny_pipeline import tiny_lora, tiny_pipeline

from klora_compile import (
    ReadOptions,
    Settings,
    compile_fusion,
    read_adapter,
    verify_fusion,
)
from klora_compile.reading.adapter import Adapter
from klora_compile.rules import Klora, Rule
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.artifact.schedule import Rule as StatedRule
from klora_runtime.artifact.timeline import Timeline
from klora_runtime.errors import KloraError, LoraError

LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Adapter, Adapter]:
    folder = tmp_path_factory.mktemp("loras")
    pipe = tiny_pipeline("sd1")
    content = tiny_lora(pipe, folder / "content.safetensors", seed=1)
    return read_adapter(content), read_adapter(
        tiny_lora(pipe, folder / "style.safetensors", seed=2)
    )


def verified(fusion: Fusion, content: Adapter, style: Adapter) -> list[str]:
    return verify_fusion(fusion, {"content": content, "style": style})


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        (None, None),
        (Klora(semantics="authors", pattern="s*", top_k=7), None),
        (Klora(gamma=2.0), Settings(style_weight=0.5)),
    ],
)
def test_a_fusion_equals_its_sources(
    adapters: tuple[Adapter, Adapter], rule: Rule | None, settings: Settings | None
) -> None:
    assert verified(compile_fusion(*adapters, rule, settings), *adapters) == []


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
    assert verified(with_entry(fusion, change), *adapters) == [f"{layer}.weight: {text}"]


def test_a_missing_and_an_extra_layer_are_named(adapters: tuple[Adapter, Adapter]) -> None:
    fusion = compile_fusion(*adapters)
    first, *rest = fusion.entries
    renamed = replace(first, module="elsewhere")
    assert verified(replace(fusion, entries=(renamed, *rest)), *adapters) == [
        f"{first.component}.elsewhere.weight: is in no source",
        f"{first.layer}.weight: is missing",
    ]


def test_another_gamma_is_noticed(adapters: tuple[Adapter, Adapter]) -> None:
    fusion = compile_fusion(*adapters)
    rule = StatedRule(fusion.rule.name, fusion.rule.parameters, {"gamma": {"unet": 9.0}})
    found = verified(replace(fusion, rule=rule), *adapters)
    assert found == ["rule.derived: stated and computed values differ"]


def test_parameters_that_are_no_config(adapters: tuple[Adapter, Adapter]) -> None:
    fusion = compile_fusion(*adapters)
    rule = StatedRule("klora", {**fusion.rule.parameters, "pattern": "z"}, fusion.rule.derived)
    (found,) = verified(replace(fusion, rule=rule), *adapters)
    assert "pattern: expected one of s, s*" in found


def test_an_unknown_rule_is_an_error(adapters: tuple[Adapter, Adapter]) -> None:
    fusion = compile_fusion(*adapters)
    with pytest.raises(KloraError, match="rule later is unknown to this klora"):
        verified(replace(fusion, rule=StatedRule("later", {}, {})), *adapters)


def test_other_files_are_named_before_any_work(
    adapters: tuple[Adapter, Adapter], tmp_path: Path
) -> None:
    fusion = compile_fusion(*adapters)
    content, style = adapters
    found = verified(fusion, style, content)
    assert [text.split(":")[0] for text in found] == ["sources.content", "sources.style"]


def test_files_are_read_as_they_were_for_the_fusion(tmp_path: Path) -> None:
    """The options of reading are in the artifact; whoever verifies names the files alone."""
    options = ReadOptions(ignore_unknown=True)
    files = {}
    for seed, slot in enumerate(("content", "style")):
        tensors = peft_keys({LAYER: random_pair(8, 6, 2, seed=seed)}) | {"more": torch.ones(1)}
        files[slot] = write_lora(tmp_path / f"{slot}.safetensors", tensors)
    fusion = compile_fusion(files["content"], files["style"], options=options, device="cpu")
    backwards = dict(reversed(files.items()))
    assert verify_fusion(fusion, backwards, device="cpu") == []
    with pytest.raises(LoraError, match="1 of 3 keys cannot be used"):
        compile_fusion(files["content"], files["style"], device="cpu")
