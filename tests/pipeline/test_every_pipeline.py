"""The pipelines of the table get on with fusions as it says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from support.sweep import comparing, page
from support.sweep.comparing import EQUAL, WITHIN, Found, look_at, recorded
from support.sweep.pipelines import pipeline_classes
from support.sweep.rounding import own_rounding
from torch import nn

#: Rows that ``make test`` takes: of a UNet without words, of a transformer, of two transformers.
CHEAP = ("DDIMPipeline", "FluxPipeline", "WanPipeline")

COMPARED = {name: found for name, found in page.read().items() if found.built is None}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in CHEAP else pytest.mark.slow, id=name)
        for name in COMPARED
    ],
)
def test_a_fusion_does_what_the_table_says(name: str) -> None:
    assert _without_rounding(page.as_written(look_at(name))) == _without_rounding(COMPARED[name])


@pytest.mark.parametrize(
    "name", ["FluxPipeline", pytest.param("Kandinsky3Pipeline", marks=pytest.mark.slow)]
)
def test_a_schedule_that_is_one_evaluation_late_differs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def recorded_early(pipe: Any, moments: list[float]) -> Iterator[None]:
        with recorded(pipe, moments):
            yield
        moments[:] = [*moments[1:], moments[-1]]

    monkeypatch.setattr(comparing, "recorded", recorded_early)
    assert [said.partition(" by ")[0] for said in look_at(name).modes] == ["differs"] * 2


def test_rounding_is_what_the_weights_magnify() -> None:
    layer = nn.Linear(8, 8, bias=False)
    nn.init.eye_(layer.weight)
    before = layer.weight.detach().clone()
    plain = own_rounding([layer], lambda: layer(torch.ones(8)).detach())
    magnified = own_rounding([layer], lambda: (layer(torch.ones(8)) - 0.999).detach())
    assert 1e-8 < plain < 1e-6
    assert 300 * plain < magnified < 3000 * plain
    assert layer.weight.equal(before)


def test_the_table_has_every_pipeline() -> None:
    version = page.PAGE.read_text().partition("diffusers ")[2].partition(",")[0]
    if version != diffusers.__version__:
        pytest.skip(f"the table is of diffusers {version}; make pipelines writes it anew")
    assert {*page.read()} == {*pipeline_classes()}
    assert {*CHEAP} <= {*COMPARED}


def test_what_is_not_compared_has_a_reason_in_words() -> None:
    said = [found.built for found in page.read().values() if found.built is not None]
    assert [why for why in said if re.search(r"Error\b|'\w+' object|^\w+Error", why)] == []
    assert {why.partition(":")[0] for why in said} <= {
        *("no denoising loop", "not buildable", "not compared"),
    }


def _without_rounding(found: Found) -> tuple[str | None, tuple[str, ...]]:
    """The verdicts; how far rounding goes, and whether it is seen, depends on the processor."""
    equal = [EQUAL if said.startswith(WITHIN) else said for said in found.modes]
    return found.built, tuple(re.sub(r" \(.*\)$", "", said) for said in equal)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    rounded = Found("EPipeline", None, ("equal", f"{WITHIN} (2e-04)"))
    found = {each.pipeline: each for each in (*EACH_KIND, rounded)}
    page.write(found, tmp_path / "page.md")
    assert page.read(tmp_path / "page.md") == found
    assert list(page.changes(found, found)) == []


def test_what_changed_is_said() -> None:
    before = {each.pipeline: each for each in EACH_KIND}
    after = {
        "APipeline": Found("APipeline", None, ("equal", "differs by 3e-03")),
        "CPipeline": before["CPipeline"],
        "DPipeline": Found("DPipeline", None, ("equal", "equal")),
    }
    assert list(page.changes(before, after)) == [
        "changed: APipeline: merge equal, branch differs by 3e-03, was merge equal, branch equal",
        "gone:    BPipeline: was merge equal, branch refused: a word",
        "new:     DPipeline: merge equal, branch equal",
    ]


EACH_KIND = (
    Found("APipeline", None, ("equal", "equal")),
    Found("BPipeline", None, ("equal", "refused: a word")),
    Found("CPipeline", "no denoising loop"),
)
