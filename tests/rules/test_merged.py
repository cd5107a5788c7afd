"""Rules that merge to one slot, against literal versions of them, number by number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.applying import Apply
from support.compiling import compiled, rescheduled
from support.few_layers import CONV, KEY, QUERY, SHAPES, TEXT, VALUE
from support.generation import Case, build, generate
from support.lora_files import peft_keys, random_pair, write_lora
from support.shipped import klora
from tiny_pipeline import relative_difference, tiny_lora

from klora_compile import drop_unused, verify_fusion
from klora_compile.export import ExportSettings, export_static
from klora_compile.report.summary import summarise, summary_lines
from klora_compile.rules.kit.chance import chances
from klora_compile.rules.kit.truncating import truncated
from klora_compile.settings.config import Config
from klora_compile.sources import by_source
from klora_runtime import load_fusion, save_fusion
from klora_runtime.artifact.delta import Dense, LowRank
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.errors import ConfigError, KloraError

RULES = ("ties", "dare", "della")
CASE = Case(4)
#: A rank at which a slot is stored whole.
WHOLE = 64

Rows = list[list[float]]

#: Whole numbers of the generator, as it must give them everywhere.
PINNED = [[369190604, 2840956753, 3420228870], [861138041, 2054713779, 2531156857]]


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three LoRAs with alphas; a bias in all, one layer in the first alone, a zero delta."""
    folder = tmp_path_factory.mktemp("merged")
    found = {}
    for number, (slot, rank) in enumerate((("content", 2), ("style", 3), ("third", 2))):
        tensors = {}
        for i, (name, (out, width, kernel)) in enumerate(SHAPES.items()):
            if name == VALUE and number:
                continue
            down, up = random_pair(out, width, rank, seed=31 * number + i, kernel=kernel)
            if name == KEY and slot == "style":
                up = up * 0
            tensors |= peft_keys({name: (down, up)}) | {f"{name}.alpha": torch.tensor(1.0 + rank)}
        tensors[f"{CONV}.diff_b"] = torch.arange(6.0) - number
        found[slot] = write_lora(folder / f"{slot}.safetensors", tensors)
    return found


def entries(fusion: Fusion) -> dict[str, Entry]:
    return {entry.layer: entry for entry in fusion.entries}


def values(entry: Entry, slot: str) -> torch.Tensor:
    stored = entry.factors[slot]
    return stored.scale * stored.delta.matrix()


def rows(matrix: torch.Tensor) -> Rows:
    return [list(map(float, row)) for row in matrix.float()]


def literal_trim(delta: Rows, density: float) -> Rows:
    sizes = sorted((abs(x) for row in delta for x in row), reverse=True)
    least = sizes[max(1, round(density * len(sizes))) - 1]
    return [[x if abs(x) >= least else 0.0 for x in row] for row in delta]


def literal_election(deltas: Sequence[Rows]) -> Rows:
    merged = []
    for same_row in zip(*deltas, strict=True):
        line = []
        for numbers in zip(*same_row, strict=True):
            sign = math.copysign(1.0, sum(numbers))
            agreeing = [x for x in numbers if x * sign > 0]
            line.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
        merged.append(line)
    return merged


def literal_ties(layer: str, deltas: dict[str, Rows], density: float) -> Rows:
    return literal_election([literal_trim(delta, density) for delta in deltas.values()])


def drawn(layer: str, slot: str, delta: Rows, p: Any, seed: int) -> Rows:
    numbers = rows(chances(seed, layer, slot, (len(delta), len(delta[0]))))
    return [
        [0.0 if numbers[i][j] < p(row, j) else x / (1 - p(row, j)) for j, x in enumerate(row)]
        for i, row in enumerate(delta)
    ]


def literal_dare(layer: str, deltas: dict[str, Rows], drop: float, seed: int) -> Rows:
    kept = [drawn(layer, slot, delta, lambda row, j: drop, seed) for slot, delta in deltas.items()]
    return [
        [sum(numbers) for numbers in zip(*same, strict=True)] for same in zip(*kept, strict=True)
    ]


def literal_della(
    layer: str, deltas: dict[str, Rows], drop: float, epsilon: float, seed: int
) -> Rows:
    def p(row: list[float], j: int) -> float:
        larger = sum(abs(x) > abs(row[j]) for x in row)
        return drop - epsilon / 2 + epsilon / len(row) * larger

    return literal_election([drawn(layer, slot, delta, p, seed) for slot, delta in deltas.items()])


LITERAL: dict[str, tuple[Any, dict[str, Any]]] = {
    "ties": (literal_ties, {"density": 0.4}),
    "dare": (literal_dare, {"drop": 0.3, "seed": 5}),
    "della": (literal_della, {"drop": 0.4, "epsilon": 0.6, "seed": 5}),
}


