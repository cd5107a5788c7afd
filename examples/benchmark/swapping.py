"""The time to change to another of many pairs of LoRAs that one pipeline knows.

    make bench-swapping
    make bench-swapping ARGS="--model sdxl --device cuda"

Each pair has a content and a style LoRA of its own, with random weights. The ways take turns, in
each round to the same pair. A ratio is within a round, to diffusers' ``set_adapters``: below 1 is
faster.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import click
import torch
from diffusers.utils import logging
from tqdm import tqdm

from benchmark.loras import Files, write_files
from benchmark.models import MODELS, BenchModel
from benchmark.timing import Interval, ratios, seconds_of, turns
from klora_compile.report.table import text_table
from klora_runtime import FusionLibrary, apply_fusion
from klora_runtime.artifact.schedule import CONTENT, STYLE
from klora_runtime.devices.device_types import type_of
from klora_runtime.devices.names import as_device

#: Bytes of the library: all pairs are kept.
_BUDGET = 2**40


class Way(Protocol):
    """A way to have one of many pairs on a pipeline."""

    def know(self, pair: Files) -> None:
        """Learn one more pair."""

    def swap(self, pair: int) -> None:
        """Let a pair act, by its number in the order of :meth:`know`."""


class SetAdapters:
    """diffusers: every LoRA is loaded, and two of them are active."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._known = 0

    def know(self, pair: Files) -> None:
        """Load both LoRAs of a pair."""
        for role, path in ((CONTENT, pair.content), (STYLE, pair.style)):
            self._pipe.load_lora_weights(str(path), adapter_name=f"{role}-{self._known}")
        self._known += 1
        self.swap(self._known - 1)

    def swap(self, pair: int) -> None:
        self._pipe.set_adapters([f"{CONTENT}-{pair}", f"{STYLE}-{pair}"])


