"""The pipelines of the table get on with fusions as it says."""

from __future__ import annotations

import diffusers
import pytest
from support.sweep.__main__ import PAGE, compared
from support.sweep.comparing import look_at
from support.sweep.pipelines import pipeline_classes

#: One row in how many ``make test`` takes.
SHARE = 12


@pytest.mark.parametrize(
    ("name", "modes"),
    [
        pytest.param(name, modes, marks=() if i % SHARE == 0 else pytest.mark.slow, id=name)
        for i, (name, modes) in enumerate(compared().items())
    ],
)
def test_a_fusion_does_what_the_table_says(name: str, modes: list[str]) -> None:
    found = look_at(name)
    assert found.built is None
    assert list(found.modes) == list(modes)


def test_the_table_has_every_pipeline() -> None:
    text = PAGE.read_text()
    version = text.partition("diffusers ")[2].partition(",")[0]
    if version != diffusers.__version__:
        pytest.skip(f"the table is of diffusers {version}; make pipelines writes it anew")
    assert len(compared()) > 50
    missing = [name for name in pipeline_classes() if f"| `{name}` |" not in text]
    assert not missing
