"""The arithmetic of the judges of drawings, and of intervals over subjects."""

from __future__ import annotations

import pytest
import torch
from drawings.judges.scores import Discriminant, separation
from drawings.table.intervals import difference


def test_a_difference_is_that_of_means_over_subjects() -> None:
    one = {"a, x": [{"both": 0.9}, {"both": 0.9}], "b, x": [{"both": 0.1}]}
    other = {"a, x": [{"both": 0.6}, {"both": 0.6}], "b, x": [{"both": 0.5}]}
    apart = difference(other, one, "both")
    assert apart.mean == pytest.approx((-0.3 + 0.4) / 2)
    assert apart.text("+.2f") == "+0.05 (-0.30 to +0.40)"


def test_separation() -> None:
    assert separation([2, 3], [0, 1]) == 1.0
    assert separation([0, 1], [0, 1]) == 0.5
    assert separation([0, 3], [1, 2]) == 0.5


def test_the_discriminant_tells_groups_apart_that_a_cosine_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40, 6, generator=generator) * torch.tensor([9.0, 9, 9, 9, 9, 0.1])
    noise[:20, 5] += 1.0
    groups = ["a"] * 20 + ["b"] * 20
    seen = Discriminant.fit(noise, groups)(noise)
    assert torch.allclose(seen.norm(dim=1), torch.ones(40), atol=1e-5)
    same, apart = (seen[:20] @ seen[:20].T).mean(), (seen[:20] @ seen[20:].T).mean()
    assert same > 0.9
    assert apart < -0.9
