"""The grid of a sweep: which settings are in which cell, and what is refused before any work."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from klora_compile.sweeping.axes import axes_of, listed_cells
from klora_compile.sweeping.grid import Grid, grid_of
from klora_runtime.errors import ConfigError


def grid(axes: Mapping[str, Sequence[Any]], **base: Any) -> Grid:
    return grid_of(axes_of(axes), {"rule": "klora", "prompt": "a fox", **base})


def settings(grid: Grid, sheet: int, row: int) -> list[dict[str, Any]]:
    """The settings of a row's cells, without the prompt."""
    return [{**cell.settings, "prompt": None} for cell in grid.row(sheet, row)]


def test_the_plain_sum_is_the_first_column() -> None:
    found = grid({"bias": [-0.3, 0.3]}, **{"weight.style": 0.8})
    assert found.columns == ("direct sum", "bias -0.3", "bias 0.3")
    assert (found.rows, found.sheets) == (("",), ("",))
    assert settings(found, 0, 0) == [
        {"rule": "direct", "weight.style": 0.8, "prompt": None},
        {"rule": "klora", "bias": -0.3, "weight.style": 0.8, "prompt": None},
        {"rule": "klora", "bias": 0.3, "weight.style": 0.8, "prompt": None},
    ]


def test_the_plain_sum_is_no_column_twice() -> None:
    assert grid({"rule": ["klora", "direct", "np"]}).columns == (
        "direct sum",
        "rule klora",
        "rule np",
    )


def test_an_axis_that_changes_the_plain_sum_has_one_for_each_value() -> None:
    found = grid({"weight.style": [0.6, 1.0]})
    assert found.columns == ("direct sum, style 0.6", "direct sum, style 1", "style 0.6", "style 1")
    assert [cell.trial.config.settings.weights for cell in found.cells] == [
        {"style": 0.6},
        {"style": 1.0},
        {"style": 0.6},
        {"style": 1.0},
    ]
    assert [cell.trial.config.rule.name for cell in found.cells] == ["direct"] * 2 + ["klora"] * 2


def test_axes_of_rules_come_first_so_that_one_plain_sum_suffices() -> None:
    found = grid({"steps": [4, 20], "bias": [0.0, 0.2], "clock": ["step", "noise"]})
    assert found.columns == ("direct sum", "bias 0", "bias 0.2")
    assert found.rows == ("steps 4", "steps 20")
    assert found.sheets == ("clock step", "clock noise")
    assert len(found.cells) == 3 * 2 * 2
    assert found.cells[-1].name == "clock noise, steps 20, bias 0.2"
    last = found.cells[-1].trial
    assert (last.config.settings.clock, last.call) == ("noise", {"num_inference_steps": 20})


def test_settings_that_a_rule_does_not_have_are_idle_and_shown_once() -> None:
    found = grid({"bias": [0.0, 0.2], "rule": ["direct", "klora", "np"]})
    assert [[cell.repeats for cell in found.row(0, row)] for row in range(3)] == [
        [False, True, True],
        [False, False, False],
        [False, False, True],
    ]
    assert [cell.idle for cell in found.row(0, 2)] == [(), ("bias",), ("bias",)]
    assert len({cell.trial.key for cell in found.cells}) == 4


def test_the_steps_of_a_rule_are_those_of_the_sampling_unless_named() -> None:
    steps = [cell.trial.config.parameters()["steps"] for cell in switching({}).cells[1:]]
    assert steps == [6, 6]
    own = switching({"rule.steps": 12})
    assert [cell.trial.config.parameters()["steps"] for cell in own.cells[1:]] == [12, 12]
    assert [cell.trial.call for cell in own.cells] == [{"num_inference_steps": 6}] * 3


def switching(more: Mapping[str, Any]) -> Grid:
    return grid({"tau": [1, 2]}, rule="switch", steps=6, **more)


CELLS = [
    {"label": "mild", "rule": "klora", "bias": 0.1, "weight": {"style": 0.7}},
    {"rule": "ties", "density": 0.3, "seed": 4},
]


def test_a_list_of_cells_is_an_axis(tmp_path: Path) -> None:
    table = tmp_path / "cells.csv"
    table.write_text(
        "label,rule,bias,weight.style,density,seed\nmild,klora,0.1,0.7,,\n,ties,,,0.3,4\n"
    )
    (tmp_path / "cells.json").write_text(json.dumps(CELLS))
    ways = [CELLS, listed_cells(table), listed_cells(tmp_path / "cells.json")]
    for cells in ways:
        found = grid({"cells": cells})
        assert found.columns == (
            "direct sum, style 0.7",
            "direct sum, seed 4",
            "mild",
            "rule ties, density 0.3, seed 4",
        )
        assert [cell.trial.seed for cell in found.cells] == [0, 4, 0, 4]
        assert found.cells[3].trial.config.parameters()["density"] == 0.3


@pytest.mark.parametrize(
    ("axes", "base", "error"),
    [
        ({}, {}, "a sweep takes 1 to 3 settings with several values, found 0"),
        ({n: [1, 2] for n in ("bias", "steps", "seed", "mu")}, {}, "found 4; give the others"),
        ({"bias": []}, {}, "bias: expected one value or more, found none."),
        ({"bias": 0.3}, {}, "bias: expected one value or more, found 0.3."),
        ({"bias": [0.3, 0.3]}, {}, "bias: bias 0.3 occurs twice; name it once."),
        ({"bias": [0, 7]}, {}, "bias 7: bias: expected a number from -1 to 1, found 7."),
        ({"mu": [1, 2]}, {}, "mu: of the rules direct, klora none has this setting"),
        ({"bias": [0, 1]}, {"mu": 1.0}, "mu: of the rules direct, klora none has this setting"),
        ({"wieght.style": [0, 1]}, {}, "wieght.style: there is no such setting; expected rule,"),
        ({"cells": [{"rule": "np", "bias": 1}]}, {}, "bias: of the rules direct, np none has"),
        ({"cells": [3]}, {}, "cells: expected settings by name, found 3."),
    ],
)
def test_what_is_wrong(axes: Mapping[str, Any], base: Mapping[str, Any], error: str) -> None:
    with pytest.raises(ConfigError) as raised:
        grid(axes, **base)
    assert error in str(raised.value)


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("a.json", "[", "cannot be read: "),
        ("a.json", '{"rule": "np"}', "expected a list of JSON objects, a cell each."),
        ("a.csv", "rule,bias\nklora\n", "row 1 has more or fewer fields than the first line"),
        ("a.csv", "rule,bais\nklora,1\n", "bais: there is no such setting"),
        ("a.csv", "rule,bias\nklora,much\n", "bias: expected a number, found much."),
        ("a.csv", "rule\nnone\n", "rule: expected one of klora, "),
    ],
)
def test_lists_of_cells_that_are_wrong(tmp_path: Path, name: str, text: str, error: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        listed_cells(path)
    assert error in str(raised.value)
