"""Decisions on real LoRAs, equal to what the authors' own implementation chose on them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.lora_files import SHARED_DATA, needs_decisions, needs_real_loras

from klora_compile import Settings, compile_fusion, read_adapter
from klora_compile.measuring import measure as measuring
from klora_compile.measuring.statistics import Statistics
from klora_compile.reading.adapter import Adapter
from klora_compile.reading.layers import Layer
from klora_compile.rules import Klora
from klora_runtime.artifact.fusion import Entry

pytestmark = [needs_real_loras, needs_decisions]

PAIRS = [
    ("sd2_character", "sd2_illustration", 128),
    ("sd2_character", "sd2_popart", 128),
    ("sd15_animation", "sd15_analog", 144),
]
GRID = [i / 100 for i in range(100)]


@cache
def expected(content: str, style: str) -> dict[str, Any]:
    path = SHARED_DATA / "decisions" / f"{content}__{style}.json"
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


@cache
def adapter(file: str) -> Adapter:
    return read_adapter(SHARED_DATA / "loras" / file)


@pytest.fixture(autouse=True, scope="module")
def measured_once() -> Iterator[None]:
    """The statistics of a pair are the same under every setting; only the first one measures."""
    store: dict[tuple[int, ...], dict[str, Statistics]] = {}
    really = measuring.measure

    def measure(layers: Sequence[Layer], ks: Any, **rest: Any) -> dict[str, Statistics]:
        key = (*map(id, layers), *(k for each in ks.values() for k in each))
        if key not in store:
            store[key] = really(layers, ks, **rest)
        return store[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "measure", measure)
        yield


@cache
def fused(content: str, style: str, gamma: Any, pattern: Any) -> tuple[Mapping[str, Any], ...]:
    """The unet's entries, and gamma."""
    wanted = expected(content, style)
    fusion = compile_fusion(
        adapter(wanted["content"]["file"]),
        adapter(wanted["style"]["file"]),
        Klora(semantics="authors", gamma=gamma, pattern=pattern),
        Settings(text_encoder="none"),
        device="cpu",
    )
    assert fusion.sources["content"].sha256 == wanted["content"]["sha256"]
    assert fusion.sources["style"].sha256 == wanted["style"]["sha256"]
    entries = {entry.module: entry for entry in fusion.entries if entry.component == "unet"}
    return entries, fusion.rule.derived["gamma"]


def letters(entry: Entry) -> str:
    """``c`` or ``s`` at each progress of the grid."""
    rows = (entry.timeline.at(t) for t in GRID)
    return "".join("c" if row["content"] > row["style"] else "s" for row in rows)


@pytest.mark.parametrize(("content", "style", "layers"), PAIRS)
@pytest.mark.parametrize("gamma", ["paper", "code"])
@pytest.mark.parametrize("pattern", ["s", "s*"])
def test_choices_are_those_of_the_authors_everywhere(
    content: str, style: str, layers: int, gamma: str, pattern: str
) -> None:
    wanted = expected(content, style)
    assert (wanted["alpha"], wanted["beta"], wanted["grid"]) == (1.5, {"s": 0.5, "s*": 1.275}, 100)
    entries, found_gamma = fused(content, style, gamma, pattern)
    assert math.isclose(found_gamma["unet"], wanted["gamma"][gamma], rel_tol=1e-6)
    assert len(wanted["layers"]) == layers
    assert set(wanted["layers"]) <= set(entries)
    compared = 0
    for name, layer in wanted["layers"].items():
        entry = entries[name]
        if "choice" not in layer:
            assert entry.fate in ("zero", "one-sided"), name
            continue
        assert letters(entry) == layer["choice"][f"{gamma}/{pattern}"], name
        compared += 1
    assert compared == sum(
        1 for v in wanted["layers"].values() if v["content_l1"] > 0 and v["style_l1"] > 0
    )
    assert compared >= 96


@pytest.mark.parametrize(("content", "style", "layers"), PAIRS)
def test_statistics_are_those_of_the_authors(content: str, style: str, layers: int) -> None:
    entries, _ = fused(content, style, "paper", "s")
    names = {"content_topk": ("content", "top_k"), "style_topk": ("style", "top_k")}
    names |= {"content_l1": ("content", "l1"), "style_l1": ("style", "l1")}
    for name, layer in expected(content, style)["layers"].items():
        scores = entries[name].scores["klora"]
        assert scores["k"] == layer["k"]
        for field, (slot, statistic) in names.items():
            found, wanted = scores[slot][statistic], layer[field]
            assert math.isclose(found, wanted, rel_tol=1e-6), (name, field, found, wanted)


def test_every_decision_file_is_compared() -> None:
    files = {path.stem for path in Path(SHARED_DATA / "decisions").glob("*.json")}
    assert files == {f"{content}__{style}" for content, style, _ in PAIRS}