@pytest.mark.parametrize("names", [("content", "style"), ("content", "style", "third")])
@pytest.mark.parametrize("rule", RULES)
def test_a_slot_is_the_literal_merge(
    loras: dict[str, Path], rule: str, names: tuple[str, ...]
) -> None:
    literal, options = LITERAL[rule]
    contents = [loras[name] for name in names if name != "style"]
    weights = {"content_weight": 0.5, "style_weight": 2.0}
    fusion = compiled(contents, loras["style"], rule, rank=WHOLE, scale=1.5, **options, **weights)
    given = entries(compiled(contents, loras["style"], "direct"))
    merged_layers = {QUERY, CONV} if len(names) == 2 else {QUERY, CONV, KEY}
    for name, entry in entries(fusion).items():
        assert ("merged" in entry.factors) == (name in merged_layers)
        if name not in merged_layers:
            assert entry.fate == ("constant" if name == TEXT else "summed")
            continue
        deltas = {
            slot: rows((2.0 if slot == "style" else 0.5) * values(given[name], slot))
            for slot in given[name].factors
        }
        wanted = 1.5 * torch.tensor(literal(name, deltas, **options))
        assert isinstance(entry.factors["merged"].delta, Dense)
        assert torch.allclose(values(entry, "merged").float(), wanted, rtol=1e-5, atol=1e-6)
        assert {s: v for s, v in entry.timeline.at(0.5).items() if v} == {"merged": 1.0}
        assert entry.fate == "merged"
    bias = entries(fusion)[f"{CONV}.bias"].timeline.at(0.5)
    assert bias["style"] == 2.0


@pytest.mark.parametrize("rule", RULES)
def test_the_rank_is_that_of_all_loras_and_its_loss_is_recorded(
    loras: dict[str, Path], rule: str
) -> None:
    options = LITERAL[rule][1]
    whole = entries(compiled(loras["content"], loras["style"], rule, rank=WHOLE, **options))
    for asked, rank in ((None, 5), (2, 2)):
        fusion = compiled(loras["content"], loras["style"], rule, rank=asked, **options)
        entry = entries(fusion)[CONV]  # 6 x 36: rank 5 pays
        exact, delta = values(whole[CONV], "merged"), entry.factors["merged"].delta
        assert isinstance(delta, LowRank) if rank == 2 else delta.shape == (6, 4, 3, 3)
        lost = float((values(entry, "merged") - exact).norm() / exact.norm())
        sizes = torch.linalg.svdvals(exact)
        assert lost == pytest.approx(float(sizes[rank:].norm() / sizes.norm()), rel=1e-3)
        scores = entry.scores[rule]["merged"]
        assert scores["error"] == pytest.approx(lost, rel=1e-4)
        assert scores["rank"] == rank
        (found,) = summarise(fusion).truncations
        assert found.worst >= lost - 1e-6
        assert 0.0 < found.whole <= found.worst
        text = dict(summary_lines(summarise(fusion)))["truncation"]
        assert f"loses {found.whole:.1%} of its norm" in text


def test_a_truncation_is_as_good_as_the_largest_singular_vectors() -> None:
    generator = torch.Generator().manual_seed(3)
    up, down = torch.randn(90, 6, generator=generator), torch.randn(6, 140, generator=generator)
    matrix = up @ down + 0.3 * torch.randn(90, 140, generator=generator)
    sizes = torch.linalg.svdvals(matrix.double())
    for start in (down, down[:0]):
        delta, error = truncated(matrix, 12, start, (90, 140))
        best = float(sizes[12:].norm() / sizes.norm())
        assert best * (1 - 1e-6) <= error <= best * 1.01
        exact = float((matrix.double() - delta.matrix()).norm() / matrix.double().norm())
        assert error == pytest.approx(exact, rel=1e-5)
    delta, error = truncated(up @ down, 6, down[:0], (90, 140))
    assert error < 2e-6


def test_what_is_dropped_is_the_same_on_every_machine() -> None:
    """Philox's whole numbers, pinned: another version or machine must drop the same."""
    numbers = (chances(7, "unet.conv_in", "content", (2, 3)) * 2**32).long()
    assert numbers.tolist() == PINNED
    others = [
        chances(8, "unet.conv_in", "content", (2, 3)),
        chances(7, "unet.conv_out", "content", (2, 3)),
        chances(7, "unet.conv_in", "style", (2, 3)),
    ]
    assert all(not torch.equal(other * 2**32, numbers.double()) for other in others)
    many = chances(0, "a", "b", (100_000,))
    assert float(many.mean()) == pytest.approx(0.5, abs=0.005)
    assert float((many < 0.3).double().mean()) == pytest.approx(0.3, abs=0.005)


@pytest.mark.parametrize("rule", RULES)
def test_the_bits_do_not_depend_on_the_number_of_threads(loras: dict[str, Path], rule: str) -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(compiled(loras["content"], loras["style"], rule, rank=2))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(found[0].entries, found[1].entries, strict=True):
        for slot in one.factors:
            mine, yours = (each.factors[slot].delta.tensors for each in (one, other))
            assert all(map(torch.equal, mine, yours))


