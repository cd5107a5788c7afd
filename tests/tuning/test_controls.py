"""Controls of the page: values to settings and back, commands, the artifact, the map."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.golden_fusion import golden_fusion

from klora_compile.rules.lookup import RULES
from klora_compile.trying.names import rule_settings
from klora_compile.tuning.controls import (
    Controls,
    Value,
    known_names,
    plain_sum_of,
    trial_of_texts,
)
from klora_compile.tuning.repeating import Recipe, save_artifact
from klora_compile.tuning.schedule import layer_text, map_html
from klora_runtime import load_fusion
from klora_runtime.errors import ConfigError, KloraError

CONTROLS = Controls(("content", "style", "turbo"))
#: What the page shows at first.
USUAL: Mapping[str, Value] = {
    "rule": "klora",
    "bias": 0,
    "pattern": "s",
    "clock": "step",
    "weight.content": 1,
    "weight.style": 1.0,
    "weight.turbo": 1,
    "steps": 10,
    "seed": 0,
    "prompt": "a fox",
    "further": "",
}


def settings(**changes: Value) -> dict[str, str]:
    values = {**USUAL, **{name.replace("__", "."): value for name, value in changes.items()}}
    return CONTROLS.settings([values[name] for name in CONTROLS.names])


def test_controls_at_their_defaults_state_nothing() -> None:
    assert settings() == {"rule": "klora", "steps": "10", "seed": "0", "prompt": "a fox"}


@pytest.mark.parametrize(
    ("changes", "stated"),
    [
        ({"bias": 0.3}, {"bias": "0.3"}),
        ({"bias": 0.1 + 0.2}, {"bias": "0.3"}),
        ({"bias": -0.0}, {}),
        ({"weight__style": 0.85}, {"weight.style": "0.85"}),
        ({"clock": "noise", "pattern": "s*"}, {"clock": "noise", "pattern": "s*"}),
        ({"further": " top-k = 9 \n\nguidance=4"}, {"top_k": "9", "guidance": "4"}),
        ({"bias": 0.3, "further": "bias=-1"}, {"bias": "-1"}),
        ({"rule": "np", "bias": 0.3, "further": "mu=2"}, {"rule": "np", "mu": "2"}),
    ],
)
def test_settings_say_what_differs_and_lead_back_to_the_controls(
    changes: dict[str, Value], stated: dict[str, str]
) -> None:
    found = settings(**changes)
    assert found == settings() | stated
    assert CONTROLS.settings(CONTROLS.values(found)) == found
    trial_of_texts(found)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"bias": 7}, "bias: expected a number from -1 to 1, found 7"),
        ({"seed": None}, "seed: expected a whole number, found "),
        ({"seed": -1}, "seed: expected a whole number from 0 to "),
        ({"steps": 2.5}, "steps: expected a whole number, found 2.5."),
        ({"steps": 0}, "steps: expected a whole number from 1 to 10000, found 0."),
        ({"weight__style": 200}, "weight.style: expected a number from -100 to 100, found 200"),
        ({"rule": None}, "rule: expected one of klora, "),
        ({"further": "mu"}, "further settings: expected NAME=VALUE, found mu."),
        ({"further": "mu=2"}, "mu: rule klora has no such setting"),
        ({"further": "bais=2"}, "bais: there is no such setting; expected "),
        ({"further": "alpha=1\nalpha=2"}, "further settings: alpha is named twice; leave one"),
    ],
)
def test_a_bad_value_gives_a_sentence(changes: dict[str, Value], error: str) -> None:
    with pytest.raises(ConfigError) as raised:
        trial_of_texts(settings(**changes))
    assert str(raised.value).startswith(error)


def test_the_plain_sum_keeps_what_both_have() -> None:
    found = settings(bias=0.3, weight__style=0.5, clock="noise", further="guidance=4\ntop_k=9")
    own = {"rule": "direct", "clock": "noise", "weight.style": "0.5", "guidance": "4"}
    assert plain_sum_of(found) == settings() | own
    trial_of_texts(plain_sum_of(found))


def test_captions_say_what_changed() -> None:
    changed = settings(bias=0.3, weight__style=0.5, seed=4, prompt="a hare")
    assert CONTROLS.caption(changed, settings()) == "bias 0.3, style 0.5, seed 4"
    assert CONTROLS.caption(settings(), changed) == "seed 0, bias 0, style 1"
    assert CONTROLS.caption(settings(), settings(prompt="a hare")) == "klora"
    assert CONTROLS.caption(settings(rule="np", seed=4), settings()) == "np, seed 4"


@pytest.mark.parametrize("rule", RULES)
def test_the_box_names_every_setting_of_a_rule_that_has_no_control(rule: str) -> None:
    named = known_names(rule).split(", ")
    assert {n for n in rule_settings(rule) if n not in ("bias", "pattern")} <= set(named)


def test_commands_state_all_settings() -> None:
    recipe = Recipe(("a b.safetensors", "ink.safetensors"), ("--model", "base"))
    found = settings(bias=-0.3, weight__style=0.5, prompt="it's a fox", further="guidance=4")
    lines = recipe.commands(found, "x.klora.safetensors", "branch").splitlines()
    first, second = map(shlex.split, lines)
    assert first == [
        *("klora", "compile", "a b.safetensors", "ink.safetensors", "--rule", "klora"),
        *("--bias", "-0.3", "--weight", "style=0.5", "-o", "x.klora.safetensors"),
    ]
    assert second == [
        *("klora", "sample", "x.klora.safetensors", "--model", "base", "--mode", "branch"),
        *("--steps", "10", "--seed", "0", "--prompt", "it's a fox", "--guidance", "4"),
        *("-o", "x.png"),
    ]


@pytest.mark.parametrize(
    ("rule", "box", "words"),
    [
        ("switch", "", "--rule switch --steps 10"),
        ("dare", "rule.seed=5", "--rule dare --seed 5"),
        ("switch", "rule.steps=4", "--rule switch --steps 4"),
    ],
)
def test_commands_name_a_rule_s_own_steps_and_seed(rule: str, box: str, words: str) -> None:
    found = settings(rule=rule, further=box)
    compiling = Recipe(("a", "b"), ()).commands(found, "x", None).splitlines()[0]
    assert compiling == f"klora compile a b {words} -o x"


@pytest.mark.parametrize("name", ["", " ", "../a", "a/b", ".klora.safetensors", ".a", "c:a"])
def test_artifacts_stay_in_their_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"artifact: expected the name of a file in"):
        save_artifact(golden_fusion(), tmp_path, name, overwrite=True)
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_is_replaced_only_if_asked(tmp_path: Path) -> None:
    path = save_artifact(golden_fusion(), tmp_path, "fox", overwrite=False)
    assert path == tmp_path / "fox.klora.safetensors"
    assert load_fusion(path, check="full").rule == golden_fusion().rule
    path.write_bytes(b"old")
    with pytest.raises(KloraError, match="exists"):
        save_artifact(golden_fusion(), tmp_path, "fox.klora.safetensors", overwrite=False)
    assert path.read_bytes() == b"old"
    save_artifact(golden_fusion(), tmp_path, "fox", overwrite=True)
    assert load_fusion(path, check="full").rule == golden_fusion().rule


def test_the_map_has_a_tooltip_with_ratio_and_scores_for_each_layer() -> None:
    fusion = golden_fusion()
    acting = [e for e in fusion.entries if e.acts and e.component == "unet"]
    html = map_html(fusion)
    assert all(f"<title>{entry.layer}\n" in html for entry in acting)
    entry = next(e for e in acting if e.timeline.switches)
    ratio: Any = entry.scores["klora"]["ratio"]
    lines = layer_text(fusion, entry).splitlines()
    assert lines[:2] == [entry.layer, f"ratio {ratio:.4g}"]
    assert [line.partition(":")[0] for line in lines[2:4]] == ["content", "style"]
    assert "top_k" in lines[3]
    assert lines[4].startswith("from 0.000 ")
    assert f"; from {entry.timeline.starts[1]:.3f} " in lines[4]
