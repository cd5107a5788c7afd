"""More than two LoRAs: which slots there are, and that each rule does with them what it says."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compiling import compiled, rescheduled
from support.lora_files import peft_keys, random_pair, write_lora
from support.shipped import klora

from klora_compile import Settings, compile_fusion, read_adapter, verify_fusion
from klora_compile.planning.pairing import check_slots
from klora_compile.planning.plan import make_plan
from klora_compile.report.plot import plot_schedule
from klora_compile.report.schedule_map import text_map
from klora_compile.rules import Direct, Klora
from klora_compile.rules.kit.numbers import LayerNumbers, Side
from klora_compile.settings.config import Config
from klora_compile.slots import in_order, slot_names
from klora_compile.sources import by_source
from klora_runtime import load_fusion, save_fusion
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.artifact.timeline import progress_of_step
from klora_runtime.errors import ConfigError, PairingError

BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
NAMES = tuple(f"{BLOCK}.to_{name}" for name in ("q", "k", "v"))
ONLY_FIRST, ONLY_TWO = f"{BLOCK}.to_out.0", "unet.mid_block.attentions.0.proj_in"
RANKS = {"content.1": 2, "content.2": 3, "style": 4}
STEPS = [progress_of_step(i, n) for n in range(1, 51) for i in range(n)]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three LoRAs of three common layers; one layer only the first has, one the first two."""
    folder = tmp_path_factory.mktemp("many")
    found = {}
    for i, (slot, rank) in enumerate(RANKS.items()):
        layers = [*NAMES, *([ONLY_FIRST] if i == 0 else []), *([ONLY_TWO] if i < 2 else [])]
        pairs = {n: random_pair(12, 10, rank, seed=10 * i + j) for j, n in enumerate(layers)}
        found[slot] = write_lora(folder / f"{slot}.safetensors", peft_keys(pairs))
    return found


def three(paths: dict[str, Path], rule: str = "klora", **options: Any) -> Fusion:
    contents = [paths["content.1"], paths["content.2"]]
    return compiled(contents, paths["style"], rule, **options)


def dense(paths: dict[str, Path]) -> dict[str, dict[str, torch.Tensor]]:
    return {
        slot: {name: layer.delta.matrix() for name, layer in read_adapter(path).layers.items()}
        for slot, path in paths.items()
    }


# --- K-LoRA -----------------------------------------------------------------------------------


def literal_winner(
    deltas: dict[str, dict[str, torch.Tensor]], sums: dict[str, float], name: str, t: float
) -> str:
    """The largest of topK_j / L1_j, styles times S(t)."""
    own = {slot: layers[name] for slot, layers in deltas.items() if name in layers}
    one, other = sorted((RANKS[slot] for slot in own), reverse=True)[:2]
    scores = {}
    for slot, delta in own.items():
        top = float(delta.abs().flatten().topk(one * other).values.sum())
        scores[slot] = top / sums[slot] * (1.5 * t + 0.5 if slot == "style" else 1.0)
    return max(scores, key=lambda slot: scores[slot])


def test_three_are_the_literal_largest_at_every_step(paths: dict[str, Path]) -> None:
    deltas = dense(paths)
    sums = {s: sum(float(own[n].abs().sum()) for n in NAMES) for s, own in deltas.items()}
    fusion = three(paths)
    found = {entry.layer: entry for entry in fusion.entries}
    assert [found[n].scores["klora"]["k"] for n in (*NAMES, ONLY_TWO)] == [12, 12, 12, 6]
    for slot, stated in fusion.rule.derived["l1.unet"].items():
        assert stated == pytest.approx(sums[slot], rel=1e-6)
    winners = set()
    for name in (*NAMES, ONLY_TWO):
        for t in STEPS:
            acting = {slot: c for slot, c in found[name].timeline.at(t).items() if c}
            winner = literal_winner(deltas, sums, name, t)
            assert acting == {winner: 1.0}, (name, t)
            winners.add(winner)
    assert winners == set(RANKS)
    assert found[ONLY_FIRST].fate == "one-sided"
    assert found[ONLY_TWO].fate == "always content"
    assert "switching" in {found[name].fate for name in NAMES}


positive = st.floats(1e-3, 1e3)
layers = st.lists(st.tuples(positive, positive, positive, positive), min_size=1, max_size=5)