@pytest.mark.parametrize("rule", RULES)
def test_a_schedule_survives_other_rules_and_back(
    loras: dict[str, Path], rule: str, tmp_path: Path
) -> None:
    sources = by_source(loras["content"], loras["style"])
    fusion = compiled(loras["content"], loras["style"], rule)
    assert verify_fusion(fusion, sources) == []
    direct = rescheduled(fusion, "direct")
    assert entries(direct)[QUERY].timeline.at(0.5) == {"content": 1, "style": 1, "merged": 0}
    assert verify_fusion(direct, sources) == []
    back = rescheduled(rescheduled(direct, "phases", style_phases="0:0,0.5:1"), rule)
    assert back.entries == fusion.entries
    assert back.rule == fusion.rule
    other = {"ties": "density", "dare": "seed", "della": "epsilon"}[rule]
    changed = {other: 1 if other == "seed" else 0.25}
    for refused in ({"scale": 2.0}, {"content_weight": 0.5}, {"rank": 1}, changed):
        with pytest.raises(ConfigError, match=r"slot merged is denoiser merged by .* needs"):
            rescheduled(fusion, None, **refused)
    plain = compiled(loras["content"], loras["style"], "direct")
    with pytest.raises(ConfigError, match="slot merged is not in this artifact, rule"):
        rescheduled(plain, rule)
    with pytest.raises(KloraError, match="this artifact dropped"):
        rescheduled(drop_unused(fusion), "direct")
    # what an earlier rule merged is not compared, and said to be so
    save_fusion(direct, tmp_path / "direct.klora")
    told = klora(
        *("verify", tmp_path / "direct.klora", "--against", loras["content"], loras["style"])
    )
    assert "also holds what an earlier rule merged, which was not compared" in told.stdout


def test_scores_that_are_not_plausible_make_no_report_fail(loras: dict[str, Path]) -> None:
    """Any tool may have written them."""
    fusion = compiled(loras["content"], loras["style"], "ties")
    for part in ({"error": -3.0}, {"error": 7}, {"frobenius": 1e300}, {"frobenius": -1.0}):
        entries = []
        for entry in fusion.entries:
            scores = entry.scores["ties"]
            if scores.get("merged"):
                scores = {**scores, "merged": {**scores["merged"], **part}}
            entries.append(replace(entry, scores={"ties": scores}))
        assert summarise(replace(fusion, entries=tuple(entries))).truncations == ()


def test_another_slot_is_noticed(loras: dict[str, Path]) -> None:
    fusion = compiled(loras["content"], loras["style"], "dare")
    other = compiled(loras["content"], loras["style"], "dare", seed=1)
    found = verify_fusion(
        replace(fusion, entries=other.entries),
        by_source(loras["content"], loras["style"]),
    )
    assert f"{QUERY}.weight: factors of merged differs" in found


def test_pictures_are_those_of_the_merged_delta(tmp_path: Path, apply: Apply) -> None:
    """Through a file and in both modes, and through an ordinary LoRA that is made of it."""
    pipe = build(CASE)
    content, style = (
        tiny_lora(pipe, tmp_path / f"{i}.safetensors", seed=i, rank=i + 1, modules=modules)
        for i, modules in ((1, ("to_q", "to_k")), (2, ("to_q", "to_v")))
    )
    fusion = compiled(content, style, "ties", scale=3.0)
    save_fusion(fusion, tmp_path / "ties.klora")
    loaded = load_fusion(tmp_path / "ties.klora", check="full")
    slot = loaded.slots["merged"]
    assert (slot.role, slot.sources) == ("merged", ("content", "style"))
    assert slot.derived == (
        "denoiser merged by TIES: scale 3.0, density 0.5, rank as the LoRAs together"
    )
    with apply(pipe, loaded) as handle:
        ours = generate(pipe, CASE)
        handle.set(merged=0.0)
        assert relative_difference(generate(pipe, CASE), ours) > 1e-3
    exported = export_static(fusion, tmp_path / "ordinary.safetensors", ExportSettings(keys="peft"))
    assert exported.schedule.total < 1e-6
    pipe.load_lora_weights(str(tmp_path / "ordinary.safetensors"))
    loras = generate(pipe, CASE)
    pipe.unload_lora_weights()
    weights = {name: weight.detach().clone() for name, weight in pipe.unet.state_dict().items()}
    for entry in fusion.entries:
        name = f"{entry.module}.{entry.parameter}"
        for acting, amount in entry.timeline.at(0.5).items():
            if amount:
                weights[name] += (amount * values(entry, acting)).float().reshape(entry.shape)
    pipe.unet.load_state_dict(weights)
    theirs = generate(pipe, CASE)
    assert relative_difference(ours, theirs) < 1e-5
    assert relative_difference(loras, theirs) < 1e-5


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("ties", {"density": 0.0}, "density: expected a number from 1e-06 to 1, found 0.0"),
        ("ties", {"rank": 0}, "rank: expected a whole number from 1, found 0"),
        ("dare", {"drop": 1.0}, "drop: expected a number from 0 to 0.999, found 1.0"),
        ("dare", {"seed": -1}, "seed: expected a whole number from 0"),
        ("della", {"drop": 0.05}, "epsilon: with drop 0.05, numbers would be dropped with prob"),
        ("della", {"drop": 0.95}, "set epsilon to 0, or below 0.1"),
    ],
)
def test_settings_out_of_range_are_named(rule: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.named(rule, **options)
    assert message in str(caught.value)
