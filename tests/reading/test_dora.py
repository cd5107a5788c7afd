"""Forms that say what a weight becomes: DoRA on both axes, new values; against a base model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from support.form_files import (
    ALPHA,
    DORA_LAYER,
    LINEAR,
    RANK,
    Source,
    base_model,
    dora,
    magnitude_shape,
    small_dora,
)
from support.layout_cells import Cell, lines, shape, values_of
from support.lora_files import FORMATS, smaller, write_lora

from klora_compile import compile_fusion, read_adapter
from klora_compile.reading.adapter import look_into
from klora_compile.settings.read_options import ReadOptions
from klora_runtime.artifact.delta import LowRank
from klora_runtime.errors import LoraError
from klora_runtime.families import flux1, sd1
from klora_runtime.families.rows import Row

KOHYA_FLUX, KOHYA_SD1 = (Cell(t, "underscores", "lora_unet_") for t in (flux1.BFL, sd1.LDM))
AXES = {"rows": 0, "columns": 1}


def row_of(cell: Cell, source: str) -> Row:
    return next(row for row in cell.layout.rows if row.source == source)


@pytest.mark.parametrize("form", ["LoRA", "LoHa", "LoKr", "LoKr, whole"])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(
    ("cell", "sources"),
    [
        (
            KOHYA_FLUX,
            (
                "double_blocks.{}.img_attn.qkv",
                "single_blocks.{}.linear1",
                "double_blocks.{}.img_mlp.2",
            ),
        ),
        (KOHYA_SD1, ("input_blocks.1.1.proj_in",)),
    ],
    ids=["flux", "sd1"],
)
def test_dora_of_every_form_on_both_axes(
    cell: Cell, sources: tuple[str, ...], axis: str, form: str, tmp_path: Path
) -> None:
    """Through fused rows: a column's norm is that of the whole fused weight."""
    tensors, weights, expected = {}, {}, {}
    for seed, source in enumerate(sources):
        row = row_of(cell, source)
        name = source.replace("{}", "0")
        new = Source(seed)
        written = LINEAR[form](new, *shape(row))
        assert written.weight is not None
        _, base = new(*written.weight.shape)
        magnitude, m = new(*magnitude_shape(base, AXES[axis]))
        tensors |= {cell.key(name) + ending: t for ending, t in written.tensors.items()}
        tensors[cell.key(name) + ".dora_scale"] = magnitude
        delta = dora(base, written.weight, m, AXES[axis])
        numbers = cell.layout.match(name, flat=False)
        assert numbers is not None
        for place in row.placements(numbers[1], *shape(row)):
            weights[cell.layout.component, place.module] = lines(base, place.rows)
            expected[f"{cell.layout.component}.{place.module}"] = lines(delta, place.rows)
    path = write_lora(tmp_path / "lora.safetensors", tensors)
    adapter = read_adapter(path, ReadOptions(base=base_model(tmp_path / "base", weights)))
    assert set(adapter.layers) == set(expected)
    for name, delta in expected.items():
        layer = adapter.layers[name]
        assert np.abs(values_of(layer) - delta).max() <= 1e-6 * np.abs(delta).max(), name
        assert (layer.form, layer.scaling) == ("dora", 1.0)
        if form != "LoKr, whole":
            assert (layer.rank, layer.alpha, layer.alpha_source) == (RANK, ALPHA, "tensor")


def test_dora_of_a_convolution(tmp_path: Path) -> None:
    name = "unet.down_blocks.0.resnets.0.conv1"
    new = Source(0)
    (down, d), (up, u), (_, base) = new(RANK, 4, 3, 3), new(8, RANK, 1, 1), new(8, 4, 3, 3)
    magnitude, m = new(1, 4, 1, 1)
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    path = write_lora(tmp_path / "a.safetensors", tensors | {f"{name}.dora_scale": magnitude})
    folder = base_model(tmp_path / "base", {("unet", name.removeprefix("unet.")): base})
    layer = read_adapter(path, ReadOptions(base=folder)).layers[name]
    expected = dora(base, np.einsum("or,rihw->oihw", u[:, :, 0, 0], d), m, 1)
    assert layer.shape == (8, 4, 3, 3)
    assert np.abs(values_of(layer) - expected).max() <= 1e-6 * np.abs(expected).max()


