"""The time of measuring a LoRA, compared with the unavoidable matrix products.

    make bench-measuring                      # as the documents print it
    make bench-measuring ARGS="--cache"       # a second pair with the same subject
    make bench-measuring ARGS="--device cuda --model flux --share 1"

LoRAs are random and adapt the linear layers in the transformer blocks of SDXL (722) or FLUX.1
(494). Each row handles all layers of one LoRA. The rows take turns, so a machine that slows down
affects all of them. Ratios are medians over the rounds, to the faster way of the products.
"""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import click
import torch
from torch import nn
from tqdm import tqdm

from benchmark.memory import Peak
from benchmark.models import MODELS
from benchmark.timing import seconds_of
from klora_compile.measuring.batches import ELEMENTS
from klora_compile.measuring.measure import measure
from klora_compile.measuring.tiles import TILE_ELEMENTS
from klora_compile.profiles.once import measure_once
from klora_compile.profiles.store import Store
from klora_compile.reading.layers import Layer
from klora_compile.report.table import text_table
from klora_compile.threads import single_threads
from klora_runtime.devices.device_types import type_of
from klora_runtime.devices.names import as_device
from klora_runtime.devices.precision import full_float32

_ADAPTED = re.compile(r".*\.attentions\..*|(single_)?transformer_blocks\..*")
_CPU = torch.device("cpu")

#: Layer name -> (out, in).
Shapes = Mapping[str, tuple[int, int]]
Work = Callable[[], object]


@click.command()
@click.option("--model", type=click.Choice(["sdxl", "flux"]), default="sdxl", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--rank", default=32, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--share", default=0.1, show_default=True, help="Share of the layers, to save time.")
@click.option("--cache", is_flag=True, help="Time pairs with a cache of statistics instead.")
def main(model: str, device: str, rank: int, rounds: int, share: float, cache: bool) -> None:
    """Print seconds and ratios."""
    where = as_device(device)
    shapes = layer_shapes(model, share)
    click.echo(f"{model}: {len(shapes)} layers, rank {rank}; {type_of(where).describe(where)}")
    if cache:
        compare_pairs(shapes, rank, where)
    else:
        compare_ways(lora(shapes, rank, 0), rank, rounds, where)


def layer_shapes(model: str, share: float) -> Shapes:
    """Return the first layers of each shape, at least one."""
    denoiser = MODELS[model].denoiser(torch.device("meta"))
    found = {
        name: (module.out_features, module.in_features)
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Linear) and _ADAPTED.fullmatch(name)
    }
    left = {shape: max(1, round(share * count)) for shape, count in Counter(found.values()).items()}
    chosen = {}
    for name, shape in found.items():
        if left[shape]:
            left[shape] -= 1
            chosen[name] = shape
    return chosen


def lora(shapes: Shapes, rank: int, seed: int) -> list[Layer]:
    """Return random layers in float16, like most files."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Layer.lora(
            "denoiser",
            name,
            torch.randn(rank, inner, generator=generator).half(),
            torch.randn(out, rank, generator=generator).half(),
            float(rank),
            "rank",
        )
        for name, (out, inner) in shapes.items()
    ]


# --- measuring beside the products ---------------------------------------------------------------


def compare_ways(layers: list[Layer], rank: int, rounds: int, device: torch.device) -> None:
    """Print the times of products, products with ``torch.topk``, and klora."""
    known = type_of(device)
    ks = {layer.name: (rank * rank,) for layer in layers}
    kept = {n: tuple({rank * 2**i for i in range(9)} | set(k)) for n, k in ks.items()}
    ways: dict[str, Work] = {
        **(cpu_products(layers) if known.is_host else gpu_products(layers, device)),
        "products + torch.topk": lambda: products_and_topk(layers, rank * rank, device),
        "klora": lambda: measure(layers, ks, device=device),
        "klora, and all sums the cache keeps": lambda: measure(layers, kept, device=device),
    }
    if not known.is_host:
        for way in ways.values():  # lets a GPU set up
            way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, int | None] = {}
    with full_float32(), torch.inference_mode():
        for _ in tqdm(range(rounds), desc="rounds"):
            for name, way in ways.items():
                peak = None if known.is_host else Peak(device, emptied=False)
                seconds[name].append(seconds_of(way, device))
                peaks[name] = None if peak is None else peak.nbytes()
    products = [times for name, times in seconds.items() if name.startswith("products,")]
    fastest = [min(times) for times in zip(*products, strict=True)]
    rows = []
    for name, times in seconds.items():
        ratio = statistics.median(one / base for one, base in zip(times, fastest, strict=True))
        rows.append([name, f"{statistics.median(times):.2f}", f"{ratio:.2f}"])
        peak_bytes = peaks[name]
        told = "?" if peak_bytes is None else f"{peak_bytes / 2**20:.0f}"
        rows[-1] += [] if known.is_host else [told]
    heads = ["one LoRA", "seconds", "ratio", *([] if known.is_host else ["MiB on the device"])]
    click.echo(text_table(rows, heads=heads, numbers=True))
    click.echo(bounds(layers, rank, device))


def factors(layers: Sequence[Layer]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return up and down of every layer in float32."""
    return [(layer.up.float(), layer.down.float()) for layer in layers]


