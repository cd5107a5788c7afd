"""A new schedule from an artifact alone: equal to compiling anew, or refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.compiling import compiled, rescheduled
from support.generation import TWO_STEPS, build, generate
from support.lora_files import GOLDEN, peft_keys, random_pair, write_lora
from support.shipped import klora

from klora_compile import drop_unused, verify_fusion
from klora_compile.planning.fates import IDLE
from klora_compile.rules.est import Est
from klora_compile.rules.kit.numbers import LayerNumbers, Side
from klora_compile.sources import by_source
from klora_runtime import apply_fusion, load_fusion, save_fusion
from klora_runtime.artifact.delta import Dense, Stored
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.errors import ConfigError, KloraError

BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
LAYERS = tuple(f"{BLOCK}.to_{name}" for name in ("q", "k", "v", "out.0"))
TEXT = "text_encoder.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """LoRAs of ranks 2 and 3 with alphas; a layer each that the other lacks; a zero delta."""
    folder = tmp_path_factory.mktemp("pair")
    found = []
    for slot, rank, lacks in (("content", 2, LAYERS[3]), ("style", 3, LAYERS[2])):
        names = [name for name in (*LAYERS, TEXT) if name != lacks]
        pairs = {n: random_pair(32, 32, rank, seed=7 * rank + i) for i, n in enumerate(names)}
        pairs |= {f"{BLOCK.replace('attn1', 'attn2')}.to_q": random_pair(32, 32, rank, seed=rank)}
        tensors = peft_keys(pairs) | {f"{n}.alpha": torch.tensor(1.0 + rank) for n in pairs}
        if slot == "style":
            tensors[f"{LAYERS[1]}.lora_B.weight"].zero_()
        found.append(write_lora(folder / f"{slot}.safetensors", tensors))
    return found[0], found[1]


def as_it_is(fusion: Fusion) -> Fusion:
    return fusion


def bytes_of(fusion: Fusion, folder: Path) -> bytes:
    save_fusion(fusion, folder / "x.klora.safetensors", overwrite=True)
    return (folder / "x.klora.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("before", "changes"),
    [
        ({}, {"bias": 0.4}),
        ({}, {"alpha": 1.2, "beta": 0.1}),
        ({}, {"pattern": "s*"}),
        ({"pattern": "s*", "alpha": 2.0}, {"pattern": "s"}),
        ({}, {"gamma": "code", "style_weight": 0.5}),
        ({"semantics": "authors"}, {"gamma": "paper"}),
        (
            {"text_encoder": "none", "unpaired": "drop"},
            {"text_encoder": "style", "unpaired": "keep"},
        ),
        ({}, {"text_encoder": "none", "unpaired": "drop"}),
        ({"top_k": 9}, {"bias": -1.0}),
    ],
)
@pytest.mark.parametrize("keep", [as_it_is, drop_unused])
def test_the_bytes_are_those_of_compiling_anew(
    pair: tuple[Path, Path],
    before: dict[str, Any],
    changes: dict[str, Any],
    keep: Callable[[Fusion], Fusion],
    tmp_path: Path,
) -> None:
    """Where all slots are kept; and where the new schedule needs none that was dropped."""
    save_fusion(keep(compiled(*pair, **before)), tmp_path / "first.klora.safetensors")
    loaded = load_fusion(tmp_path / "first.klora.safetensors")
    wanted = compiled(*pair, **(before | changes))
    stored = {e.path: set(e.factors) for e in loaded.entries}
    if all(set(e.factors) <= stored[e.path] for e in drop_unused(wanted).entries):
        assert bytes_of(keep(rescheduled(loaded, **changes)), tmp_path) == bytes_of(
            keep(wanted), tmp_path
        )
    else:
        assert keep is drop_unused
        with pytest.raises(KloraError, match="need a LoRA that this artifact dropped"):
            rescheduled(loaded, **changes)


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("est", {"d": 0.3}),
        ("direct", {}),
        ("switch", {"steps": 12}),
        ("phases", {"content_phases": "0:1,0.5:0"}),
    ],
)
def test_another_rule_is_compiling_anew_with_it_and_the_way_back_is_exact(
    pair: tuple[Path, Path], rule: str, options: dict[str, Any], tmp_path: Path
) -> None:
    first = compiled(*pair)
    again, wanted = rescheduled(first, rule, **options), compiled(*pair, rule, **options)
    assert again.rule == wanted.rule
    for one, other in zip(again.entries, wanted.entries, strict=True):
        assert (one.fate, set(one.factors)) == (other.fate, set(other.factors))
        assert one.timeline.starts == pytest.approx(other.timeline.starts, rel=1e-9)
        assert one.timeline.coefficients == other.timeline.coefficients
    assert verify_fusion(again, by_source(*pair)) == []
    assert bytes_of(rescheduled(again, "klora"), tmp_path) == bytes_of(first, tmp_path)


def test_all_slots_that_are_not_zero_are_kept(pair: tuple[Path, Path]) -> None:
    fusion = compiled(*pair, text_encoder="none", unpaired="drop", gamma=1e-9)
    for entry in fusion.entries:
        sides = entry.scores["klora"]
        there = {s for s in ("content", "style") if sides[s] and sides[s]["frobenius"] > 0}
        assert set(entry.factors) == there
        assert (entry.fate == IDLE) == (there != set() and not entry.acts)
    assert fusion.components == ("unet",)  # nothing of the text encoder acts
    fates = {entry.layer: entry.fate for entry in fusion.entries}
    assert fates[TEXT] == fates[LAYERS[2]] == IDLE
    assert fates[LAYERS[1]] == "one-sided"


def test_what_is_stored_and_idle_changes_no_model(pair: tuple[Path, Path]) -> None:
    """In both modes a fusion that keeps all slots samples as one that keeps what acts."""
    options = {"text_encoder": "none", "unpaired": "drop", "content_weight": 2.0}
    latents = []
    for fusion in (compiled(*pair, **options), compiled(*pair, **options)):
        for mode in ("merge", "branch"):
            pipe = build(TWO_STEPS)
            with apply_fusion(pipe, fusion, mode=mode) as handle:
                latents.append(generate(pipe, TWO_STEPS))
                assert handle.report().components == ("unet",)
    assert torch.equal(latents[0], latents[2])
    assert torch.allclose(latents[1], latents[3], atol=1e-6)


def test_factors_are_the_same_tensors_and_a_handle_swaps_to_them(pair: tuple[Path, Path]) -> None:
    first = compiled(*pair)
    other = rescheduled(first, "direct", style_weight=0.5)
    for one, two in zip(first.entries, other.entries, strict=True):
        for slot, factors in two.factors.items():
            assert factors is one.factors[slot]
    wanted = build(TWO_STEPS)
    with apply_fusion(wanted, compiled(*pair, "direct", style_weight=0.5), mode="merge"):
        expected = generate(wanted, TWO_STEPS)
    pipe = build(TWO_STEPS)
    with apply_fusion(pipe, first, mode="merge") as handle:
        before = generate(pipe, TWO_STEPS)
        handle.swap(other)
        assert torch.equal(generate(pipe, TWO_STEPS), expected)
        handle.swap(first)
        assert torch.equal(generate(pipe, TWO_STEPS), before)
    assert not torch.equal(before, expected)


@pytest.mark.parametrize(
    ("before", "rule", "changes", "message"),
    [
        (
            ("klora", {}),
            None,
            {"top_k": 3},
            "attn1.to_k was measured over its 6 largest weights; these",
        ),
        (
            ("klora", {}),
            None,
            {"semantics": "authors"},
            "alpha ignored; this artifact",
        ),
        (("klora", {"semantics": "authors"}), "direct", {}, "alpha applied; this"),
        (
            ("est", {}),
            "klora",
            {},
            "rule klora needs l1 and top_k of each layer; this",
        ),
        (("np", {}), None, {"mu": 1.0}, "(NP-LoRA, mu = 0.5), rule np with these settings needs"),
        (("np", {}), "direct", {}, "rule direct with these settings needs the LoRA as given"),
        (("klora", {}), "np", {}, "slot content is the LoRA as given, rule np with these settings"),
        (("np", {}), "np+klora", {}, "rule np+klora needs l1 and top_k"),
        (("klora", {}), None, {"tau": 3}, "tau: rule klora has no such setting"),
        (("klora", {}), "later", {}, "rule: expected one of klora, est"),
        (("klora", {}), None, {"bias": 2}, "bias: expected a number from -1 to 1"),
    ],
)
def test_what_needs_the_sources_is_refused_by_name(
    pair: tuple[Path, Path],
    before: tuple[str, dict[str, Any]],
    rule: str | None,
    changes: dict[str, Any],
    message: str,
) -> None:
    fusion = compiled(*pair, before[0], **before[1])
    with pytest.raises(ConfigError) as caught:
        rescheduled(fusion, rule, **changes)
    assert message in str(caught.value)


def test_np_klora_may_change_its_schedule(pair: tuple[Path, Path], tmp_path: Path) -> None:
    first = compiled(*pair, "np+klora", mu=2.0)
    wanted = compiled(*pair, "np+klora", mu=2.0, bias=0.5, pattern="s*")
    again = rescheduled(first, bias=0.5, pattern="s*")
    assert bytes_of(again, tmp_path) == bytes_of(wanted, tmp_path)
    assert rescheduled(first, "np", mu=2.0).rule.name == "np"


def test_missing_slots_are_all_named(pair: tuple[Path, Path]) -> None:
    fusion = drop_unused(compiled(*pair, gamma=1e-9))
    with pytest.raises(KloraError) as caught:
        rescheduled(fusion, "direct")
    assert caught.value.issues == tuple(
        f"{name}: style" for name in (LAYERS[0], f"{BLOCK.replace('attn1', 'attn2')}.to_q")
    )
    assert "2 layers need a LoRA that this artifact dropped there" in str(caught.value)
    assert "without --drop-unused" in str(caught.value)


def test_artifacts_without_what_is_needed_are_refused(pair: tuple[Path, Path]) -> None:
    """Older ones lack Frobenius norms; others may state anything as scores."""
    with pytest.raises(ConfigError, match="the rule's parameters lack semantics, top_k"):
        rescheduled(load_fusion(GOLDEN), bias=0.5)
    fusion = compiled(*pair)

    def with_scores(change: Any) -> Fusion:
        entries = [replace(e, scores={"klora": change(e.scores["klora"])}) for e in fusion.entries]
        return replace(fusion, entries=tuple(entries))

    def older(scores: dict[str, Any]) -> dict[str, Any]:
        sides = {s: scores[s] and {**scores[s]} for s in ("content", "style")}
        for side in sides.values():
            if side:
                side.pop("frobenius", None)
        return {**scores, **sides}

    assert rescheduled(with_scores(older), bias=0.5).rule.parameters["bias"] == 0.5
    with pytest.raises(ConfigError, match="rule est needs frobenius of each layer"):
        rescheduled(with_scores(older), "est")
    for strange in ({"content": 3, "style": None}, {"content": {"l1": 1.0}, "style": None}):
        with pytest.raises(KloraError, match="has no usable scores of rule klora; compile"):
            rescheduled(with_scores(lambda _, strange=strange: strange), bias=0.5)
    bare = replace(fusion, entries=tuple(replace(e, scores={}) for e in fusion.entries))
    with pytest.raises(KloraError, match="has no usable scores of rule klora; compile"):
        rescheduled(bare, bias=0.5)


def test_recompile_on_the_command_line(pair: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = (tmp_path / f"{name}.klora.safetensors" for name in ("first", "second"))
    assert klora("compile", *pair, "-o", first).exit_code == 0
    result = klora("recompile", first, "-o", second, "--bias", 0.2, "--alpha", 1.2, "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    parameters = facts["rule"]["parameters"]
    assert (parameters["bias"], parameters["alpha"]) == (0.2, 1.2)
    wanted = compiled(*pair, bias=0.2, alpha=1.2)
    assert second.read_bytes() == bytes_of(wanted, tmp_path)
    refused = klora("recompile", first, "-o", second, "--rule", "direct")
    assert "add --force" in refused.stderr
    text = klora("recompile", first, "-o", second, "--rule", "direct", "--force").stdout
    assert "direct, constant weights" in text
    assert "rescheduled  in " in text
    assert "gamma" not in text
    lean = klora(
        "recompile", second, "-o", first, "--bias", 1, "--rule", "klora", "--drop-unused", "--force"
    )
    assert lean.exit_code == 0, lean.stderr
    assert bytes_of(drop_unused(compiled(*pair, bias=1.0)), tmp_path) == first.read_bytes()
    refused = klora("recompile", first, "-o", second, "--force", "--bias", 0)
    assert "layers need a LoRA that this artifact dropped there" in refused.stderr
    assert klora("recompile", second, "-o", first, "--rule", "direct", "--force").exit_code == 0
    refused = klora("recompile", first, "-o", second, "--force", "--tau", 3)
    assert (refused.exit_code, "rule direct has no such setting" in refused.stderr) == (2, True)
    assert klora("recompile", first, "-o", first, "--force").exit_code == 2


def test_idle_slots_cost_nothing_at_run_time(pair: tuple[Path, Path]) -> None:
    """Nor do they decide anything: an idle dense slot does not keep a layer from branching."""
    options = {"gamma": 1e-9, "content_weight": 2.0, "text_encoder": "none"}
    whole = compiled(*pair, **options)
    lean = drop_unused(whole)
    dense = []
    for entry in whole.entries:
        factors = dict(entry.factors)
        if "style" in factors and not entry.timeline.uses("style"):
            style = factors["style"]
            factors["style"] = Stored(style.scale, Dense(style.delta.matrix(torch.float32)))
        dense.append(replace(entry, factors=factors))
    styles = [entry.factors["style"] for entry in dense if "style" in entry.factors]
    assert any(isinstance(style.delta, Dense) for style in styles)
    reports = []
    for fusion in (lean, whole, replace(whole, entries=tuple(dense))):
        for mode in ("merge", "branch"):
            with apply_fusion(build(TWO_STEPS), fusion, mode=mode) as handle:
                reports.append(handle.report())
    for first, other in zip(reports[:2] * 2, reports[2:], strict=True):
        assert (first.nbytes, first.layers) == (other.nbytes, other.layers)


@pytest.mark.parametrize(
    ("name", "value"), [("l1", -5.0), ("top_k", 0.0), ("frobenius", 0.0), ("l1", "much")]
)
def test_scores_that_no_measure_gives_are_refused(
    name: str, value: Any, pair: tuple[Path, Path]
) -> None:
    fusion = compiled(*pair)
    entries = []
    for entry in fusion.entries:
        scores = dict(entry.scores["klora"])
        if entry.fate == "switching":
            scores["style"] = {**scores["style"], name: value}
        entries.append(replace(entry, scores={"klora": scores}))
    assert any(entry.fate == "switching" for entry in entries)
    with pytest.raises(KloraError, match="has no usable scores of rule klora; compile"):
        rescheduled(replace(fusion, entries=tuple(entries)), bias=0.1)


def test_energies_that_vanish_are_no_crash() -> None:
    tiny, small = (Side(rank=1, scaling=1.0, frobenius=value) for value in (1e-200, 1e-190))
    layer = LayerNumbers("unet", None, {"content": tiny, "style": small})
    assert Est().choose(layer, {}).ratio is None


def test_what_was_not_compared_is_said(pair: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "direct.klora.safetensors"
    text = "sums of an earlier rule, which were not compared"
    for fusion, said in (
        (compiled(*pair, "direct"), False),
        (rescheduled(compiled(*pair), "direct"), True),
    ):
        save_fusion(fusion, path, overwrite=True)
        result = klora("verify", path, "--against", *pair)
        assert result.exit_code == 0, result.output
        assert (text in result.stdout) == said
