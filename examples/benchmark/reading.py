"""The share of reading in the time of compiling, for a warm disk and for slow disks.

    make bench-reading
    make bench-reading ARGS="--share 1 --rounds 3 --disk 500"

Two random LoRAs are read, measured and written, one step after the other. Slow disks are simulated:
each part of a file is slow on the first read and in memory afterwards, as the system would cache
it. The last column is the time that reading ahead could hide at most, if the processor were idle
while reading; if it is small, reading ahead is not worth its threads.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import click
import torch

from benchmark.loras import write_pair
from benchmark.measuring import layer_shapes
from klora_compile.compiler import compile_fusion
from klora_compile.reading.adapter import read_adapter
from klora_compile.reading.files.lora_file import LoraFile
from klora_compile.report.table import text_table
from klora_runtime import save_fusion

_BLOCK = 2**20

HEADS = ("disk", "reading", "measuring", "writing", "hidden at most")

#: Reading, measuring and writing, in seconds.
Steps = tuple[float, float, float]


@click.command()
@click.option("--model", type=click.Choice(["sdxl", "flux"]), default="sdxl", show_default=True)
@click.option("--rank", default=32, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--share", default=0.1, show_default=True, help="Share of the layers, to save time.")
@click.option(
    "--disk",
    "disks",
    type=click.FloatRange(1.0),
    multiple=True,
    default=(500.0, 100.0),
    show_default=True,
    help="MB/s of a simulated disk.",
)
def main(model: str, rank: int, rounds: int, share: float, disks: tuple[float, ...]) -> None:
    """Print seconds and shares."""
    with tempfile.TemporaryDirectory() as name:
        paths = write_pair(model, share, rank, Path(name))
        click.echo(
            f"{model}: {len(layer_shapes(model, share))} layers, rank {rank}, two files of "
            f"{paths[0].stat().st_size / 1e6:.0f} MB; CPU, {torch.get_num_threads()} threads"
        )
        runs: dict[float, list[Steps]] = {disk: [] for disk in (math.inf, *disks)}
        for _ in range(rounds):
            for disk, seconds in runs.items():
                with simulated_disk(1e6 * disk):
                    seconds.append(steps(paths))
        rows = [
            row("warm" if math.isinf(disk) else f"{disk:g} MB/s", seconds)
            for disk, seconds in runs.items()
        ]
        click.echo(text_table(rows, heads=HEADS, numbers=True))


def steps(paths: list[Path]) -> Steps:
    """Compile a pair step by step and return the seconds of each step."""
    moments = [time.perf_counter()]
    pair = [read_adapter(path) for path in paths]
    moments.append(time.perf_counter())
    fusion = compile_fusion(*pair, device="cpu")
    moments.append(time.perf_counter())
    save_fusion(fusion, paths[0].with_name("fused.klora.safetensors"), overwrite=True)
    moments.append(time.perf_counter())
    reading, measuring, writing = (b - a for a, b in pairwise(moments))
    return reading, measuring, writing


def row(name: str, runs: list[Steps]) -> list[str]:
    """Return a row with the fastest time of each step; other load can only add time."""
    fastest = [min(times) for times in zip(*runs, strict=True)]
    reading, measuring, _ = fastest
    hidden = min(reading, measuring) / sum(fastest)
    steps = (f"{seconds:.2f} s ({seconds / sum(fastest):.0%})" for seconds in fastest)
    return [name, *steps, f"{hidden:.1%}"]


@contextmanager
def simulated_disk(rate: float) -> Iterator[None]:
    """Read LoRA files at ``rate`` bytes per second inside the block, on the first read."""
    lock, there = threading.Lock(), set[tuple[Path, int]]()
    tensor = LoraFile.tensor

    def fetch(path: Path, start: int, stop: int) -> None:
        blocks = {(path, block) for block in range(start // _BLOCK, -(-stop // _BLOCK))}
        with lock:  # one disk
            time.sleep(len(blocks - there) * _BLOCK / rate)
            there.update(blocks)

    def slow_tensor(file: LoraFile, name: str) -> torch.Tensor:
        info = file.tensors[name]
        fetch(file.path, info.start, info.stop)
        return tensor(file, name)

    def slow_digest(file: LoraFile) -> str:
        digest = hashlib.sha256()
        with file.path.open("rb") as opened:
            for start in range(0, file.size, _BLOCK):
                fetch(file.path, start, min(start + _BLOCK, file.size))
                digest.update(opened.read(_BLOCK))
        return digest.hexdigest()

    sha256 = cached_property(slow_digest)
    sha256.__set_name__(LoraFile, "sha256")
    with patch.object(LoraFile, "tensor", slow_tensor), patch.object(LoraFile, "sha256", sha256):
        yield
