"""Every layout in every form: each layer's delta is what its definition gives, to 1e-6."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from form_files import CONVOLUTIONS, LINEAR, NORMS, Array, Source, Writer, Written
from lora_files import write_lora

from klora_compile import read_adapter
from klora_compile.reading.adapter import Adapter
from klora_compile.reading.layers import Layer
from klora_compile.reading.layouts.catalogue import IN_DIFFUSERS_NAMES, WHOLE
from klora_compile.reading.layouts.rows import Layout, Row

WIDTH = 16
ROWS = 10

#: Spelling -> what stands before a module of a denoiser, and between its names.
SPELLINGS = {"dotted": ("diffusion_model.", "."), "kohya": ("lora_unet_", "_")}

IN_DIFFUSERS = (*IN_DIFFUSERS_NAMES, *(table for table in WHOLE if table.name == "diffusers"))


@dataclass(frozen=True)
class Cell:
    """One layout in one spelling."""

    layout: Layout
    spelling: str

    def __str__(self) -> str:
        return f"{self.layout.family}, {self.layout.name}, {self.spelling}"

    def key(self, source: str) -> str:
        """A module's name in a file."""
        if self.layout in IN_DIFFUSERS and self.spelling == "dotted":
            return f"{self.layout.component}.{source}"
        prefix, joint = SPELLINGS[self.spelling]
        return prefix + source.replace(".", joint)


CELLS = [
    Cell(layout, spelling)
    for layout in (*WHOLE, *IN_DIFFUSERS_NAMES)
    for spelling in SPELLINGS
    if layout.component != "text_conditioner"
]


def is_norm(row: Row) -> bool:
    return "norm" in row.targets[0].rpartition(".")[2]


def is_convolution(row: Row) -> bool:
    return row.targets[0].rpartition(".")[2] in ("conv", "conv1", "conv2", "conv_in", "conv_out")


def chosen(layout: Layout, kind: str) -> list[Row]:
    """Some rows of a kind; all that part a weight, and all that tell a family by their width."""
    rows = [row for row in layout.rows if not is_norm(row) and not is_convolution(row)]
    if kind == "norm":
        return [row for row in layout.rows if is_norm(row)][:ROWS]
    if kind == "convolution":
        return [row for row in layout.rows if is_convolution(row)][:4]
    telling = [row for row in rows if row.split is not None or row.ratio is not None]
    return [*telling, *(row for row in rows if row not in telling)][: max(ROWS, len(telling))]


def shape(row: Row) -> tuple[int, int]:
    """A weight that the row's rule can part."""
    ratio = row.ratio
    if ratio is None:
        rule = "" if row.split is None else row.split.__name__
        ratio = Fraction({"thirds": 3, "square_thirds_and_rest": 7, "": 1}.get(rule, 2))
    inner = WIDTH * ratio.denominator
    return int(ratio * inner), inner


def lines(values: Array, rows: tuple[range, ...] | None) -> Array:
    return values if rows is None else values[[i for part in rows for i in part]]


def expected(
    layout: Layout, modules: Mapping[str, tuple[Row, Written]]
) -> Iterator[tuple[str, Array]]:
    """Name of each layer of diffusers, and its delta."""
    for source, (row, written) in modules.items():
        numbers = layout.match(source, flat=False)
        assert numbers is not None
        for place in row.placements(numbers[1], *shape(row)):
            name = f"{layout.component}.{place.module}"
            if written.weight is not None:
                yield name, lines(written.weight, place.rows)
            if written.bias is not None:
                yield f"{name}.bias", lines(written.bias, place.rows)


def values_of(layer: Layer) -> Array:
    return layer.scaling * layer.delta.matrix().reshape(layer.shape).numpy()


def assert_deltas(adapter: Adapter, deltas: Mapping[str, Array]) -> None:
    assert set(adapter.layers) == set(deltas)
    for name, delta in deltas.items():
        layer = adapter.layers[name]
        assert layer.shape == delta.shape, name
        error = np.abs(values_of(layer) - delta).max()
        assert error <= 1e-6 * np.abs(delta).max(), (name, error)


def written(cell: Cell, kind: str, form: Writer) -> dict[str, tuple[Row, Written]]:
    """Module name in dots -> what is written for it."""
    return {
        row.source.replace("{}", "0"): (row, form(Source(seed), *shape(row)))
        for seed, row in enumerate(chosen(cell.layout, kind))
    }


def file(cell: Cell, modules: Mapping[str, tuple[Row, Written]], path: Path) -> Path:
    tensors = {
        cell.key(source) + ending: tensor
        for source, (_, one) in modules.items()
        for ending, tensor in one.tensors.items()
    }
    return write_lora(path, tensors)


def check(cell: Cell, kind: str, form: Writer, folder: Path) -> Adapter:
    modules = written(cell, kind, form)
    assert modules
    if kind == "norm":  # no file has norms alone, and their names tell little
        modules |= written(cell, "linear", LINEAR["LoRA"])
    adapter = read_adapter(file(cell, modules, folder / "lora.safetensors"))
    assert adapter.used == adapter.keys
    assert_deltas(adapter, dict(expected(cell.layout, modules)))
    return adapter


@pytest.mark.parametrize("form", LINEAR)
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_linear_layers(cell: Cell, form: str, tmp_path: Path) -> None:
    check(cell, "linear", LINEAR[form], tmp_path)


@pytest.mark.parametrize("form", CONVOLUTIONS)
@pytest.mark.parametrize("cell", [c for c in CELLS if c.layout.component == "unet"], ids=str)
def test_convolutions(cell: Cell, form: str, tmp_path: Path) -> None:
    check(cell, "convolution", CONVOLUTIONS[form], tmp_path)


@pytest.mark.parametrize("form", NORMS)
@pytest.mark.parametrize("cell", [c for c in CELLS if chosen(c.layout, "norm")], ids=str)
def test_norms(cell: Cell, form: str, tmp_path: Path) -> None:
    check(cell, "norm", NORMS[form], tmp_path)
