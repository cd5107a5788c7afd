"""The arithmetic of the judges of drawings, and of intervals over subjects."""

from __future__ import annotations

import pytest
import torch
from drawings.judges.scores import Discriminant, gram, harmonic_mean, separation
from drawings.table.intervals import bootstrap, difference


def test_gram_is_the_mean_of_products_of_channels() -> None:
    features = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = [
        [
            float((features[picture, one] * features[picture, other]).mean())
            for one in range(3)
            for other in range(one, 3)
        ]
        for picture in range(2)
    ]
    assert torch.allclose(gram(features), torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize(
    ("one", "other", "mean"), [(1, 1, 1), (0.5, 1, 2 / 3), (0, 1, 0), (-0.5, 1, 0), (0.2, 0.2, 0.2)]
)
def test_harmonic_mean(one: float, other: float, mean: float) -> None:
    assert harmonic_mean(one, other) == pytest.approx(mean)


def test_the_bootstrap_resamples_subjects() -> None:
    values = [0.0, 0.0, 1.0]
    found = bootstrap(values)
    assert found == bootstrap(values)
    assert found.mean == pytest.approx(1 / 3)
    assert (found.low, found.high) == (0.0, 1.0)  # all the same subject: 8/27 and 1/27
    even = bootstrap([0.4] * 5)
    assert (even.low, even.high) == (pytest.approx(0.4), pytest.approx(0.4))


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
