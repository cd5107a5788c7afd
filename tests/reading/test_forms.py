"""Every layout in every form: each layer's delta is what its definition gives, to 1e-6."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from support.form_files import (
    CONVOLUTIONS,
    LINEAR,
    NORMS,
    Array,
    Source,
    Writer,
    Written,
    base_model,
    dora,
    magnitude_shape,
)
from support.layout_cells import (
    Cell,
    encoder_inside,
    encoder_names,
    lines,
    shape,
    values_of,
)
from support.layout_models import PARTS
from support.lora_files import write_lora
from support.page_table import PageTable, as_text
from support.pairs import some_pairs

from klora_compile import read_adapter
from klora_compile.families.tables import IN_DIFFUSERS_NAMES, WHOLE
from klora_compile.reading.adapter import Adapter
from klora_compile.reading.names.spelling import REFUSED_FORMS
from klora_compile.settings.read_options import ReadOptions
from klora_runtime.families.catalogue import FAMILIES
from klora_runtime.families.rows import Layout, Row
from klora_runtime.families.text_encoders import CLIP, GEMMA2, LLAMA, QWEN3, T5

ROWS = 10

IN_DIFFUSERS = (*IN_DIFFUSERS_NAMES, *(table for table in WHOLE if table.name == "diffusers"))


def denoiser_cells() -> Iterator[Cell]:
    for layout in (*WHOLE, *IN_DIFFUSERS_NAMES):
        stated = layout in IN_DIFFUSERS
        yield Cell(layout, "dots", f"{layout.component}." if stated else "diffusion_model.")
        if layout.component not in PARTS or not stated:
            yield Cell(layout, "underscores", "lora_unet_")


CELLS = [
    *denoiser_cells(),
    Cell(encoder_names(CLIP), "dots", "text_encoder."),
    Cell(encoder_inside(CLIP), "dots", "text_encoder."),
    Cell(encoder_inside(CLIP), "dots", "text_encoders.clip_l.transformer."),
    Cell(encoder_inside(CLIP), "underscores", "lora_te_"),
    Cell(encoder_inside(CLIP), "underscores", "lora_te1_"),
    Cell(encoder_inside(CLIP, "text_encoder_2"), "dots", "text_encoder_2."),
    Cell(encoder_inside(CLIP, "text_encoder_2"), "underscores", "lora_te2_"),
    Cell(encoder_names(T5, "text_encoder_2"), "underscores", "lora_te2_"),
    Cell(encoder_names(T5, "text_encoder_3"), "dots", "text_encoder_3."),
    Cell(encoder_names(T5, "text_encoder_3"), "dots", "text_encoders.t5xxl.transformer."),
    Cell(encoder_names(T5, "text_encoder_3"), "underscores", "lora_te3_"),
    Cell(encoder_names(QWEN3), "underscores", "lora_te_"),
    Cell(encoder_names(GEMMA2), "underscores", "lora_te_"),
    Cell(encoder_names(LLAMA), "underscores", "lora_te1_"),
]
UNETS = [cell for cell in CELLS if cell.layout.component == "unet"]


def is_norm(row: Row) -> bool:
    return "norm" in row.targets[0].rpartition(".")[2]


def is_convolution(row: Row) -> bool:
    return row.targets[0].rpartition(".")[2] in ("conv", "conv1", "conv2", "conv_in", "conv_out")


def chosen(layout: Layout, kind: str) -> list[Row]:
    """Some rows of a kind; all that part a weight, and all that tell a family by their width."""
    layers = [row for row in layout.rows if not row.is_parameter]
    rows = [row for row in layers if not is_norm(row) and not is_convolution(row)]
    if kind == "norm":
        return [row for row in layers if is_norm(row)][:ROWS]
    if kind == "convolution":
        return [row for row in layers if is_convolution(row)][:4]
    telling = [row for row in rows if row.split is not None or row.ratio is not None]
    return [*telling, *(row for row in rows if row not in telling)][: max(ROWS, len(telling))]


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
    assert adapter.survey.used == adapter.survey.keys
    told = {facts.name: (facts.shape, facts.form) for facts in adapter.survey.layers}
    assert told == {name: (layer.shape, layer.form) for name, layer in adapter.layers.items()}
    assert_deltas(adapter, dict(expected(cell.layout, modules)))
    return adapter


NORMED = [cell for cell in CELLS if chosen(cell.layout, "norm")]


@pytest.mark.parametrize(("cell", "form"), some_pairs(CELLS, LINEAR, share=8), ids=str)
def test_linear_layers(cell: Cell, form: str, tmp_path: Path) -> None:
    check(cell, "linear", LINEAR[form], tmp_path)


@pytest.mark.parametrize(("cell", "form"), some_pairs(UNETS, CONVOLUTIONS), ids=str)
def test_convolutions(cell: Cell, form: str, tmp_path: Path) -> None:
    check(cell, "convolution", CONVOLUTIONS[form], tmp_path)


@pytest.mark.parametrize(("cell", "form"), some_pairs(NORMED, NORMS), ids=str)
def test_norms(cell: Cell, form: str, tmp_path: Path) -> None:
    check(cell, "norm", NORMS[form], tmp_path)


@pytest.mark.parametrize(("cell", "axis"), some_pairs(CELLS, (0, 1)), ids=str)
def test_dora(cell: Cell, axis: int, tmp_path: Path) -> None:
    """A column's norm is that of the whole weight in the file, through fused rows."""
    modules = written(cell, "linear", LINEAR["LoRA"])
    bases = {}
    for seed, (_, one) in enumerate(modules.values()):
        new = Source(1000 + seed)
        assert one.weight is not None
        base, (magnitude, m) = new(*one.weight.shape)[1], new(*magnitude_shape(one.weight, axis))
        one.tensors[".dora_scale"] = magnitude
        bases[seed], one.weight = base, dora(base, one.weight, m, axis)
    weights = {}
    for seed, (source, (row, _)) in enumerate(modules.items()):
        found = cell.layout.match(source, flat=False)
        assert found is not None
        for place in row.placements(found[1], *shape(row)):
            weights[cell.layout.component, place.module] = lines(bases[seed], place.rows)
    path = file(cell, modules, tmp_path / "lora.safetensors")
    adapter = read_adapter(path, ReadOptions(base=base_model(tmp_path / "base", weights)))
    assert_deltas(adapter, dict(expected(cell.layout, modules)))
    assert {layer.form for layer in adapter.layers.values()} == {"dora"}


