"""The time until a pipeline samples with a fusion, and the time to change to another fusion.

    make bench-attach
    make bench-attach ARGS="--model sdxl --device cuda"

Weights are random; nothing is downloaded. Each time is compared with the unavoidable work, done by
plain torch in the same round: reading the file's bytes, copying the weights that will change, and
one matrix product per layer. The two take turns, so a machine that slows down affects both. The
last table has the memory that each way takes beside the model.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from benchmark.loras import Files, all_switching, write_files
from benchmark.memory import Peak
from benchmark.models import MODELS
from benchmark.timing import seconds_of
from klora_compile.report.table import text_table
from klora_runtime import apply_fusion, load_fusion
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.devices.device_types import type_of
from klora_runtime.devices.names import as_device
from klora_runtime.devices.precision import full_float32

#: The tensors of a layer's product: live weight, base, down, up.
Product = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def read(file: Path, device: torch.device) -> torch.Tensor:
    """Return the bytes of a file on a device."""
    size = file.stat().st_size
    return torch.from_file(str(file), False, size, dtype=torch.uint8).to(device, copy=True)


def products_of(pipe: Any, fusion: Fusion, device: torch.device) -> list[Product]:
    """Return the product of one slot of each layer, on the weights' device."""
    found = []
    for entry in fusion.entries:
        module = getattr(pipe, entry.component).get_submodule(entry.module)
        weight = module.weight.data.reshape(entry.shape[0], -1)
        delta = next(iter(entry.factors.values())).delta
        down, up = delta.flattened().to(device, weight.dtype).tensors
        found.append((torch.empty_like(weight), weight, down, up))
    return found


def write_products(products: list[Product]) -> None:
    """Compute base + up @ down for every layer."""
    with torch.inference_mode(), full_float32():
        for live, base, down, up in products:
            torch.addmm(base, up, down, out=live)


def copy_weights(products: list[Product]) -> None:
    """Copy the weights that will change."""
    kept = [base.clone() for _, base, _, _ in products]
    del kept


#: How a fusion is applied: arguments of ``apply_fusion``.
Way = dict[str, Any]


class Subject:
    """A pipeline and an artifact that is applied in one way."""

    def __init__(self, pipe: Any, files: Files, way: Way, device: torch.device) -> None:
        self._pipe, self._files, self._way, self._device = pipe, files, way, device
        self.one = load_fusion(files.artifact, device=device)
        self.other = all_switching(load_fusion(files.artifact, device=device), files)
        self._products = products_of(pipe, self.one, device)

    def round(self) -> dict[str, tuple[float, float | None]]:
        """Return the seconds of each step, and of its unavoidable work."""
        file, device, pipe = self._files.artifact, self._device, self._pipe
        handles: list[Any] = []

        def attach() -> None:
            handles.append(apply_fusion(pipe, self.one, **self._way))

        times: dict[str, tuple[float, float | None]] = {}
        reading = self._time(lambda: read(file, device))
        loading = self._time(lambda: load_fusion(file, device=device))
        copying = self._time(lambda: copy_weights(self._products))
        product = self._time(lambda: write_products(self._products))
        attaching = self._time(attach)
        merges = self._way["mode"] == "merge"
        writes = copying + product if merges else None
        times["load the artifact"] = loading, reading
        times["attach it"] = attaching, writes
        whole = None if writes is None else reading + writes
        times["load and attach"] = loading + attaching, whole
        (handle,) = handles
        swap = self._time(lambda: handle.swap(self.other))
        floor = product if merges else None
        times["swap to another"] = swap, floor
        self._begin()
        times["switch all layers"] = self._time(lambda: pipe.scheduler.set_begin_index(1)), floor
        times["remove"] = self._time(handle.remove), None
        return times

    def memory(self) -> tuple[int | None, dict[str, int]]:
        """Return the peak of attaching and switching, and what stays in use, in bytes."""
        peak = Peak(self._device)
        with apply_fusion(self._pipe, self.other, **self._way) as handle:
            self._begin()
            self._pipe.scheduler.set_begin_index(1)
            found = peak.nbytes()
            kept = handle.report().nbytes
        return found, dict(kept)

    def _begin(self) -> None:
        """Begin a run of two steps."""
        scheduler = self._pipe.scheduler
        extra = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
        scheduler.set_timesteps(2, device=self._device, **extra)
        scheduler.set_begin_index(0)

    def _time(self, work: Callable[[], object]) -> float:
        return seconds_of(work, self._device)


@click.command()
@click.option("--model", type=click.Choice(sorted(MODELS)), default="sdxl-small", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--rank", default=16, show_default=True)
@click.option("--rounds", default=9, show_default=True)
def main(model: str, device: str, rank: int, rounds: int) -> None:
    """Print milliseconds and ratios, medians over the rounds."""
    where = as_device(device)
    chosen = MODELS[model]
    denoiser = chosen.denoiser(where)
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(denoiser, chosen.component, Path(folder), rank)
        click.echo(
            f"{model}, {str(chosen.dtype(where)).removeprefix('torch.')}, rank {rank}, artifact "
            f"{files.artifact_bytes / 1e6:.1f} MB; {type_of(where).describe(where)}; "
            f"medians of {rounds} rounds"
        )
        ways: dict[str, Way] = {
            "merge": {"mode": "merge"},
            "merge, base read back": {"mode": "merge", "base": saved(denoiser, Path(folder))},
            "branch": {"mode": "branch"},
        }
        memory = []
        for name, way in ways.items():
            subject = Subject(chosen.pipeline(denoiser), files, way, where)
            subject.round()  # warms up
            memory.append(memory_row(name, *subject.memory()))
            found = [subject.round() for _ in tqdm(range(rounds), name, leave=False)]
            rows = [row(each, [times[each] for times in found]) for each in found[0]]
            heads = (f"mode {name}", "ms", "needed", "ratio")
            click.echo(f"\n{text_table(rows, heads=heads, numbers=True)}")
        heads = ("MB beside the model", "peak", "base weights", "factors", "scratch")
        click.echo(f"\n{text_table(memory, heads=heads, numbers=True)}")


def saved(denoiser: Any, folder: Path) -> Path:
    """Return a file that the model could have been loaded from."""
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file(denoiser.state_dict(), str(file))
    return file


def memory_row(name: str, peak: int | None, kept: dict[str, int]) -> list[str]:
    """Return a row of the table of memory."""
    sums = (
        sum(size for what, size in kept.items() if what.startswith(purpose))
        for purpose in ("base weights", "factors", "scratch")
    )
    cells = ("?" if size is None else f"{size / 1e6:.1f}" for size in (peak, *sums))
    return [name, *cells]


def row(name: str, times: list[tuple[float, float | None]]) -> list[str]:
    """Return a row of the table, without the columns of unavoidable work if there is none."""
    own = statistics.median(time for time, _ in times)
    cells = [name, f"{1000 * own:.1f}"]
    needed = [(time, floor) for time, floor in times if floor is not None]
    if needed:
        ratio = statistics.median(time / floor for time, floor in needed)
        least = statistics.median(floor for _, floor in needed)
        cells += [f"{1000 * least:.1f}", f"{ratio:.2f}"]
    return cells
