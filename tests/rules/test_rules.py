"""Each rule against a literal version of it on dense float64 deltas, and what it promises."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compiling import compiled
from support.few_layers import CONV, KEY, QUERY, SHAPES, TEXT, VALUE
from support.lora_files import peft_keys, random_pair, write_lora

from klora_compile import compile_fusion
from klora_compile.fields import is_required, setting_of
from klora_compile.planning.fates import FATES
from klora_compile.rules.est import Est
from klora_compile.rules.kit.calibrated import Calibrated
from klora_compile.rules.kit.numbers import LayerNumbers, Side
from klora_compile.rules.klora import Klora
from klora_compile.rules.lookup import RULES, known_rule
from klora_compile.rules.np_lora import input_directions, project
from klora_compile.rules.phases import Phases, points_of, points_text
from klora_compile.rules.switch import Switch
from klora_compile.settings.config import Config
from klora_runtime.artifact.delta import Dense, LowRank
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.artifact.timeline import progress_of_step
from klora_runtime.errors import ConfigError

ALL_STEPS = [progress_of_step(i, n) for n in range(1, 61) for i in range(n)]


@dataclass
class Files:
    """LoRA files and their dense deltas, scaled."""

    content: Path
    style: Path
    deltas: dict[str, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Ranks 2 and 3, alphas, a layer of one LoRA only, and a style that is zero in one layer."""
    folder = tmp_path_factory.mktemp("rules")
    paths, deltas = {}, {}
    for slot, rank, alpha, lacks in (("content", 2, 1.0, VALUE), ("style", 3, 6.0, KEY)):
        tensors, dense = {}, {}
        for i, (name, (out, width, kernel)) in enumerate(SHAPES.items()):
            if name == lacks:
                continue
            down, up = random_pair(out, width, rank, seed=17 * rank + i, kernel=kernel)
            up = up * 1.7**i if slot == "content" else up
            tensors |= peft_keys({name: (down, up)}) | {f"{name}.alpha": torch.tensor(alpha)}
            product = up.double().flatten(1) @ down.double().flatten(1)
            dense[name] = (alpha / rank) * product
        paths[slot] = write_lora(folder / f"{slot}.safetensors", tensors)
        deltas[slot] = dense
    return Files(paths["content"], paths["style"], deltas)


def entries(fusion: Fusion) -> dict[str, Entry]:
    return {entry.layer: entry for entry in fusion.entries}


def fused(files: Files, rule: str, **options: Any) -> Fusion:
    return compiled(files.content, files.style, rule, **options)


def delta(entry: Entry, slot: str) -> torch.Tensor:
    """What a slot's stored factors multiply out to, (out, -1)."""
    stored = entry.factors[slot]
    return stored.scale * stored.delta.matrix()


def row(entry: Entry, t: float) -> tuple[float, float]:
    at = entry.timeline.at(t)
    return at["content"], at["style"]


# --- est --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"alpha": 3.0, "d": 0.9}, {"alpha": -1.0, "d": 0.0}])
def test_est_is_its_inequality_on_dense_deltas(files: Files, options: dict[str, float]) -> None:
    alpha, d = options.get("alpha", 1.5), options.get("d", 0.5)
    found = entries(fused(files, "est", **options))
    for name in (QUERY, CONV):
        e_c, e_s = (float(files.deltas[slot][name].square().sum()) for slot in ("content", "style"))
        assert found[name].scores["est"]["ratio"] == pytest.approx(e_c / e_s, rel=1e-6)
        for t in ALL_STEPS:
            chosen = (1.0, 0.0) if e_c >= (alpha * t + 1 - d) * e_s else (0.0, 1.0)
            assert row(found[name], t) == chosen, (name, t)
    assert found[VALUE].fate == found[KEY].fate == "one-sided"
    assert found[TEXT].fate == "constant"


def energies(e_c: float, e_s: float) -> LayerNumbers:
    sides = {"content": Side(1, 1.0, math.sqrt(e_c)), "style": Side(1, 1.0, math.sqrt(e_s))}
    return LayerNumbers("unet", None, sides)