def sides(*slots: str, rows: list[tuple[float, float, float, float]]) -> dict[str, LayerNumbers]:
    """Layers whose i-th slot has the i-th Top-K sum and L1 norm of each row, in turns."""
    numbers = {}
    for index, row in enumerate(rows):
        pairs = {s: (row[2 * (i % 2)], row[2 * (i % 2) + 1]) for i, s in enumerate(slots)}
        own = {s: Side(2, 1.0, 1.0, l1=l1, top_k=top) for s, (top, l1) in pairs.items()}
        numbers[f"unet.{index}"] = LayerNumbers("unet", 4, own)
    return numbers


@settings(max_examples=60, deadline=None)
@given(rows=layers, pattern=st.sampled_from(["s", "s*"]), bias=st.sampled_from([0.0, 0.5]))
def test_a_third_that_never_wins_leaves_the_duel_of_the_paper(
    rows: list[tuple[float, float, float, float]], pattern: Any, bias: float
) -> None:
    """Two of three are the two-LoRA rule to the last bit: breakpoints, ratios, ties."""
    config = Config(Klora(pattern=pattern, bias=bias))
    two = make_plan(sides("content", "style", rows=rows), config)
    numbers = {
        name: LayerNumbers(
            "unet",
            4,
            {
                "content.1": layer.sides["content"],
                "content.2": Side(2, 1.0, 1.0, l1=1e12, top_k=1e-12),
                "style": layer.sides["style"],
            },
        )
        for name, layer in sides("content", "style", rows=rows).items()
    }
    many = make_plan(numbers, config)
    for name, plan in two.layers.items():
        other = many.layers[name]
        assert (other.fate, other.timeline.starts) == (plan.fate, plan.timeline.starts)
        assert other.timeline.coefficients["content.1"] == plan.timeline.coefficients["content"]
        assert other.timeline.coefficients["style"] == plan.timeline.coefficients["style"]
        assert not other.timeline.uses("content.2")
        assert other.scores["ratio"] == plan.scores["ratio"]


def equal_layer(*slots: str) -> dict[str, LayerNumbers]:
    side = Side(2, 1.0, 1.0, l1=8.0, top_k=2.0)
    return {"unet.x": LayerNumbers("unet", 4, dict.fromkeys(slots, side))}


@pytest.mark.parametrize(("semantics", "role"), [("paper", "content"), ("authors", "style")])
def test_ties_go_to_the_role_that_the_semantics_say_and_then_to_the_first(
    semantics: Any, role: str
) -> None:
    config = Config(Klora(semantics=semantics, alpha=0.0, beta=1.0, gamma="paper"))
    slots = slot_names(2, 2)
    timeline = make_plan(equal_layer(*slots), config).layers["unet.x"].timeline
    assert [slot for slot in slots if timeline.uses(slot)] == [f"{role}.1"]