def cpu_products(layers: list[Layer]) -> dict[str, Work]:
    """Return the products alone, by tiles: split by torch, or one layer per thread."""
    pairs, threads = factors(layers), torch.get_num_threads()

    def multiply(some: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        memory = torch.empty(max(TILE_ELEMENTS, *(down.shape[1] for _, down in some)))
        for up, down in some:
            rows, columns = max(1, TILE_ELEMENTS // down.shape[1]), down.shape[1]
            for start in range(0, len(up), rows):
                part = up[start : start + rows]
                torch.mm(part, down, out=memory[: len(part) * columns].view(-1, columns))

    def by_layers() -> None:
        with single_threads("products", most=threads) as workers:
            list(workers.map(multiply, [pairs[i::threads] for i in range(threads)]))

    return {
        "products, threads inside each": lambda: multiply(pairs),
        "products, a thread for each layer": by_layers,
    }


def gpu_products(layers: list[Layer], device: torch.device) -> dict[str, Work]:
    """Return the products alone, of factors on the device, layers of one shape together."""
    alike: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
    for up, down in factors(layers):
        alike[torch.Size((len(up), down.shape[1]))].append((up.to(device), down.to(device)))

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for shape, pairs in alike.items():
            size = max(1, ELEMENTS // shape.numel())
            for start in range(0, len(pairs), size):
                ups, downs = zip(*pairs[start : start + size], strict=True)
                yield torch.stack(ups), torch.stack(downs)

    stacked = list(batches())
    memory = torch.empty(max(len(up) * up.shape[1] * down.shape[2] for up, down in stacked))
    memory = memory.to(device)

    def multiply() -> None:
        for up, down in stacked:
            shape = (len(up), up.shape[1], down.shape[2])
            torch.bmm(up, down, out=memory[: shape[0] * shape[1] * shape[2]].view(shape))

    return {"products, layers of a shape together": multiply}


def products_and_topk(layers: list[Layer], k: int, device: torch.device) -> None:
    """Compute each delta as a whole, its L1 norm and its K largest values."""
    for layer in layers:
        up, down = (matrix.to(device).float() for matrix in (layer.up, layer.down))
        delta = (up @ down).abs_()
        float(delta.sum()), float(delta.reshape(-1).topk(k).values.sum())


def bounds(layers: Sequence[Layer], rank: int, device: torch.device) -> str:
    """Return the bounds by arithmetic and memory, from a timed square product and a timed copy."""
    values = sum(layer.numel for layer in layers)
    side = 1536 if type_of(device).is_host else 4096
    square, block = torch.randn(side, side, device=device), torch.empty(2**26, device=device)
    other = torch.empty_like(block)
    with full_float32():
        product = min(seconds_of(lambda: square @ square, device) for _ in range(5))
    copy = min(seconds_of(lambda: other.copy_(block), device) for _ in range(5))
    flops, bandwidth = 2 * side**3 / product, 2 * 4 * len(block) / copy
    return (
        f"bounds: {2 * rank * values / 1e9:.0f} GFLOP at {flops / 1e9:.0f} GFLOP/s take "
        f"{2 * rank * values / flops:.3f} s; {4 * values / 1e9:.1f} GB of deltas, written and read "
        f"once at {bandwidth / 1e9:.0f} GB/s, {8 * values / bandwidth:.3f} s"
    )


# --- pairs ---------------------------------------------------------------------------------------


def compare_pairs(shapes: Shapes, rank: int, device: torch.device) -> None:
    """Print the times of two pairs with one subject, and one pair again, with a cache."""
    subject, *styles = (lora(shapes, rank, seed) for seed in range(3))
    ks = {layer.name: (rank * rank,) for layer in subject}
    times: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        for name, style in (
            ("a pair", styles[0]),
            ("the same subject, another style", styles[1]),
            ("the first pair again", styles[0]),
        ):
            begin = time.perf_counter()
            for layers in (subject, style):
                measure_once(layers, ks, device=device, store=store)
            times[name] = time.perf_counter() - begin
    first = next(iter(times.values()))
    rows = [[name, f"{seconds:.2f}", f"{seconds / first:.2f}"] for name, seconds in times.items()]
    click.echo(text_table(rows, heads=("measured", "seconds", "of the first"), numbers=True))