# --- the table in the docs ------------------------------------------------------------------

TABLE = PageTable("forms")
TEXT = {model.names.family: model.title for model in (CLIP, T5, QWEN3, GEMMA2, LLAMA)}
REFUSED = sorted({form for form in REFUSED_FORMS.values() if form.isidentifier()})


def rows_of_the_table() -> Iterator[str]:
    """Base model, whose names, spellings; then a column for each kind of test above."""
    heads = ["LoRA, bias", "LoCon, Tucker", "LoHa", "LoKr", "full", "norm", "DoRA, with `--base`"]
    columns = ["base model", "names", "spelling", *heads, ", ".join(REFUSED)]
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    families = dict.fromkeys(cell.layout.family for cell in CELLS)
    for family in families:
        own = [cell for cell in CELLS if cell.layout.family == family]
        names = ", ".join(dict.fromkeys(cell.layout.name for cell in own))
        spelling = ", ".join(dict.fromkeys(f"`{cell.prefix}`" for cell in own))
        linear = ["tested"]
        yield (
            "| "
            + " | ".join(
                [
                    FAMILIES[family].title if family in FAMILIES else TEXT[family],
                    names,
                    spelling,
                    *linear,
                    "tested" if any(cell in UNETS for cell in own) else "none",
                    *linear * 3,
                    "tested" if any(cell in NORMED for cell in own) else "none",
                    *linear,
                    "refused",
                ]
            )
            + " |"
        )


def test_the_table_in_the_docs_is_what_is_tested() -> None:
    """Run this file as a program to write it anew."""
    assert TABLE.read() == as_text(rows_of_the_table())


if __name__ == "__main__":
    TABLE.write(rows_of_the_table())
