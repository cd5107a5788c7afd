"""Auto: what is measured of LoRAs together, what is picked by it, and where that is stated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.compiling import compiled, rescheduled
from support.lora_files import peft_keys, random_pair, write_lora
from support.shipped import klora

from klora_compile import read_adapter, verify_fusion
from klora_compile.measuring.together import measured_together
from klora_compile.rules.auto import Auto
from klora_compile.rules.kit.picking import Together
from klora_compile.settings.config import Config
from klora_compile.sources import by_source
from klora_runtime.errors import ConfigError

BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
QUERY, KEY, VALUE = (f"{BLOCK}.to_{name}" for name in ("q", "k", "v"))
CONV = "unet.down_blocks.0.resnets.0.conv1"
TEXT = "text_encoder.encoder.layers.0.mlp.fc1"
SHAPES: dict[str, tuple[int, int, tuple[int, ...]]] = {
    QUERY: (24, 32, ()),
    KEY: (24, 30, ()),
    VALUE: (20, 30, ()),
    CONV: (16, 8, (3, 3)),
    TEXT: (5, 7, ()),
}


def written(
    path: Path,
    seed: int,
    *,
    rank: int = 2,
    like: int | None = None,
    part: str = "",
    lacks: str = "",
) -> Path:
    """A LoRA; one or both of its factors are those of the one of seed ``like``."""
    tensors = {}
    for i, (name, (out, width, kernel)) in enumerate(SHAPES.items()):
        if name == lacks:
            continue
        down, up = random_pair(out, width, rank, seed=100 * seed + i, kernel=kernel)
        if like is not None:
            theirs = random_pair(out, width, rank, seed=100 * like + i, kernel=kernel)
            down = theirs[0] if "down" in part else down
            up = theirs[1] if "up" in part else up
        tensors |= peft_keys({name: (down, up)}) | {f"{name}.alpha": torch.tensor(1.0 + seed)}
    return write_lora(path, tensors)


def literal(content: Path, style: Path) -> dict[str, float]:
    """The numbers from dense deltas, by projectors from their SVD."""
    layers = [read_adapter(path).layers for path in (content, style)]
    names = [name for name in layers[0] if name in layers[1] and name != TEXT]
    c, s = ([own[n].scaling * own[n].delta.matrix() for n in names] for own in layers)
    one, other = (torch.cat([each.flatten() for each in deltas]) for deltas in (c, s))
    kept, chance = {"inputs": 0.0, "outputs": 0.0}, {"inputs": 0.0, "outputs": 0.0}
    for mine, yours in zip(c, s, strict=True):
        left, sizes, right = torch.linalg.svd(yours, full_matrices=False)
        count = int((sizes > 1e-6 * sizes[0]).sum())
        ins, outs = right[:count].T @ right[:count], left[:, :count] @ left[:, :count].T
        energy = float(mine.square().sum())
        kept["inputs"] += float((mine @ ins).square().sum())
        kept["outputs"] += float((outs @ mine).square().sum())
        chance["inputs"] += energy * count / mine.shape[1]
        chance["outputs"] += energy * count / mine.shape[0]
    energy, norms = float(one.square().sum()), (float(one.norm()), float(other.norm()))
    return {
        "layers": len(names),
        "ratio": max(norms) / min(norms),
        "growth": float((one + other).norm()) / max(norms),
        "cosine": float(one @ other) / (norms[0] * norms[1]),
        **{side: value / energy for side, value in kept.items()},
        **{f"{side}_by_chance": value / energy for side, value in chance.items()},
    }


@pytest.mark.parametrize("part", ["", "down", "up", "down up"])
def test_numbers_are_those_of_dense_deltas(tmp_path: Path, part: str) -> None:
    content = written(tmp_path / "content", 1, lacks=VALUE)
    style = written(tmp_path / "style", 2, rank=3 if not part else 2, like=1, part=part)
    layers = {
        slot: read_adapter(path).layers for slot, path in (("content", content), ("style", style))
    }
    found, wanted = measured_together(layers).numbers(), literal(content, style)
    assert found.keys() == wanted.keys()
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    if "down" in part:
        assert found["inputs"] == pytest.approx(1.0)
    if part == "down up":
        assert found["cosine"] == pytest.approx(1.0)


def test_loras_without_a_common_weight_and_of_zero_have_no_numbers(tmp_path: Path) -> None:
    one = read_adapter(written(tmp_path / "one", 1)).layers
    text = {TEXT: one[TEXT]}
    assert measured_together({"content": one, "style": text}) == Together(("content", "style"), 0)
    zero = {name: replace(layer, scaling=0.0) for name, layer in one.items()}
    found = measured_together({"content": zero, "style": one})
    assert (found.ratio, found.growth, found.cosine, found.inputs) == (0.0, 1.0, 0.0, 0.0)
    three = measured_together({"content.1": one, "content.2": one, "style": one})
    assert (three.growth, three.cosine) == (pytest.approx(3.0), pytest.approx(1.0))
    assert three.inputs == 0.0


PAIR = Together(("content", "style"), 9, ratio=1.5, growth=1.3, inputs=0.2)


@pytest.mark.parametrize(
    ("together", "rule", "why"),
    [
        (PAIR, "direct", "no number speaks against the plain sum"),
        (replace(PAIR, ratio=80.0), "direct", "no number speaks against the plain sum"),
        (replace(PAIR, slots=("content",)), "direct", "there is one LoRA"),
        (replace(PAIR, layers=0, growth=2.0), "direct", "no two LoRAs change the same weight"),
        (replace(PAIR, growth=1.7, inputs=0.9), "auto-strength", "the sum is 1.70 times as strong"),
        (
            replace(PAIR, inputs=0.7, inputs_by_chance=0.1),
            "np",
            "70% of the content is on inputs that the style uses, 10% would be by chance",
        ),
        (replace(PAIR, inputs=0.9, inputs_by_chance=0.5), "direct", "no number speaks"),
        # Of 110 judged pairs, the one that shares most: NP-LoRA did not beat the sum on these.
        (replace(PAIR, inputs=0.45, inputs_by_chance=0.03), "direct", "no number speaks"),
        (replace(PAIR, slots=("content.1", "content.2", "style"), inputs=0.9), "direct", "no num"),
    ],
)
def test_the_first_condition_that_holds_picks(together: Together, rule: str, why: str) -> None:
    found = Auto().pick(together)
    assert found.rule.name == rule
    assert found.why.startswith(why)


LIKE: dict[str, dict[str, Any]] = {
    "direct": {},
    "np": {"like": 1, "part": "down"},
    "auto-strength": {"like": 1, "part": "down up"},
}


@pytest.fixture
def pair(tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """LoRAs for which this rule is picked."""

    def make(rule: str) -> tuple[Path, Path]:
        seed = 1 if rule == "auto-strength" else 2
        content = written(tmp_path / "content.safetensors", 1, lacks=VALUE)
        return content, written(tmp_path / "style.safetensors", seed, **LIKE[rule])

    return make


@pytest.mark.parametrize("rule", LIKE)
def test_the_pick_is_what_its_rule_makes_and_is_repeated(
    pair: Callable[[str], tuple[Path, Path]], rule: str, tmp_path: Path
) -> None:
    content, style = pair(rule)
    fusion = compiled(content, style, "auto", style_weight=0.5)
    own = compiled(content, style, rule, style_weight=0.5)
    assert fusion.rule.name == rule
    picked = fusion.rule.parameters["picked"]
    assert picked["by"] == "auto"
    assert picked["growth"] == pytest.approx(literal(content, style)["growth"], rel=1e-6)
    assert fusion.slots == own.slots
    for mine, yours in zip(fusion.entries, own.entries, strict=True):
        assert (mine.timeline, mine.scores) == (yours.timeline, yours.scores)
    assert Config.of_fusion(fusion).parameters() == fusion.rule.parameters
    sources = by_source(content, style)
    assert verify_fusion(fusion, sources) == []
    # other settings of all rules keep the pick, another rule does not
    kept = rescheduled(fusion, None, style_weight=2.0)
    assert kept.rule.parameters["picked"] == picked
    assert verify_fusion(kept, sources) == []
    with pytest.raises(ConfigError, match="rule auto measures the LoRAs together, which an artif"):
        rescheduled(fusion, "auto")


def test_another_rule_or_another_reason_is_noticed(
    pair: Callable[[str], tuple[Path, Path]],
) -> None:
    content, style = pair("auto-strength")
    sources = by_source(content, style)
    fusion = compiled(content, style, "auto")
    plain = rescheduled(fusion, "direct")
    assert "picked" not in plain.rule.parameters
    assert verify_fusion(plain, sources) == []
    picked = fusion.rule.parameters["picked"]
    claimed = replace(plain.rule, parameters={**plain.rule.parameters, "picked": picked})
    assert verify_fusion(replace(plain, rule=claimed), sources) == [
        "rule: stated direct, picked auto-strength"
    ]
    for part in ({"why": "it is new"}, {"growth": 1.0}, {"by": "klora"}, {"by": "nobody"}):
        stated = {**fusion.rule.parameters, "picked": {**picked, **part}}
        found = verify_fusion(
            replace(fusion, rule=replace(fusion.rule, parameters=stated)), sources
        )
        assert found[0].startswith("rule")


def test_the_reason_is_printed(pair: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    content, style = pair("np")
    artifact = tmp_path / "auto.klora"
    command = ("compile", content, style, "-o", artifact, "--rule", "auto", "--no-cache")
    said = "by rule auto: 100% of the content is on inputs that the style uses"
    for shown in (klora(*command), klora("inspect", artifact), klora("card", artifact, "-o", "-")):
        assert shown.exit_code == 0, shown.output
        assert said in shown.stdout or "why 100% of the content" in shown.stdout
    assert "good" in klora("verify", artifact, "--against", content, style).stdout


def test_one_lora_alone_and_several_are_taken(
    pair: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    content, style = pair("direct")
    assert compiled(content, (), "auto").rule.name == "direct"
    third = written(tmp_path / "third.safetensors", 5)
    found = compiled([content, third], style, "auto")
    assert (found.rule.name, set(found.slots)) == (
        "auto-strength" if found.rule.parameters["picked"]["growth"] > 1.6 else "direct",
        {"content.1", "content.2", "style"},
    )
