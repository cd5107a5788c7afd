"""What klora is compared with: the progress of each evaluation, and the literal rule around it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from random_loras import random_lora
from reference import KLora, sampling
from support.sweep.comparing import recorded
from torch import nn


class _Pipe(SimpleNamespace):
    """A denoiser of one layer, with its scheduler."""

    def __init__(self, **models: nn.Module) -> None:
        denoiser = nn.Sequential(nn.Linear(4, 4))
        super().__init__(transformer=denoiser, scheduler=DDIMScheduler(), **models)
        self.scheduler.set_timesteps(4)


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([0, 1, 1, 2, 3], [0.125, 0.375, 0.375, 0.625, 0.875]),
        ([1, 2, 3], [0.375, 0.625, 0.875]),
    ],
    ids=["goes back", "begins in the middle"],
)
def test_the_progress_of_an_evaluation_is_that_of_its_step(
    places: list[int], expected: list[float]
) -> None:
    pipe, sample = _Pipe(), torch.ones(1, 4)
    moments: list[float] = []
    with recorded(pipe, moments):
        for place in places:
            said = pipe.transformer(sample)
            pipe.scheduler.step(said, pipe.scheduler.timesteps[place], sample)
    assert moments == expected


def test_a_model_that_shares_a_layer_runs_with_the_weights_of_the_evaluation_to_come(
    tmp_path: Path,
) -> None:
    pipe = _Pipe()
    layer = pipe.transformer[0]
    pipe.controlnet = nn.Sequential(layer)
    files = [
        random_lora(
            {"transformer": pipe.transformer},
            tmp_path / f"{seed}.safetensors",
            lambda _: True,
            seed=seed,
            rank=2,
            strength=0.5,
        )
        for seed in (0, 1)
    ]
    bare = layer.weight.clone()
    held: dict[str, list[Any]] = {"controlnet": [], "transformer": []}
    with sampling(pipe, KLora(*files), [0.0, 1.0]):
        for _ in range(2):
            for name, weights in held.items():
                getattr(pipe, name)(torch.ones(1, 4))
                weights.append(layer.weight.clone())
    assert torch.equal(torch.stack(held["controlnet"]), torch.stack(held["transformer"]))
    assert not torch.equal(*held["transformer"])
    assert torch.equal(layer.weight, bare)
