"""The size of stored fusions and the loss of their pictures, for ``--compress`` and ``--thin``.

    make bench-size                             # the demo's LoRAs, drawn with its model
    make bench-size ARGS="CONTENT STYLE"        # any two LoRAs; bytes and errors only

Mixed precision (:mod:`benchmark.mixed_precision`) stands beside the last tolerance, in as many
bytes.

The bound is the size of the best possible code for independent Gaussian numbers with the same
spectra, by rate-distortion theory (reverse water-filling), without headers.

Pictures are compared as the demo's autoencoder decodes them, in [0, 1].
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from diffusers import StableDiffusionPipeline
from drawings.base.subjects import prompt
from drawings.shipped import GUIDANCE, STEPS, base, style_lora, subject_lora
from tqdm import tqdm

from benchmark.mixed_precision import mixed_of_size
from klora_compile import compile_fusion, read_adapter
from klora_compile.report.compression import compression_of
from klora_compile.report.table import markdown_table
from klora_compile.storing.compress import compress
from klora_compile.storing.thin import thin
from klora_compile.storing.tolerances import By, tolerances
from klora_runtime import apply_fusion, load_fusion, save_fusion
from klora_runtime.artifact.delta import LowRank
from klora_runtime.artifact.fusion import Fusion

PAIR = ("frog", "ink")
TOLERANCES = (0.001, 0.003, 0.01, 0.03, 0.1)
OF_LORAS = (0.01, 0.03, 0.1)
HEADS = (
    *("stored as", "bytes", "of the sources", "bound", "bits a number"),
    *("lost", "lost, worst layer", "read in"),
)
PICTURE_HEADS = ("difference of pictures", "PSNR")


@dataclass(frozen=True)
class Form:
    """A way to store a fusion."""

    name: str
    bytes: int
    share: float
    """Size relative to the sources' bytes."""
    bound: float | None
    """The least possible share; None for lossless storage."""
    kept: Kept | None
    """What is left of the numbers; None for lossless storage."""
    fusion: Fusion
    """The fusion after reading it again."""
    seconds: float | None
    """Seconds to read it; None if it was not written."""


@dataclass(frozen=True)
class Kept:
    """How numbers are kept; errors are relative Frobenius errors."""

    bits: float
    """Mean bits of a stored number."""
    lost: float
    """Error of all deltas together."""
    worst: float
    """Error of the delta that lost most."""

    @classmethod
    def of(cls, fusion: Fusion) -> Kept | None:
        """Return how a compressed fusion keeps its numbers; None if it is not compressed."""
        found = compression_of(fusion)
        if found is None:
            return None
        assert found.error is not None
        return cls(found.bits, found.error, found.worst)