def test_vectors_of_magnitudes_are_told_by_all_layers(tmp_path: Path) -> None:
    """One layer that is not square tells for the whole file; squares alone tell nothing."""
    names = {f"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_{n}": n for n in "qk"}
    square, wide = names
    new = Source(3)
    parts: dict[str, torch.Tensor] = {}
    weights, expected = {}, {}
    for name, inner in ((square, 8), (wide, 6)):
        (down, d), (up, u), (_, base) = new(2, inner), new(8, 2), new(8, inner)
        magnitude, m = new(8)
        parts |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        parts[f"{name}.dora_scale"] = magnitude
        weights["unet", name.removeprefix("unet.")] = base
        expected[name] = dora(base, u @ d, m, 0)
    options = ReadOptions(base=base_model(tmp_path / "base", weights))
    adapter = read_adapter(write_lora(tmp_path / "a.safetensors", parts), options)
    for name, delta in expected.items():
        assert np.abs(values_of(adapter.layers[name]) - delta).max() <= 1e-6 * np.abs(delta).max()
    alone = {key: value for key, value in parts.items() if key.startswith(square)}
    with pytest.raises(LoraError, match="its weights are square, so rows and columns look alike"):
        read_adapter(write_lora(tmp_path / "b.safetensors", alone), options)
    parts[f"{square}.dora_scale"] = torch.ones(1, 8)
    parts[f"{wide}.dora_scale"] = torch.ones(8, 1)
    with pytest.raises(LoraError, match="some magnitudes belong to rows, others to columns"):
        read_adapter(write_lora(tmp_path / "c.safetensors", parts), options)
    parts[f"{wide}.dora_scale"] = torch.ones(7, 1)
    with pytest.raises(
        LoraError,
        match=r"magnitude \[7, 1\] matches neither the rows nor the columns of its weight \[8, 6\]",
    ):
        read_adapter(write_lora(tmp_path / "d.safetensors", parts), options)


def test_without_a_base_it_is_refused_and_shown(tmp_path: Path) -> None:
    path, _ = small_dora(tmp_path)
    with pytest.raises(LoraError) as caught:
        read_adapter(path)
    assert str(caught.value) == (
        f"LoRA file {path}: the base model's weights are needed for 1 module of the form "
        "dora. Name the base model "
        f"with --base PATH (a diffusers folder or one safetensors file).\n  - {DORA_LAYER}"
    )
    found, refused = look_into(path)
    assert str(refused) == str(caught.value)
    assert found.needs_base
    assert [(v.name, v.form, v.rank, v.shape) for v in found.layers] == [
        (DORA_LAYER, "dora", 2, (40, 30))
    ]


def test_a_base_of_another_shape_is_named(tmp_path: Path) -> None:
    path, _ = small_dora(tmp_path)
    other = base_model(
        tmp_path / "other", {("unet", DORA_LAYER.removeprefix("unet.")): np.ones((4, 4))}
    )
    with pytest.raises(LoraError, match=r"is \[4, 4\] in the base model, expected \[40, 30\]"):
        read_adapter(path, ReadOptions(base=other))


def test_the_artifact_says_against_which_base(tmp_path: Path) -> None:
    path, base = small_dora(tmp_path)
    options = ReadOptions(base=base, max_error=0.5)
    fusion = compile_fusion(path, read_adapter(path, options), options=options)
    notes = fusion.sources["content"].notes
    assert notes == fusion.sources["style"].notes
    assert notes["base"] == "base"
    assert notes["max_error"] == 0.5
    assert notes["forms"] == {"dora": {"lowrank": 1}}
    assert 0.0 < notes["error"] <= 0.5 + 1e-6


