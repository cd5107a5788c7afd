"""The pipelines of the table get on with fusions as it says."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
from support.sweep import page
from support.sweep.comparing import Found, look_at
from support.sweep.pipelines import pipeline_classes

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
    assert page.as_written(look_at(name)) == COMPARED[name]


def test_the_table_has_every_pipeline() -> None:
    version = page.PAGE.read_text().partition("diffusers ")[2].partition(",")[0]
    if version != diffusers.__version__:
        pytest.skip(f"the table is of diffusers {version}; make pipelines writes it anew")
    assert {*page.read()} == {*pipeline_classes()}
    assert {*CHEAP} <= {*COMPARED}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    found = {each.pipeline: each for each in EACH_KIND}
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
