"""How far the rounding of its weights alone takes a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from tiny_pipeline import relative_difference
from torch import nn

#: Draws of roundings; the worst counts. Some pipelines jump tenfold in one draw of four.
DRAWS = 12


def own_rounding(models: Iterable[nn.Module], generate: Callable[[], torch.Tensor]) -> float:
    """How much a generation changes when every weight moves to a neighbouring number.

    No two orders of the same sums agree better than that. The difference is relative, and the
    largest of a few draws, each of which moves every weight up or down.
    """
    models = list(models)
    exact = generate()
    found = []
    for seed in range(DRAWS):
        with nudged(models, seed):
            found.append(relative_difference(generate(), exact))
    return max(found)


@contextmanager
def nudged(models: Iterable[nn.Module], seed: int) -> Iterator[None]:
    """Move every weight to the next number of its dtype, up or down by chance; then back."""
    weights = dict.fromkeys(weight for model in models for weight in model.parameters())
    before = {weight: weight.detach().clone() for weight in weights}
    generator = torch.Generator().manual_seed(seed)
    try:
        for weight, value in before.items():
            up = torch.rand(value.shape, generator=generator) < 0.5
            ends = torch.where(up, torch.inf, -torch.inf).to(value)
            weight.data.copy_(torch.nextafter(value, ends))
        yield
    finally:
        for weight, value in before.items():
            weight.data.copy_(value)