@click.command()
@click.argument("files", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--steps", default=STEPS, show_default=True)
@click.option("--pictures", default=8, show_default=True, help="Seeds that are drawn.")
def main(files: Sequence[Path], steps: int, pictures: int) -> None:
    """Print a table, a row for each way to store the fusion of two LoRAs."""
    if len(files) not in (0, 2):
        raise click.UsageError(f"expected no files or two, found {len(files)}.")
    content, style = files or (subject_lora(PAIR[0]), style_lora(PAIR[1]))
    rows = []
    pipe = None if files else base()
    whole = None
    for form in tqdm(
        forms(content, style), desc="forms", total=len(TOLERANCES) + len(OF_LORAS) + 4
    ):
        row = list(cells(form))
        if pipe is not None:
            drawn = draw(pipe, form.fusion, steps, pictures)
            whole = drawn if whole is None else whole
            row += compared(drawn, whole)
        rows.append(row)
    if pipe is not None and whole is not None:
        bare = draw(pipe, None, steps, pictures)
        rows.append(["the bare model, without LoRAs", *("–" for _ in HEADS[1:])])
        rows[-1] += compared(bare, whole)
    click.echo(markdown_table(HEADS if pipe is None else (*HEADS, *PICTURE_HEADS), rows))


def forms(content: Path, style: Path) -> Iterator[Form]:
    """Yield the fusion of two LoRAs, stored and read again: unchanged, compressed, thin."""
    sources = {"content": content, "style": style}
    adapters = {name: read_adapter(path) for name, path in sources.items()}
    fusion = compile_fusion(*adapters.values())
    total = sum(path.stat().st_size for path in sources.values())
    named: list[tuple[str, Fusion, float | None]] = [("as it was", fusion, None)]
    for value in TOLERANCES:
        bound = gaussian_bytes(fusion, value) / total
        named.append((f"--compress {value:g}", compress(fusion, value), bound))
    for value in OF_LORAS:
        bound = gaussian_bytes(fusion, value, "lora") / total
        name = f"--compress {value:g} --compress-by lora"
        named.append((name, compress(fusion, value, by="lora"), bound))
    named.append(("--thin", thin(fusion, adapters), None))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.klora.safetensors"
        for name, one, least in named:
            size = save_fusion(one, file, overwrite=True)
            read, seconds = timed(file, sources if one.is_thin else None)
            yield Form(name, size, size / total, least, Kept.of(read), read, seconds)
            if name == f"--compress {TOLERANCES[-1]:g}":
                yield from _mixed(fusion, size, total)


def _mixed(fusion: Fusion, nbytes: int, total: int) -> Iterator[Form]:
    """Yield the fusion in mixed precision, in as many bytes."""
    for bits in (2, 3):
        found = mixed_of_size(fusion, bits, nbytes)
        kept = Kept(8 * found.nbytes / found.numbers, found.lost, max(found.errors))
        size = round(found.nbytes)
        name = f"mixed precision, {bits} bits and signs"
        yield Form(name, size, size / total, None, kept, found.fusion, None)


def timed(file: Path, sources: dict[str, Path] | None) -> tuple[Fusion, float]:
    """Return the fusion of a file, and the shortest of five reading times."""
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        fusion = load_fusion(file, sources=sources)
        seconds.append(time.perf_counter() - begin)
    return fusion, min(seconds)


def gaussian_bytes(fusion: Fusion, tolerance: float, by: By = "layer") -> float:
    """Return the bytes that Gaussian low-rank slots need for a tolerance.

    Every kept component of a slot loses the same energy D, shared by its two sides in proportion to
    their numbers. A side of n numbers needs n / 2 log2(energy / its share) bits.

    Args:
        by: see :func:`~klora_compile.storing.compress.compress`.
    """
    bits = 0.0
    shares = tolerances(fusion.entries, tolerance, by)
    stored = (
        (one, own[slot])
        for entry, own in zip(fusion.entries, shares, strict=True)
        for slot, one in entry.factors.items()
    )
    for one, own in stored:
        if not isinstance(one.delta, LowRank):
            continue
        rows, columns = one.delta.flattened().shape
        energies = one.delta.singular().values.square()
        level = water_level(energies, own**2 * float(energies.sum()))
        kept = energies[energies > level]
        for size in (rows, columns):
            share = size / (rows + columns)
            bits += float((size / 2 * torch.log2(kept / (level * share))).sum())
    return bits / 8


def water_level(energies: torch.Tensor, lost: float) -> float:
    """Return D such that the components lose ``lost`` in total: each loses D, or all it has."""
    low, high = 0.0, float(energies.max())
    for _ in range(60):
        middle = (low + high) / 2
        if float(energies.clamp_max(middle).sum()) > lost:
            high = middle
        else:
            low = middle
    return high


def cells(form: Form) -> Iterator[str]:
    """Yield the cells of a row, without pictures."""
    yield from (form.name, f"{form.bytes:,}", f"{form.share:.1%}")
    yield "–" if form.bound is None else f"{form.bound:.1%}"
    kept = form.kept
    if kept is None:
        yield from ("–", "0", "0")
    else:
        yield from (f"{kept.bits:.1f}", f"{kept.lost:.2%}", f"{kept.worst:.2%}")
    yield "–" if form.seconds is None else f"{1000 * form.seconds:.0f} ms"


@torch.no_grad()
def draw(
    pipe: StableDiffusionPipeline, fusion: Fusion | None, steps: int, count: int
) -> torch.Tensor:
    """Return (count, 3, 48, 48): one picture per seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    words = [prompt(*PAIR)] * count
    handle = None if fusion is None else apply_fusion(pipe, fusion)
    drawn: torch.Tensor = pipe(
        words,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        generator=generators,
        output_type="pt",
    ).images
    if handle is not None:
        handle.remove()
    return drawn


def compared(drawn: torch.Tensor, whole: torch.Tensor) -> tuple[str, str]:
    """Return the relative norm of the difference, and the peak signal-to-noise ratio in dB."""
    lost = float((drawn - whole).square().mean())
    if lost == 0.0:
        return "0", "equal"
    share = math.sqrt(lost / float(whole.square().mean()))
    return f"{share:.2%}", f"{-10 * math.log10(lost):.1f} dB"
