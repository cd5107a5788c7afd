"""Scores are provenance: whatever an artifact holds there, it can be looked at."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from support.golden_fusion import golden_fusion

from klora_compile.report.inspection import inspection
from klora_compile.report.summary import near_ties
from klora_compile.runs import Run

ANYTHING: list[Any] = [None, {"x": 1.0}, 3.0, {}]


@pytest.mark.parametrize("value", ANYTHING)
def test_scores_of_another_shape_are_shown_as_none(value: Any) -> None:
    scores = {"k": value, "ratio": value, "content": value, "style": value}
    whole = golden_fusion()
    entries = tuple(replace(entry, scores={"klora": scores}) for entry in whole.entries)
    fusion = replace(whole, entries=entries)
    layer = inspection(fusion)["layers"][0]
    number = value if isinstance(value, float) else None
    assert (layer["k"], layer["ratio"], layer["content_l1"]) == (number, number, None)
    assert not list(near_ties(fusion, [Run()]))
    json.dumps(inspection(fusion), allow_nan=False)
