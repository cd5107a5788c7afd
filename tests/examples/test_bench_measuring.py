"""The part of the workshop that times measuring: it runs, and measures the layers it says."""

from __future__ import annotations

import pytest
import torch
from benchmark import measuring
from click.testing import CliRunner


@pytest.mark.parametrize(("model", "count"), [("sdxl", 722), ("flux", 494)])
def test_layers_of_the_real_models(model: str, count: int) -> None:
    shapes = measuring.layer_shapes(model, 1.0)
    assert len(shapes) == count
    few = measuring.layer_shapes(model, 0.01)
    assert set(few.values()) == set(shapes.values())
    assert len(few) < count / 20


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ([], ["products, a thread for each layer", "products + torch.topk", "klora", "bounds: "]),
        (["--cache"], ["a pair", "the same subject, another style", "the first pair again"]),
    ],
)
def test_it_runs(options: list[str], rows: list[str]) -> None:
    command = ["--share", "0.001", "--rounds", "1", "--rank", "2", *options]
    result = CliRunner().invoke(measuring.main, command, catch_exceptions=False)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith("sdxl: 8 layers, rank 2; CPU, ")
    for row in rows:
        assert any(line.startswith(row) for line in lines)


def test_products_of_a_gpu_are_those_of_all_layers() -> None:
    """Seen on a CPU: the same stacks."""
    layers = measuring.lora({"a": (6, 4), "b": (3, 5), "c": (6, 4)}, 2, 0)
    (work,) = measuring.gpu_products(layers, torch.device("cpu")).values()
    work()
