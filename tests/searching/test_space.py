"""The candidates of a search: all different, drawn alike for a seed, without idle settings."""

from __future__ import annotations

from typing import Any

import pytest

from klora_compile.rules.kit.calibrated import Calibrated
from klora_compile.rules.lookup import RULES
from klora_compile.searching.space import Candidate, baseline, candidates_of, usual_axes
from klora_compile.trying.trial import trial_of
from klora_runtime.errors import ConfigError

BASE = {"prompt": "a fox", "seed": 3}
AXES = {"rule": ["klora", "np", "direct"], "bias": [-0.3, 0.3], "weight.style": [1.0, 1.4]}


def drawn(axes: dict[str, Any], count: int = 100, seed: int = 0, **base: Any) -> list[Candidate]:
    return list(candidates_of(axes, {**BASE, **base}, count, seed))


def test_every_combination_is_one_candidate_and_the_plain_sum_is_none() -> None:
    found = {each.label: dict(each.settings) for each in drawn(AXES)}
    assert found == {
        "rule klora, bias -0.3": {"rule": "klora", "bias": -0.3},
        "rule klora, bias 0.3": {"rule": "klora", "bias": 0.3},
        "rule klora, bias -0.3, style 1.4": {"rule": "klora", "bias": -0.3, "weight.style": 1.4},
        "rule klora, bias 0.3, style 1.4": {"rule": "klora", "bias": 0.3, "weight.style": 1.4},
        "rule np": {"rule": "np"},
        "rule np, style 1.4": {"rule": "np", "weight.style": 1.4},
        "rule direct, style 1.4": {"rule": "direct", "weight.style": 1.4},
    }
    assert baseline({**BASE, "bias": 0.3, "steps": 4}).settings == {"rule": "direct", "steps": 4}


def test_a_seed_draws_the_same_and_rules_take_turns() -> None:
    one, two = drawn(AXES, 5), drawn(AXES, 5)
    assert [each.label for each in one] == [each.label for each in two]
    turns = [each.settings["rule"] for each in one]
    assert set(turns[:3]) == {"klora", "np", "direct"}
    assert set(turns[3:]) == {"klora", "np"}
    firsts = {drawn(AXES, 1, seed)[0].settings["rule"] for seed in range(20)}
    assert firsts == {"klora", "np", "direct"}
    others = {tuple(each.label for each in drawn(AXES, 5, seed)) for seed in range(8)}
    assert len(others) > 3


def test_a_weight_of_one_overrides_that_of_all_candidates() -> None:
    found = drawn({"weight.style": [1.0, 1.4]}, rule="np", **{"weight.style": 0.5})
    assert [trial_of({**BASE, **each.settings}).config.settings.weights for each in found] in (
        [{}, {"style": 1.4}],
        [{"style": 1.4}, {}],
    )


def test_every_candidate_has_a_name() -> None:
    found = drawn({"weight.content": [0.7, 1.0]}, rule="klora", **{"weight.style": 0.8})
    assert {each.label for each in found} == {"content 0.7", "content 1"}


def test_cells_of_ones_own_keep_their_labels() -> None:
    cells = [{"label": "mild", "rule": "klora", "bias": 0.1}, {"rule": "np"}]
    found = drawn({"cells": cells, "weight.style": [0.5, 2.0]})
    assert {each.label for each in found} == {
        *("mild, style 0.5", "mild, style 2"),
        *("rule np, style 0.5", "rule np, style 2"),
    }


def test_a_search_without_axes_tries_rules_bias_and_weights() -> None:
    axes = usual_axes(("content", "style"), BASE)
    assert axes.keys() == {"rule", "bias", "weight.content", "weight.style"}
    without = {name for name, kind in RULES.items() if issubclass(kind, Calibrated)}
    assert set(RULES) - set(axes["rule"]) == without | {"switch"}  # which needs a number of steps
    assert "switch" in usual_axes(("content", "style"), {**BASE, "steps": 4})["rule"]
    fixed = usual_axes(("content", "style"), {**BASE, "rule": "np", "weight.style": 0.8})
    assert fixed.keys() == {"weight.content"}
    fixed = usual_axes(("content", "style"), {**BASE, "rule": "klora"})
    assert fixed.keys() == {"bias", "weight.content", "weight.style"}
    alone = usual_axes(("content",), BASE)
    assert alone.keys() == {"rule", "weight.content"}
    assert drawn(alone, 4)
    assert len(drawn(axes, 40)) == 40


@pytest.mark.parametrize(
    ("axes", "error"),
    [
        ({"bias": [0.1, 5.0]}, "bias: expected a number from -1 to 1, found 5.0"),
        ({"steps": [4, 20]}, "steps: a search compares fusions that are sampled alike"),
        ({"cells": [{"guidance": 3.0}]}, "guidance: a search compares fusions"),
        ({"mu": [1.0, 2.0]}, "mu: no rule of this search has this setting"),
        ({"rule": ["direct", "direct"]}, "rule: rule direct occurs twice"),
        ({"rule": ["direct"]}, "a search has nothing but the plain sum to try"),
        ({"bais": [1, 2]}, "bais: there is no such setting"),
        ({"bias": [n / 400 for n in range(400)], "weight.style": range(300)}, "at most 100000"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(axes: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        drawn(axes, rule="klora") if "rule" not in axes else drawn(axes)
