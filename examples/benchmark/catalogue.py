"""Catalogues: time, memory and size of linking N subjects with N styles, and of one request.

    make bench-catalogue
    make bench-catalogue ARGS="--loras 200"

The LoRAs are synthetic profiles of SDXL's 722 attention and feed-forward layers: random numbers, as
linking reads nothing else. The last table is of real files: the LoRAs of the demo.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import click
import torch
from drawings.shipped import LORAS, STYLES, SUBJECTS, style_lora, subject_lora

from klora_compile.cataloguing.building import Draft, Selection, build, draft
from klora_compile.cataloguing.selecting import Filters, loras_of, matching
from klora_compile.cataloguing.terms import terms_of
from klora_compile.profiles.gathering import gather
from klora_compile.profiles.store import Store
from klora_compile.report.table import markdown_table
from klora_compile.settings.config import Config
from klora_compile.settings.read_options import ReadOptions
from klora_runtime import Catalogue, FusionLibrary
from klora_runtime.artifact.schedule import Source
from klora_runtime.catalogue.document import CataloguedLora, Keys, Kind
from klora_runtime.linking.numbers import Numbers, Place, Ranks, Table

RANKS = (8, 16, 32)
REQUESTS = 300

#: Bytes that the library of the last table may keep: all LoRAs of the demo.
_BUDGET = 2**30

#: Transformers of SDXL's U-Net: where, how many, blocks in each, width.
_TRANSFORMERS = (
    ("down_blocks.1", 2, 2, 640),
    ("down_blocks.2", 2, 10, 1280),
    ("mid_block", 1, 10, 1280),
    ("up_blocks.0", 3, 10, 1280),
    ("up_blocks.1", 3, 2, 640),
)


def sdxl_table() -> Table:
    """Return the 722 attention and feed-forward layers of SDXL's denoiser."""
    places = []
    for where, count, blocks, width in _TRANSFORMERS:
        for attention in range(count):
            path = f"{where}.attentions.{attention}"
            shapes = {f"{path}.{name}": (width, width) for name in ("proj_in", "proj_out")}
            for block in range(blocks):
                own = f"{path}.transformer_blocks.{block}"
                shapes |= {f"{own}.attn1.{name}": (width, width) for name in ("to_q", "to_k")}
                shapes |= {f"{own}.attn1.{name}": (width, width) for name in ("to_v", "to_out.0")}
                shapes |= {f"{own}.attn2.{name}": (width, width) for name in ("to_q", "to_out.0")}
                shapes |= {f"{own}.attn2.{name}": (width, 2048) for name in ("to_k", "to_v")}
                shapes |= {
                    f"{own}.ff.net.0.proj": (8 * width, width),
                    f"{own}.ff.net.2": (width, 4 * width),
                }
            places += [Place("unet", name, "weight", shape) for name, shape in shapes.items()]
    return Table(tuple(sorted(places)))


def synthetic(count: int) -> Draft:
    """Return a catalogue of ``count`` subjects and as many styles that are not linked yet."""
    table, random = sdxl_table(), Random(0)
    layers = len(table.places)
    ranks = {rank: Ranks((rank,) * layers) for rank in RANKS}
    keys = tuple(
        Keys("whole", f"{place.module}.lora_A.weight", f"{place.module}.lora_B.weight", None)
        for place in table.places
    )
    loras, numbers = [], []
    for number in range(2 * count):
        rank = random.choice(RANKS)
        generator = torch.Generator().manual_seed(number)
        rows = torch.rand(3 + len(RANKS), layers, generator=generator, dtype=torch.float64) + 0.1
        norm, frobenius, l1, *sums = rows.unbind()
        numbers.append(
            Numbers(
                table,
                ranks[rank],
                torch.ones(layers, dtype=torch.float64),
                norm,
                frobenius,
                l1,
                dict(zip(RANKS, sums, strict=True)),
            )
        )
        name = f"{'subject' if number < count else 'style'}-{number % count:04}"
        source = Source(f"{name}.safetensors", f"{number:064x}", 1, "peft", (rank,))
        digest = "0" * 64
        loras.append(
            CataloguedLora(
                name, {"whole": source}, ("sdxl",), table, ranks[rank], keys, RANKS, digest
            )
        )
    contents, styles = tuple(range(count)), tuple(range(count, 2 * count))
    return Draft(
        terms_of(Config(), ("content", "style")),
        tuple(loras),
        tuple(numbers),
        contents,
        styles,
        {},
        [Kind(None, "sdxl")],
        {(content, style): 0 for content in contents for style in styles},
        ("unet",),
    )


