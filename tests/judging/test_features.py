"""What judges see in a picture, and the arithmetic of scores."""

from __future__ import annotations

import pytest
import torch

from klora_compile.judging.features import colours, gram
from klora_compile.judging.intervals import bootstrap
from klora_compile.judging.own_pictures import harmonic_mean


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


def test_colours_are_counted_wherever_they_are() -> None:
    pictures = torch.zeros(2, 3, 4, 4)
    pictures[0, 0, :2] = 1.0  # half of it is red, the other half black
    pictures[1] = 0.6
    found = colours(pictures)
    assert found.shape == (2, 64)
    assert found[0, 3 * 16] == found[0, 0] == 0.5
    assert found[1, 2 * 16 + 2 * 4 + 2] == 1


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
