"""How long measuring two LoRAs takes, beside the matrix products that it cannot do without.

    python examples/measure_speed.py

Layers have the shapes of SDXL's UNet and random weights. Each row does all layers of one LoRA: the
products alone, tile by tile; each product followed by ``torch.topk``; and klora's measure. The
rounds take turns, so that a machine that slows down slows down all three.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import click
import torch
from tqdm import tqdm

from klora_compile.measure import measure
from klora_compile.measure_tiles import TILE_ELEMENTS
from klora_compile.reading.layers import Layer

#: (out, in) of the linear layers in the blocks' attention and how many there are.
SHAPES = {
    (640, 640): 70,
    (640, 2048): 20,
    (5120, 640): 10,
    (640, 2560): 10,
    (1280, 1280): 432,
    (1280, 2048): 120,
    (10240, 1280): 60,
    (1280, 5120): 60,
}


@click.command()
@click.option("--rank", default=32, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--share", default=0.1, show_default=True, help="Of the layers, to save time.")
def main(rank: int, rounds: int, share: float) -> None:
    """Print seconds and ratios."""
    layers = [
        Layer.lora("unet", f"{out}x{inner}.{i}", *random_pair(out, inner, rank), rank, "rank")
        for (out, inner), count in SHAPES.items()
        for i in range(max(1, round(share * count)))
    ]
    ways: dict[str, Callable[[list[Layer], int], object]] = {
        "products alone": products,
        "products + torch.topk": products_and_topk,
        "klora": lambda some, k: measure(
            some, {layer.name: (k,) for layer in some}, device=torch.device("cpu")
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in tqdm(range(rounds), desc="rounds"):
        for name, way in ways.items():
            begin = time.perf_counter()
            way(layers, rank * rank)
            seconds[name].append(time.perf_counter() - begin)
    click.echo(f"{len(layers)} layers, rank {rank}, {torch.get_num_threads()} threads")
    for name, times in seconds.items():
        ratio = statistics.median(
            one / base for one, base in zip(times, seconds["products alone"], strict=True)
        )
        click.echo(f"{name:24} {statistics.median(times):7.2f} s   {ratio:5.2f} x the products")


def random_pair(out: int, inner: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """down and up."""
    return torch.randn(rank, inner), torch.randn(out, rank)


def products(layers: list[Layer], _: int) -> None:
    """Each delta in tiles that stay in the cache."""
    for layer in layers:
        rows = min(len(layer.up), max(1, TILE_ELEMENTS // layer.down.shape[1]))
        tile = torch.empty(rows, layer.down.shape[1])
        for start in range(0, len(layer.up), rows):
            some = layer.up[start : start + rows]
            torch.mm(some, layer.down, out=tile[: len(some)])


def products_and_topk(layers: list[Layer], k: int) -> None:
    """Each delta whole, its L1 norm and its K largest."""
    for layer in layers:
        delta = (layer.up @ layer.down).abs_()
        delta.sum()
        delta.reshape(-1).topk(k).values.sum()


if __name__ == "__main__":
    main()