def test_a_lora_that_cannot_be_weighed_is_named(tmp_path: Path) -> None:
    """Zero in the layers that all have, not zero where it meets one other."""
    paths = []
    for i in range(3):
        pairs = {NAMES[0]: random_pair(8, 6, 2, seed=i)}
        if i == 1:
            pairs = {NAMES[0]: (pairs[NAMES[0]][0], 0 * pairs[NAMES[0]][1])}
        if i > 0:
            pairs[NAMES[1]] = random_pair(8, 6, 2, seed=9 + i)
        paths.append(write_lora(tmp_path / f"{i}.safetensors", peft_keys(pairs)))
    with pytest.raises(PairingError, match=r"gamma is undefined for the LoRA content\.2 in unet"):
        compile_fusion(paths[:2], paths[2], device="cpu")


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("klora", {"gamma": "code"}, "gamma: expected paper for more than two LoRAs, found 'code'"),
        ("klora", {"gamma": 2.0}, "gamma: expected paper for more than two LoRAs, found 2.0"),
        (
            "est",
            {},
            "rule est takes 2 LoRAs, found 3; take another rule: klora, soft, direct, level",
        ),
        ("np", {}, "rule np takes 2 LoRAs, found 3"),
        ("np+klora", {}, "rule np+klora takes 2 LoRAs, found 3"),
        (
            "direct",
            {"weights": {"content": 1}},
            "weights: expected content.1 or content.2 or style, found 'content'",
        ),
        (
            "phases",
            {"slot_phases": {"x": "0:1"}},
            "slot_phases: there is no LoRA 'x'; name one of content",
        ),
    ],
)
def test_what_does_not_go_with_three_is_named(
    paths: dict[str, Path], rule: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        three(paths, rule, **options)
    assert message in str(caught.value)


def test_roles_that_a_rule_needs(paths: dict[str, Path]) -> None:
    contents = [paths["content.1"], paths["content.2"]]
    with pytest.raises(ConfigError, match=r"needs a content and a style, found content\.1"):
        compile_fusion(contents, [], device="cpu")
    with pytest.raises(ConfigError, match="needs two LoRAs or more, found 1; name another or take"):
        compile_fusion(contents[:1], [], Klora(), device="cpu")
    with pytest.raises(ConfigError, match="rule direct needs a LoRA, found 0; name another"):
        compile_fusion([], [], Direct(), device="cpu")
    fusion = compile_fusion(contents, [], Direct(), device="cpu")
    assert set(fusion.slots) == {"content.1", "content.2"}


def test_whole_loras_need_no_common_layer_but_one_family(tmp_path: Path) -> None:
    one = write_lora(tmp_path / "a.safetensors", peft_keys({NAMES[0]: random_pair(8, 6, 2)}))
    two = write_lora(tmp_path / "b.safetensors", peft_keys({NAMES[1]: random_pair(8, 6, 2)}))
    fusion = compile_fusion(one, two, Direct(), device="cpu")
    assert [set(entry.factors) for entry in fusion.entries] == [{"style"}, {"content"}]
    flux, wan = (
        {f"{name}.lora_down.weight": torch.ones(2, 16), f"{name}.lora_up.weight": torch.ones(16, 2)}
        for name in (
            "lora_unet_double_blocks_0_img_attn_proj",
            "diffusion_model.blocks.0.self_attn.q",
        )
    )
    wan |= {k.replace(".0.", f".{i}."): v.clone() for k, v in wan.items() for i in (1, 2)}
    flux |= {k.replace("_attn_proj", "_mod_lin"): v.clone() for k, v in flux.items()}
    files = [write_lora(tmp_path / f"{i}", t) for i, t in enumerate((flux, wan))]
    files = [path.rename(path.with_suffix(".safetensors")) for path in files]
    with pytest.raises(PairingError, match=r"for different models.* is for FLUX\.1, STYLE"):
        compile_fusion(*files, Direct(), device="cpu")


# --- the other rules --------------------------------------------------------------------------


def test_switch_cycles_through_all_in_their_order(paths: dict[str, Path]) -> None:
    found = {e.layer: e for e in three(paths, "switch", steps=20, tau=2).entries}
    for index in range(20):
        turn = tuple(RANKS)[(index // 2) % 3]
        row = found[NAMES[0]].timeline.at(progress_of_step(index, 20))
        assert {slot for slot, value in row.items() if value} == {turn}
        only = found[ONLY_FIRST].timeline.at(progress_of_step(index, 20))
        assert only["content.1"] == float(turn == "content.1")


def test_weights_and_phases_of_single_loras(paths: dict[str, Path]) -> None:
    phases = {"content_phases": "0:1,0.5:2", "slot_phases": {"content.2": "0:0,0.25:1"}}
    fusion = three(paths, "phases", **phases, weights={"content.1": 0.5}, content_weight=3.0)
    entry = next(e for e in fusion.entries if e.layer == NAMES[0])
    assert [(start, *row.values()) for start, row in entry.timeline.rows()] == [
        (0.0, 1.5, 0.0, 1.0),
        (0.25, 1.5, 3.0, 1.0),
        (0.5, 3.0, 3.0, 1.0),
    ]


# --- files, reports, commands -----------------------------------------------------------------


def test_slots_are_in_order_beyond_nine() -> None:
    names = slot_names(11, 1)
    assert names[:2] == ("content.1", "content.2")
    assert names[-1] == "style"
    assert in_order(sorted(names)) == names
    assert slot_names(1, 1) == ("content", "style")
    long = ("content.2", f"content.{'1' * 5000}", f"content.{'2' * 5000}")
    assert in_order(reversed(long)) == long


def test_three_survive_a_file_and_are_verified(paths: dict[str, Path], tmp_path: Path) -> None:
    fusion = three(paths)
    save_fusion(fusion, tmp_path / "a.klora.safetensors")
    read = load_fusion(tmp_path / "a.klora.safetensors", check="full")
    assert {name: slot.role for name, slot in read.slots.items()} == {
        "content.1": "content",
        "content.2": "content",
        "style": "style",
    }
    adapters = [read_adapter(path) for path in paths.values()]
    assert verify_fusion(read, by_source(adapters[:2], adapters[2])) == []
    for wrong in permutations(adapters):
        if wrong != tuple(adapters):
            assert verify_fusion(read, by_source(wrong[:2], wrong[2])) != []
    missing, *_ = verify_fusion(read, by_source(adapters[0], adapters[2]))
    assert missing.startswith("sources.content.1: no LoRA")


def test_maps_and_pictures_show_every_slot(paths: dict[str, Path], tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("klora", {}, "C"),
        ("direct", {"unpaired": "drop"}, "="),
        ("switch", {"steps": 3, "tau": 1}, "A"),
    ]
    for rule, options, mark in cases:
        fusion = three(paths, rule, **options)
        drawn = click.unstyle(text_map(fusion, 30))
        assert mark in drawn.splitlines()[0].split()[1]
        for name in ("A content.1", "B content.2", "C style"):
            assert name in drawn
        plot_schedule(fusion, tmp_path / "map.png", overwrite=True)
        assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_three_on_the_command_line(paths: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "three.klora.safetensors"
    named = ["--style", paths["style"]]
    for slot in ("content.1", "content.2"):
        named += ["--content", paths[slot]]
    result = klora("compile", *named, "-o", output, "--weight", "content.2=0.5")
    assert result.exit_code == 0, result.stderr
    assert "CONTENT.2 used" in result.stdout
    found = json.loads(klora("inspect", output, "--json").stdout)
    assert list(found["slots"]) == list(RANKS)
    assert found["rule"]["parameters"]["weights"] == {"content.2": 0.5}
    first = next(v for v in found["layers"] if v["name"] == NAMES[0])
    assert first["content.2_rank"] == 3
    card = klora("card", output, "-o", "-").stdout
    assert "2 LoRAs of subjects and a LoRA of a style in one file" in card
    assert "| content.2 |" in card
    good = klora("verify", output, "--against", *paths.values())
    assert (good.exit_code, good.stderr) == (0, "")
    for wrong, text in (
        ([paths["style"]], "was compiled from 3 LoRAs (content.1, content.2, style), 1 were named"),
        ([paths["style"], *list(paths.values())[:2]], "is not what"),
    ):
        refused = klora("verify", output, "--against", *wrong)
        assert refused.exit_code in (1, 2)
        assert text in refused.stderr
    refused = klora("verify", output, *paths.values())
    assert (refused.exit_code, "together with --against" in refused.stderr) == (2, True)


def test_loras_are_named_in_one_way(paths: dict[str, Path], tmp_path: Path) -> None:
    a, b, c = paths.values()
    output = ("-o", tmp_path / "x.klora.safetensors")
    for named, text in (
        ((a, b, "--style", c), "name the LoRAs as CONTENT STYLE or with --content and --style"),
        ((), "expected CONTENT STYLE, or one LoRA alone, found 0 LoRAs"),
        ((a, b, c), "alone, found 3 LoRAs; name more with --content"),
        (("--content", a, "--style", c, "--style", a), "are one file; name two LoRAs"),
        (("--content", a, "--rule", "klora"), "rule klora needs two LoRAs or more, found 1"),
    ):
        refused = klora("compile", *named, *output)
        assert refused.exit_code == 2
        assert text in refused.stderr


def test_settings_of_one_lora_leave_the_others_as_they_were(paths: dict[str, Path]) -> None:
    fusion = three(paths, "phases", weights={"content.1": 0.5})
    other = rescheduled(fusion, weights={"content.2": 0.3}, slot_phases={"style": "0:0.2"})
    assert other.rule.parameters["weights"] == {"content.1": 0.5, "content.2": 0.3}
    last = rescheduled(other, slot_phases={"content.1": "0:0.7"})
    assert set(last.rule.parameters["slot_phases"]) == {"style", "content.1"}


def test_turns_that_leave_a_lora_out_are_refused(paths: dict[str, Path]) -> None:
    with pytest.raises(
        ConfigError,
        match="tau: 10 steps in turns of 5 end before the turn of style; set tau to 3 or",
    ):
        three(paths, "switch", steps=10)
    assert three(paths, "switch", steps=10, tau=3).rule.parameters["tau"] == 3


def test_more_loras_than_an_artifact_holds_are_refused() -> None:
    with pytest.raises(ConfigError, match="a fusion takes at most 64 LoRAs, found 65"):
        check_slots(slot_names(64, 1), Direct(), Settings())
