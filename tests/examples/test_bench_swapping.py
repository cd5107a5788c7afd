"""The part of the workshop that times swaps: each way lets the pair act that it is told."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from benchmark import swapping
from benchmark.loras import Files, write_files
from benchmark.models import MODELS
from click.testing import CliRunner
from torch import nn

CPU = torch.device("cpu")
TINY = MODELS["sd1-tiny"]

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def denoiser() -> nn.Module:
    return TINY.denoiser(CPU)


@pytest.fixture(scope="module")
def pairs(denoiser: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> list[Files]:
    found = []
    for number in range(2):
        folder = tmp_path_factory.mktemp(f"pair{number}")
        found.append(write_files(denoiser, TINY.component, folder, 2, first_seed=2 * number))
    return found


def images(name: str, denoiser: nn.Module, pairs: list[Files]) -> Iterator[torch.Tensor]:
    """What the pipeline gives with the second pair, the first one, and the second one again."""
    pipe = swapping._pipeline(TINY, denoiser, True)
    way = swapping.ROWS[name].make(pipe)
    for pair in pairs:
        way.know(pair)
    for number in (1, 0, 1):
        way.swap(number)
        arguments = TINY.arguments(CPU, 64, 1)
        yield pipe(**arguments, generator=torch.Generator().manual_seed(0)).images[0]


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("load", "set_adapters"),
        ("hotswap", "set_adapters"),
        ("merge-disk", "merge"),
        ("branch", "merge"),
        ("branch-disk", "merge"),
    ],
)
def test_each_way_lets_the_named_pair_act(
    name: str, same: str, denoiser: nn.Module, pairs: list[Files]
) -> None:
    with swapping._without_warnings():
        found = list(images(name, denoiser, pairs))
        expected = list(images(same, denoiser, pairs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert torch.equal(found[0], found[2])
    assert not torch.allclose(found[0], found[1], rtol=1e-3)


def test_the_table_has_a_row_for_each_way() -> None:
    command = "--model sd1-tiny --rank 1 --rounds 1 --known 2"
    result = CliRunner().invoke(swapping.main, command.split(), catch_exceptions=False)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert any(line.startswith("swap among 2 pairs") for line in lines)
    for row in swapping.ROWS.values():
        assert any(line.startswith(row.what) for line in lines)


def test_a_round_swaps_each_way_to_the_same_pair() -> None:
    told: dict[str, list[int]] = {"one": [], "other": []}

    class Teller:
        def __init__(self, name: str) -> None:
            self.name = name

        def know(self, pair: Files) -> None: ...

        def swap(self, pair: int) -> None:
            told[self.name].append(pair)

    ways = {name: Teller(name) for name in told}
    seconds = swapping.race(ways, 5, 4, CPU)
    assert told["one"] == told["other"]
    assert all(one != other for one, other in zip(told["one"], told["one"][1:], strict=False))
    assert [len(times) for times in seconds.values()] == [4, 4]