def test_an_allowed_error_gives_the_smallest_rank(tmp_path: Path) -> None:
    path, base = small_dora(tmp_path)
    exact = read_adapter(path, ReadOptions(base=base)).layers[DORA_LAYER]
    values = values_of(exact)
    singular = np.linalg.svd(values, compute_uv=False)
    for allowed in (0.4, 0.5):
        layer = read_adapter(path, ReadOptions(base=base, max_error=allowed)).layers[DORA_LAYER]
        assert isinstance(layer.delta, LowRank)
        tails = np.sqrt(np.cumsum(singular[::-1] ** 2)[::-1] / (singular**2).sum())
        assert layer.delta.rank == int((tails > allowed).sum())
        lost = np.linalg.norm(values_of(layer) - values) / np.linalg.norm(values)
        assert lost == pytest.approx(layer.error, rel=1e-3)
        assert lost <= allowed


def test_what_memory_does_not_hold_is_refused_before_it_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, base = small_dora(tmp_path)
    monkeypatch.setattr("klora_compile.reading.adapter.free_host_memory", lambda: 8000.0)
    with pytest.raises(LoraError) as caught:
        read_adapter(path, ReadOptions(base=base))
    assert str(caught.value) == (
        f"LoRA file {path}: its deltas are not low-rank and would need 4.8e-06 GB as dense "
        "deltas; 4e-06 GB are free. Pass --max-error 0.05 to approximate them."
    )
    assert read_adapter(path, ReadOptions(base=base, max_error=0.5)).layers
    pair = {
        key: torch.ones(4, 4)
        for key in (f"{DORA_LAYER}.lora_A.weight", f"{DORA_LAYER}.lora_B.weight")
    }
    assert read_adapter(write_lora(tmp_path / "b.safetensors", pair)).layers


# --- real key lists ---------------------------------------------------------------------------


def fixture(name: str) -> dict[str, torch.Tensor]:
    path = FORMATS / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"{path.name} of the shared data is absent")
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.rand(smaller(size), generator=generator) + 0.1
        for key, size in json.loads(path.read_text()).items()
    }


def whole_base(path: Path, folder: Path) -> Path:
    """A pipeline's folder with a random weight for every layer of a LoRA."""
    found, _ = look_into(path)
    components: dict[str, dict[str, torch.Tensor]] = {}
    for layer in found.layers:
        own = components.setdefault(layer.component, {})
        own[f"{layer.module}.{layer.parameter}"] = torch.randn(layer.shape)
    for component, tensors in components.items():
        (folder / component).mkdir(parents=True)
        write_lora(folder / component / "model.safetensors", tensors)
    (folder / "model_index.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("name", "components", "forms"),
    [
        (
            "flux_dora_onetrainer_format",
            {"text_encoder": 72, "text_encoder_2": 168, "transformer": 266},
            {"dora": 506},
        ),
        (
            "flux_control_lora_format",
            {"transformer": 1160},
            {"lora": 504, "bias": 504, "value": 152},
        ),
    ],
)
def test_real_key_lists_are_read_whole_against_a_base(
    name: str, components: Mapping[str, int], forms: Mapping[str, int], tmp_path: Path
) -> None:
    tensors = fixture(name)
    path = write_lora(tmp_path / "a.safetensors", tensors)
    adapter = read_adapter(path, ReadOptions(base=whole_base(path, tmp_path / "base")))
    assert adapter.survey.used == adapter.survey.keys == len(tensors)
    found = list(adapter.layers.values())
    assert {c: sum(v.component == c for v in found) for c in components} == components
    assert {f: sum(v.form == f for v in found) for f in forms} == forms
    assert len(found) == sum(components.values()) == sum(forms.values())