@settings(max_examples=100, deadline=None)
@given(ratio=st.floats(0.3, 3.0), scale=st.floats(0.5, 2.0))
def test_est_goes_with_the_square_of_a_loras_scale(ratio: float, scale: float) -> None:
    """The switch is where alpha t + 1 - d reaches the ratio of energies: scaled by c, c^2 of it."""
    rule = Est()
    choice = rule.choose(energies(scale * scale * ratio, 1.0), {})
    assert choice.ratio == pytest.approx(scale * scale * ratio, rel=1e-12)
    switch = (scale * scale * ratio - 0.5) / 1.5
    if 1e-9 < switch < 1 - 1e-9:
        (_, first), (start, second) = choice.segments
        assert (dict(first), dict(second)) == ({"content": 1.0}, {"style": 1.0})
        assert start == pytest.approx(switch, rel=1e-9, abs=1e-12)
        needed = rule.inequality().scale
        before, at = needed(math.nextafter(start, 0.0)), needed(start)
        e_c = math.sqrt(scale * scale * ratio) ** 2
        assert before * 1.0 <= e_c < at * 1.0  # the smallest float64 where the inequality fails


def test_est_measures_no_largest_weights(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("klora_compile.measuring.measure.measure", None)
    scores = entries(fused(files, "est"))[QUERY].scores["est"]
    assert set(scores["content"]) == {"rank", "scaling", "frobenius"}
    norm = float(files.deltas["content"][QUERY].norm())
    assert scores["content"]["frobenius"] == pytest.approx(norm, rel=1e-6)


# --- np ---------------------------------------------------------------------------------------


def literal_projection(content: torch.Tensor, style: torch.Tensor, mu: float) -> torch.Tensor:
    """delta_c (I - mu / (1 + mu) Q Q^T) with Q from the SVD of the dense style."""
    _, sizes, right = torch.linalg.svd(style, full_matrices=False)
    q = right[sizes > 1e-6 * sizes[0]].T if sizes[0] > 0 else right[:0].T
    return content @ (torch.eye(content.shape[1], dtype=content.dtype) - mu / (1 + mu) * q @ q.T)


@pytest.mark.parametrize("rule", ["np", "np+klora"])
@pytest.mark.parametrize("mu", [0.0, 0.5, 7.0])
def test_the_projected_content_is_that_of_dense_deltas(files: Files, rule: str, mu: float) -> None:
    fusion = fused(files, rule, mu=mu)
    found = entries(fusion)
    for name in (QUERY, CONV):
        wanted = literal_projection(*(files.deltas[s][name] for s in ("content", "style")), mu)
        assert torch.allclose(delta(found[name], "content"), wanted, rtol=1e-5, atol=1e-5)
        assert found[name].factors["content"].delta.rank == 2
        assert torch.allclose(delta(found[name], "style"), files.deltas["style"][name])
    for name in (KEY, TEXT):  # one LoRA's, and a text encoder's
        assert torch.allclose(delta(found[name], "content"), files.deltas["content"][name])
    slot = fusion.slots["content"]
    assert slot.sources == ("content", "style")
    assert slot.derived == (
        f"denoiser projected off the style's input directions (NP-LoRA, mu = {mu!r})"
    )
    assert (fusion.slots["style"].sources, fusion.slots["style"].derived) == (("style",), None)


def test_np_sums_the_projected_content_and_the_style(files: Files) -> None:
    found = entries(fused(files, "np"))
    assert row(found[QUERY], 0.3) == (1.0, 1.0)
    assert not any(entry.timeline.switches for entry in found.values())


def test_what_the_style_does_to_its_inputs_is_left_alone_as_mu_grows(files: Files) -> None:
    """On an input of the style the fusion tends to the style; on one it ignores it is the sum."""
    style, content = (files.deltas[slot][QUERY] for slot in ("style", "content"))
    _, sizes, right = torch.linalg.svd(style)
    assert int((sizes > 1e-6).sum()) == 3
    seen, unseen = right[0], right[-1]
    distances = []
    for mu in (0.0, 1.0, 10.0, 1e3, 1e6):
        entry = entries(fused(files, "np", mu=mu))[QUERY]
        whole = delta(entry, "content") + delta(entry, "style")
        distances.append(float((whole @ seen - style @ seen).norm()))
        assert torch.allclose(whole @ unseen, content @ unseen, atol=1e-4)
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.5
    assert distances[-1] < 1e-4


def test_a_style_that_is_zero_or_of_lower_rank_projects_no_more_than_it_is() -> None:
    down, up = random_pair(6, 9, 3, seed=1)
    content = LowRank(*random_pair(6, 9, 2, seed=2))
    assert input_directions(LowRank(down, 0 * up)).shape == (9, 0)
    assert torch.equal(project(content, LowRank(down, 0 * up), 1e6).down, content.down)
    down[2] = down[0] + down[1]
    assert input_directions(LowRank(down, up)).shape == (9, 2)
    assert input_directions(LowRank(down, 1e-20 * up)).shape == (9, 2)


def test_dense_deltas_are_projected_alike() -> None:
    style, content = (LowRank(*random_pair(6, 9, rank, seed=rank)) for rank in (2, 3))
    wanted = project(content, style, 0.5).matrix()
    for one in (content, Dense(content.matrix().float())):
        for other in (style, Dense(style.matrix().float())):
            assert torch.allclose(project(one, other, 0.5).matrix(), wanted, atol=1e-5)


def test_np_klora_chooses_by_the_projected_content(files: Files) -> None:
    """K-LoRA, literally, on the deltas as projected; gamma too."""
    found = entries(fused(files, "np+klora"))
    deltas = {
        name: (
            literal_projection(*(files.deltas[s][name] for s in ("content", "style")), 0.5),
            files.deltas["style"][name],
        )
        for name in (QUERY, CONV)
    }
    gamma = sum(float(c.abs().sum()) for c, _ in deltas.values()) / sum(
        float(s.abs().sum()) for _, s in deltas.values()
    )
    plain = fused(files, "klora").rule.derived["gamma"]["unet"]
    assert abs(gamma / plain - 1) > 0.01  # the projection counts
    for name, (content, style) in deltas.items():
        s_c, s_s = (float(d.abs().flatten().topk(6).values.sum()) for d in (content, style))
        for t in ALL_STEPS:
            chosen = (1.0, 0.0) if s_c >= gamma * (1.5 * t + 0.5) * s_s else (0.0, 1.0)
            assert row(found[name], t) == chosen, (name, t)


# --- whole LoRAs ------------------------------------------------------------------------------


def test_direct_is_both_everywhere(files: Files) -> None:
    for name, entry in entries(fused(files, "direct", content_weight=0.7)).items():
        wanted = (0.0 if name == VALUE else 0.7, 0.0 if name == KEY else 1.0)
        assert (row(entry, 0.1), entry.timeline.switches) == (wanted, False)
        for slot in entry.factors:
            assert torch.allclose(delta(entry, slot), files.deltas[slot][name])


def test_level_sums_deltas_of_one_norm(files: Files) -> None:
    shared = [name for name in (QUERY, CONV) if name in files.deltas["style"]]
    norms = {
        slot: math.sqrt(sum(float(deltas[name].square().sum()) for name in shared))
        for slot, deltas in files.deltas.items()
    }
    factor = norms["content"] / norms["style"]
    assert abs(factor - 1) > 0.1  # it counts
    fusion = fused(files, "level", style_weight=0.5)
    for name, entry in entries(fusion).items():
        level = 1.0 if name == TEXT else factor
        wanted = (0.0 if name == VALUE else 1.0, 0.0 if name == KEY else 0.5 * level)
        assert row(entry, 0.9) == pytest.approx(wanted, rel=1e-12)
        assert not entry.timeline.switches
    assert fusion.rule.derived["factors.unet"]["style"] == pytest.approx(factor, rel=1e-12)


def test_level_leaves_alone_what_cannot_be_compared(tmp_path: Path) -> None:
    """One LoRA is zero in all shared layers, in either role."""
    pairs = {}
    for seed, slot in enumerate(("full", "empty")):
        down, up = random_pair(8, 12, 2, seed=seed)
        up = up if slot == "full" else up * 0
        pairs[slot] = write_lora(tmp_path / f"{slot}.safetensors", peft_keys({QUERY: (down, up)}))
    for content, style in (("full", "empty"), ("empty", "full")):
        (entry,) = compiled(pairs[content], pairs[style], "level").entries
        wanted = (1.0, 0.0) if content == "full" else (0.0, 1.0)
        assert row(entry, 0.5) == wanted


def test_phases_are_piecewise_weights(files: Files) -> None:
    def content(t: float) -> float:
        return 1.0 if t < 0.4 else 0.2

    def style(t: float) -> float:
        return 0.0 if t < 0.25 else (-2.0 if t < 0.4 else 1.5)

    found = entries(
        fused(
            files,
            "phases",
            content_phases="0:1,0.4:0.2",
            style_phases=[(0, 0), (0.25, -2), (0.4, 1.5)],
            style_weight=0.5,
        )
    )
    at_the_points = [math.nextafter(0.4, 0), 0.4, math.nextafter(0.25, 0), 0.25]
    for name, entry in found.items():
        if name == TEXT:
            assert row(entry, 0.9) == (1.0, 0.5)
            continue
        for t in ALL_STEPS + at_the_points:
            wanted = (0.0 if name == VALUE else content(t), 0.0 if name == KEY else 0.5 * style(t))
            assert row(entry, t) == wanted, (name, t)


@settings(max_examples=50, deadline=None)
@given(
    starts=st.sets(st.floats(1e-6, 0.999), max_size=5),
    weights=st.lists(st.floats(-100, 100), min_size=6, max_size=6),
)
def test_points_and_their_text_are_the_same(starts: set[float], weights: list[float]) -> None:
    points = tuple(zip([0.0, *sorted(starts)], weights, strict=False))
    assert points_of("x", points_text(points)) == points
    assert Phases(content_phases=points).parameters()["content_phases"] == points_text(points)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "content_phases: expected progress:weight, such as 0:1,0.4:0.2, found ''"),
        ("0:1,x", "expected progress:weight"),
        ("0.1:1", "expected progress that ascends from 0 and stays below 1, found '0.1:1'"),
        ("0:1,0.5:1,0.5:2", "expected progress that ascends from 0"),
        ("0:1,1:0", "stays below 1"),
        ("0:1,nan:0", "expected progress that ascends from 0"),
        ("0:101", "a weight of content_phases: expected a number from -100 to 100, found 101.0"),
        (7, "expected progress:weight"),
    ],
)
def test_points_that_make_no_schedule_are_named(text: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Phases(content_phases=text)
    assert message in str(caught.value)


@pytest.mark.parametrize(("tau", "steps"), [(5, 20), (1, 7), (3, 50), (2, 4), (7, 1000)])
def test_switch_is_the_literal_turn_at_every_step(files: Files, tau: int, steps: int) -> None:
    """LoRA floor(((t - 1) mod (k tau)) / tau) + 1 of k at step t, counted from 1."""
    found = entries(fused(files, "switch", steps=steps, tau=tau))
    for t in range(1, steps + 1):
        turn = ((t - 1) % (2 * tau)) // tau + 1
        wanted = (1.0, 0.0) if turn == 1 else (0.0, 1.0)
        middle = progress_of_step(t - 1, steps)
        assert row(found[QUERY], middle) == wanted
        assert row(found[KEY], middle) == (wanted[0], 0.0)


def test_switch_has_its_breakpoints_between_steps_and_says_that_it_stretches() -> None:
    rule = Switch(steps=18, tau=5)
    layer = energies(1.0, 1.0)
    assert [start for start, _ in rule.choose(layer, {}).segments] == [
        0.0,
        5 / 18,
        10 / 18,
        15 / 18,
    ]
    assert rule.text() == (
        "turns of 5 of 18 steps; at another number of steps they stretch with it"
    )


# --- all of them ------------------------------------------------------------------------------

EXAMPLES: dict[str, dict[str, Any]] = {
    "klora": {"bias": 0.25, "pattern": "s*"},
    "groups": {"table": {"style *.to_k": "0:0.5,0.5:1", "content *": "0:2"}},
    "soft": {"sharpness": 3.0, "parts": 5, "pattern": "s*"},
    "est": {"d": 1.0},
    "np": {"mu": 2.0},
    "np+klora": {"mu": 0.1, "top_k": 5, "semantics": "authors"},
    "ties": {"density": 0.2, "rank": 3, "style_weight": 0.5},
    "dare": {"drop": 0.25, "seed": 3},
    "della": {"epsilon": 0.5, "scale": 1.5},
    "direct": {"weights": {"style": 0.5}},
    "level": {"style_weight": 2.0},
    "auto-strength": {"per": "layer"},
    "switch": {"steps": 30, "tau": 4},
    "phases": {"style_phases": "0:0,0.3:1", "slot_phases": {"content": "0:1,0.9:0"}},
    "auto": {"style_weight": 0.5},
    "ssr": {"ridge": 0.1, "strength": 0.5},
    "fit": {"phases": 4, "content_until": 0.5},
}

#: Rules that a base model calibrates; ``test_calibrating`` compiles with them.
CALIBRATED = {name for name, kind in RULES.items() if issubclass(kind, Calibrated)}


@pytest.mark.parametrize("rule", [name for name in RULES if name not in CALIBRATED])
def test_parameters_in_the_artifact_are_enough_to_compile_again(files: Files, rule: str) -> None:
    fusion = fused(files, rule, unpaired="drop", **EXAMPLES[rule])
    again = Config.from_parameters(fusion.rule.name, fusion.rule.parameters)
    assert again.parameters() == fusion.rule.parameters
    other = compile_fusion(files.content, files.style, again.rule, again.settings, device="cpu")
    # that auto picked the rule is no setting of the rule
    assert other.rule.parameters == {
        name: value for name, value in fusion.rule.parameters.items() if name != "picked"
    }
    assert (other.rule.name, other.rule.derived) == (fusion.rule.name, fusion.rule.derived)
    assert [e.timeline for e in other.entries] == [e.timeline for e in fusion.entries]
    assert known_rule(fusion.rule.name, fusion.rule.parameters) == again.rule


def test_every_rule_has_words_and_fates() -> None:
    assert set(RULES) == set(EXAMPLES)
    meanings: dict[str, str] = dict(FATES)
    for name, rule in RULES.items():
        assert Config.named(name, **EXAMPLES[name]).rule.text()
        assert rule.fates
        assert rule.title
        assert rule.sentence[0].isupper()
        assert not rule.sentence.endswith(".")
        for fate, meaning in rule.fates.items():  # two rules that use a fate mean the same by it
            assert meanings.setdefault(fate, meaning) == meaning


def test_every_setting_says_what_it_is_and_has_a_default_that_it_allows() -> None:
    for name, rule in RULES.items():
        made = Config.named(name, **EXAMPLES[name]).rule
        for each in fields(rule):
            setting = setting_of(each)
            assert setting.help[0].isupper()
            assert setting.help.endswith(".")
            unset = each.default is None
            assert unset == bool(setting.default or setting.unset)  # None is said in words
            if not unset and not is_required(each):
                setting.kind.check(each.name, getattr(made, each.name))


def test_a_rule_is_a_typed_record() -> None:
    assert Klora(pattern="s*", bias=0.2) == Config.named("klora", pattern="s*", bias=0.2).rule
    assert Switch(steps=20).made_for_steps == 20
    assert Klora().made_for_steps is None
    with pytest.raises(TypeError, match="unexpected keyword argument 'patern'"):
        Klora(patern="s*")  # type: ignore[call-arg]
    assert all(each.kw_only for rule in RULES.values() for each in fields(rule))
    with pytest.raises(TypeError, match="steps"):
        Switch()  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"top_k: expected a whole number from 1, found 'auto'"):
        Klora(top_k="auto")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (
            "mine",
            {},
            "rule: expected one of klora, ",
        ),
        ("klora", {"bias": 1.5}, "bias: expected a number from -1 to 1, found 1.5"),
        ("klora", {"tau": 3}, "tau: rule klora has no such setting; it has semantics, pattern"),
        ("direct", {"alpha": 1}, "rule direct has no such setting; it has none, all rules have"),
        ("est", {"d": 2.5}, "d: expected a number from 0 to 2, found 2.5"),
        ("est", {"alpha": math.nan}, "alpha: expected a number from -100 to 100"),
        ("np", {"mu": -0.1}, "mu: expected a number from 0 to 1e+06, found -0.1"),
        ("np+klora", {"gamma": 0}, "gamma: expected a number from 1e-12"),
        ("switch", {}, "steps: rule switch needs the number of steps of your runs; name it"),
        ("switch", {"steps": 0}, "steps: expected a whole number from 1 to 100000, found 0"),
        ("switch", {"steps": 9, "tau": 0}, "tau: expected a whole number from 1 to 100000"),
        (
            "switch",
            {"steps": 99999, "tau": 1},
            "tau: 99999 steps in turns of 1 make more than 4096 turns; set tau to 25",
        ),
        ("direct", {"weights": {"style": 101}}, "weight of style: expected a number from -100"),
        ("direct", {"weights": [1]}, "weights: expected slots with a number each, found [1]"),
        ("phases", {"slot_phases": [1]}, "slot_phases: expected slots with progress:weight, such"),
    ],
)
def test_settings_of_rules_out_of_range_are_named(
    rule: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.named(rule, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("bias", [-1.0, -0.3, 0.5, 1.0])
def test_a_bias_is_gamma_times_four_to_its_negative(files: Files, bias: float) -> None:
    plain, biased = fused(files, "klora"), fused(files, "klora", bias=bias)
    gamma = plain.rule.derived["gamma"]["unet"]
    assert biased.rule.derived["gamma"]["unet"] == pytest.approx(gamma * 4**-bias, rel=1e-15)
    stated = fused(files, "klora", gamma=gamma * 4.0**-bias)
    assert [e.timeline for e in stated.entries] == [e.timeline for e in biased.entries]
    assert "bias" in biased.rule.parameters
    assert "bias" not in plain.rule.parameters