class LoadAgain:
    """diffusers: the two LoRAs of the pair are loaded, and those before are deleted."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._pairs: list[Files] = []

    def know(self, pair: Files) -> None:
        self._pairs.append(pair)

    def swap(self, pair: int) -> None:
        files = self._pairs[pair]
        if self._pipe.get_list_adapters():
            self._pipe.delete_adapters([CONTENT, STYLE])
        for role, path in ((CONTENT, files.content), (STYLE, files.style)):
            self._pipe.load_lora_weights(str(path), adapter_name=role)
        self._pipe.set_adapters([CONTENT, STYLE])


class HotSwap(LoadAgain):
    """PEFT: the numbers of the pair are read into the two LoRAs that are there."""

    def swap(self, pair: int) -> None:
        if not self._pipe.get_list_adapters():
            super().swap(pair)
        files = self._pairs[pair]
        for role, path in ((CONTENT, files.content), (STYLE, files.style)):
            self._pipe.load_lora_weights(str(path), adapter_name=role, hotswap=True)


class Klora:
    """klora: another fusion on the same handle.

    Args:
        pipe: the pipeline.
        mode: ``merge`` or ``branch``.
        in_memory: whether the fusions stay loaded; if not, each swap reads the artifact.
    """

    def __init__(self, pipe: Any, mode: str, *, in_memory: bool) -> None:
        self._pipe, self._mode, self._in_memory = pipe, mode, in_memory
        self._library = FusionLibrary(_BUDGET, device=pipe.device)
        self._paths: list[Path] = []
        self._handle: Any = None

    def know(self, pair: Files) -> None:
        self._paths.append(pair.artifact)
        if self._in_memory:
            self._library.get(pair.artifact)
        if self._handle is None:
            self._handle = apply_fusion(self._pipe, pair.artifact, self._mode)

    def swap(self, pair: int) -> None:
        if self._in_memory:
            self._handle.swap(self._library.get(self._paths[pair]))
        else:
            self._handle.swap(self._paths[pair], device=self._pipe.device)


@dataclass(frozen=True)
class _Row:
    what: str
    make: Callable[[Any], Way]
    writes_weights: bool = False
    """Whether it needs its own base weights, because it writes into them."""


def _klora(mode: str, *, in_memory: bool) -> Callable[[Any], Way]:
    return lambda pipe: Klora(pipe, mode, in_memory=in_memory)


_BASELINE = "set_adapters"

#: Name -> row, in the order of the table.
ROWS: Mapping[str, _Row] = {
    _BASELINE: _Row("diffusers, set_adapters", SetAdapters),
    "load": _Row("diffusers, load_lora_weights + set_adapters", LoadAgain),
    "hotswap": _Row("PEFT, hotswap", HotSwap),
    "merge": _Row("klora merge, from memory", _klora("merge", in_memory=True), True),
    "merge-disk": _Row("klora merge, from disk", _klora("merge", in_memory=False), True),
    "branch": _Row("klora branch, from memory", _klora("branch", in_memory=True)),
    "branch-disk": _Row("klora branch, from disk", _klora("branch", in_memory=False)),
}


@click.command()
@click.option("--model", type=click.Choice(sorted(MODELS)), default="sdxl-small", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--rank", default=16, show_default=True)
@click.option("--rounds", default=9, show_default=True)
@click.option(
    "--known",
    multiple=True,
    type=click.IntRange(min=2),
    default=(2, 57),
    show_default=True,
    help="The number of pairs that the pipeline knows. Repeat it, the smallest first.",
)
def main(model: str, device: str, rank: int, rounds: int, known: Sequence[int]) -> None:
    """Print milliseconds of a swap and ratios, for each number of known pairs."""
    where, chosen = as_device(device), MODELS[model]
    denoiser = chosen.denoiser(where)
    with tempfile.TemporaryDirectory() as folder, _without_warnings():
        pairs = list(_pairs(denoiser, chosen, Path(folder), rank, max(known)))
        ways = {
            name: row.make(_pipeline(chosen, denoiser, row.writes_weights))
            for name, row in ROWS.items()
        }
        click.echo(
            f"{model}, {str(chosen.dtype(where)).removeprefix('torch.')}, rank {rank}; "
            f"{type_of(where).describe(where)}; {rounds} rounds in turns"
        )
        begin = 0
        for count in sorted(set(known)):
            for pair in tqdm(pairs[begin:count], f"{count} pairs", leave=False):
                for way in ways.values():
                    way.know(pair)
            begin = count
            click.echo(f"\n{_table(count, race(ways, count, rounds, where))}")


def race(
    ways: Mapping[str, Way], known: int, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Return the seconds of a swap to each of some pairs, by the name of the way."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for name in names:  # warms up
        ways[name].swap(known - 1)
    for number, order in enumerate(turns(len(names), rounds)):
        pair = number * (known // 2 + 1) % known
        for name in (names[place] for place in order):
            seconds[name].append(seconds_of(partial(ways[name].swap, pair), device))
    return seconds


def _table(known: int, seconds: Mapping[str, Sequence[float]]) -> str:
    rows = []
    for name, times in seconds.items():
        milliseconds = Interval.of([1000 * each for each in times])
        ratio = Interval.of(ratios(times, seconds[_BASELINE]))
        rows.append([ROWS[name].what, _text(milliseconds, 1), _text(ratio, 3)])
    heads = (f"swap among {known} pairs", "ms", "ratio to set_adapters")
    return text_table(rows, heads=heads, numbers=True)


def _text(interval: Interval, digits: int) -> str:
    middle, low, high = (
        f"{value:.{digits}f}" for value in (interval.median, interval.low, interval.high)
    )
    return f"{middle} ({low} to {high})"


def _pairs(
    denoiser: Any, model: BenchModel, folder: Path, rank: int, count: int
) -> Iterator[Files]:
    for number in tqdm(range(count), "LoRAs", leave=False):
        place = folder / str(number)
        place.mkdir()
        yield write_files(denoiser, model.component, place, rank, first_seed=2 * number)


def _pipeline(model: BenchModel, denoiser: Any, own_weights: bool) -> Any:
    return model.pipeline(model.twin(denoiser, own_weights=own_weights))


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Say nothing about a second adapter, and about components without a LoRA."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logging.set_verbosity(before)