def peak_bytes() -> int:
    """Return the most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def percentiles(work: Callable[[], object], requests: int) -> tuple[float, float, float, float]:
    """Return median and 99th percentile of the seconds of a call, then both in time of a core.

    On a busy machine the first two contain the turns of other processes.
    """
    pairs = []
    for _ in range(requests):
        begin, busy = time.perf_counter(), time.thread_time()
        work()
        pairs.append((time.perf_counter() - begin, time.thread_time() - busy))
    columns = [sorted(column) for column in zip(*pairs, strict=True)]
    (half, most), (core_half, core_most) = (
        (column[requests // 2], column[requests * 99 // 100]) for column in columns
    )
    return half, most, core_half, core_most


@click.command()
@click.option("--loras", default=1000, show_default=True, type=click.IntRange(4, 2000))
@click.option("--requests", default=REQUESTS, show_default=True, type=click.IntRange(10, 10_000))
def main(loras: int, requests: int) -> None:
    """Print what N x N pairs of synthetic profiles of SDXL cost, and one pair of real LoRAs."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows, path = [], Path(folder) / "synthetic.safetensors"
        for count in sorted({max(2, loras // 10), max(2, loras // 3), loras}):
            rows.append(measured_row(count, path))
        heads = (
            *("subjects x styles", "linked in s", "us a pair", "us of a core a pair"),
            *("bytes a pair", "peak GB"),
        )
        click.echo(markdown_table(heads, rows))
        per_pair = float(rows[-1][2]) * 1e-6
        click.echo()
        serve(path, loras, requests)
        click.echo()
        _real(Path(folder), requests, per_pair)


def measured_row(count: int, path: Path) -> list[str]:
    """Link a catalogue, write it, and return its row."""
    found = synthetic(count)
    begin, busy = time.perf_counter(), time.process_time()
    built = build(found, path, overwrite=True)
    seconds, busy = time.perf_counter() - begin, time.process_time() - busy
    pairs = count * count
    return [
        f"{count} x {count}",
        f"{seconds:.1f}",
        f"{1e6 * seconds / pairs:.1f}",
        f"{1e6 * busy / pairs:.1f}",
        f"{built.nbytes / pairs:.0f}",
        f"{peak_bytes() / 1e9:.2f}",
    ]


def serve(path: Path, count: int, requests: int) -> None:
    """Print the times of requests for random pairs."""
    begin = time.perf_counter()
    catalogue = Catalogue.open(path)
    opened = time.perf_counter() - begin
    random = Random(1)

    def names() -> tuple[str, str]:
        return random.choice(catalogue.contents), random.choice(catalogue.styles)

    for content, style in zip(catalogue.contents, catalogue.styles, strict=True):
        catalogue.opened.link(content, style)  # numbers are read once
    rows: list[tuple[str | float, ...]] = [
        (f"open {count} x {count}", opened),
        (
            "link(a, b): every choice",
            *percentiles(lambda: catalogue.opened.link(*names()), requests),
        ),
        ("fusion(a, b), thin", *percentiles(lambda: catalogue.fusion(*names()), requests)),
        (
            "fusion(a, b), thin, and reading its entries",
            *percentiles(lambda: catalogue.fusion(*names()).entries, requests),
        ),
    ]
    _print_times(rows)


def _real(folder: Path, requests: int, per_pair: float) -> None:
    """Print the times of the demo's LoRAs, with factors and against ``klora compile``."""
    subjects = [subject_lora(name) for name in SUBJECTS]
    styles = [style_lora(name) for name in STYLES]
    store, path = Store(folder / "store"), folder / "demo.safetensors"
    begin = time.perf_counter()
    gather([*subjects, *styles], store, options=ReadOptions(), device="cpu", engine=None)
    profiled = time.perf_counter() - begin
    begin = time.perf_counter()
    stored = loras_of(store.profiles())
    roles = [
        matching(stored, [each.stem for each in files], Filters(), "--content")
        for files in (subjects, styles)
    ]
    build(draft(store, Selection(*roles, {}), Config()), path)
    linked = time.perf_counter() - begin
    catalogue, random = Catalogue.open(path, loras=LORAS), Random(2)
    seen = [(a, b) for a in catalogue.contents for b in catalogue.styles]
    library = FusionLibrary(_BUDGET, catalogue=catalogue)
    rows: list[tuple[str | float, ...]] = [
        (
            "fusion(a, b), its factors read and hashed",
            *percentiles(lambda: catalogue.fusion(*random.choice(seen)), requests),
        )
    ]
    for pair in seen:
        library.pair(*pair)
    rows += [
        (
            "pair(a, b) of a library that keeps the factors",
            *percentiles(lambda: library.pair(*random.choice(seen)), requests),
        ),
        (
            "pair(a, b), and reading its entries",
            *percentiles(lambda: library.pair(*random.choice(seen)).entries, requests),
        ),
    ]
    command = _seconds_of_compile(subjects[0], styles[0], folder)
    rows.append(("klora compile, its cache warm", command))
    click.echo(
        f"the demo's {len(subjects)} x {len(styles)}: profiled in {profiled:.1f} s, linked in "
        f"{linked:.2f} s with all reading and writing\n"
    )
    _print_times(rows)
    click.echo(
        f"\nklora compile takes {command / per_pair:.0f} times as long as linking a pair above"
    )


def _seconds_of_compile(content: Path, style: Path, folder: Path) -> float:
    """Return the seconds of the command, the second time."""
    output = folder / "pair.klora.safetensors"
    words = ("compile", content, style, "--force", "-o", output)
    command = [sys.executable, "-m", "klora_compile.cli", *map(str, words)]
    seconds = 0.0
    for _ in range(2):
        begin = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds = time.perf_counter() - begin
    return seconds


def _print_times(rows: Sequence[tuple[str | float, ...]]) -> None:
    """Print what was timed: its median alone, or median and P99 by both clocks."""
    cells = [[str(name), *(f"{1e3 * float(each):.2f}" for each in own)] for name, *own in rows]
    width = max(map(len, cells))
    heads = ("what", "median ms", "P99 ms", "median ms of a core", "P99 ms of a core")
    padded = [row + [""] * (width - len(row)) for row in cells]
    click.echo(markdown_table(heads[:width], padded))
