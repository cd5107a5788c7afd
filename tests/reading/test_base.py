"""Base weights from a folder, against the live modules."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import families
from tiny_pipeline import tiny_pipeline

from klora_compile.reading.files.base import BaseModel
from klora_runtime.errors import LoraError
from klora_runtime.families import flux1, sdxl
from klora_runtime.families.rows import Layout


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "200KB"}, {"variant": "fp16"}])
def test_every_weight_of_a_folder(options: dict[str, Any], tmp_path: Path) -> None:
    pipe = tiny_pipeline("sdxl")
    pipe.save_pretrained(tmp_path, **options)
    with BaseModel(tmp_path) as base:
        for component in ("unet", "text_encoder", "text_encoder_2"):
            for name, value in getattr(pipe, component).named_parameters():
                module, _, parameter = name.removeprefix("text_model.").rpartition(".")
                assert torch.equal(base.weight(component, module, parameter), value)


@pytest.mark.parametrize("component", ["unet", "text_encoder", "text_encoder_2"])
def test_the_folder_of_one_component(component: str, tmp_path: Path) -> None:
    model = getattr(tiny_pipeline("sdxl"), component)
    model.save_pretrained(tmp_path)
    with BaseModel(tmp_path) as base:
        for name, value in model.named_parameters():
            module, _, parameter = name.removeprefix("text_model.").rpartition(".")
            assert torch.equal(base.weight(component, module, parameter), value)


PIPELINES = {"sdxl": lambda: tiny_pipeline("sdxl"), "flux": families.flux}


def checkpoint(layout: Layout, model: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """The weights and biases of a live model in the names of its authors."""
    modules = {
        name: m for name, m in model.named_modules() if getattr(m, "weight", None) is not None
    }
    stored: dict[str, torch.Tensor] = {}
    for row in layout.rows:
        pattern = re.escape(row.targets[0]).replace(r"\{\}", r"(\d+)")
        for numbers in (m.groups() for name in modules if (m := re.fullmatch(pattern, name))):
            parts = [modules[target.format(*numbers)] for target in row.targets]
            rows = sum(len(part.weight) for part in parts)
            places = row.placements(numbers, rows, parts[0].weight[0].numel())
            for parameter in ("weight", "bias"):
                values = [getattr(part, parameter, None) for part in parts]
                if any(value is None for value in values):
                    continue
                whole = torch.empty(rows, *values[0].shape[1:])
                for place, value in zip(places, values, strict=True):
                    taken = [i for r in (place.rows or (range(rows),)) for i in r]
                    whole[taken] = value.detach()
                stored[f"{prefix}{row.source.format(*numbers)}.{parameter}"] = whole
    return stored


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    ("family", "component", "layout"),
    [
        ("sdxl", "unet", sdxl.LDM),
        ("sdxl", "unet", sdxl.LDM.in_diffusers_names()),
        ("flux", "transformer", flux1.BFL),
    ],
)
def test_a_single_file(
    family: str, component: str, layout: Layout, prefix: str, tmp_path: Path
) -> None:
    """In the authors' names, with fused rows and swapped ones, and in diffusers'."""
    model = PIPELINES[family]().components[component]
    stored = checkpoint(layout, model, prefix)
    text = "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight"
    stored |= {text: torch.arange(3.0), "first_stage_model.conv.weight": torch.ones(1)}
    save_file(stored, tmp_path / "a.safetensors")
    known = layout.in_diffusers_names()
    named = {name for name, _ in model.named_modules() if known.match(name, flat=False)}
    compared = 0
    with BaseModel(tmp_path / "a.safetensors") as base:
        for name, module in model.named_modules():
            for parameter in ("weight", "bias"):
                value = getattr(module, parameter, None)
                if value is not None and name in named:
                    assert torch.equal(base.weight(component, name, parameter), value), name
                    compared += 1
        assert torch.equal(base.weight("text_encoder", "final_layer_norm"), torch.arange(3.0))
    assert compared > 60


def test_files_of_no_model_are_named(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(1), "b": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(LoraError, match="holds no model whose names klora knows"):
        BaseModel(tmp_path / "a.safetensors").shape("unet", "a")
    with pytest.raises(LoraError, match=r"base model .*: cannot be read: No such file"):
        BaseModel(tmp_path / "none.safetensors").shape("unet", "a")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoraError) as caught:
        BaseModel(tmp_path).shape("unet", "a")
    assert str(caught.value) == (
        f"base model {tmp_path}: has neither a model_index.json nor the config.json of a "
        "denoiser or a text encoder. Name a folder that diffusers saved."
    )
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "unet").mkdir()
    path = tmp_path / "unet" / "a.safetensors"
    save_file({"b.weight": torch.zeros(1, dtype=torch.int8)}, path)
    cases = {
        (
            "vae",
            "a",
        ): "has no safetensors files of vae. Save it again with pipe.save_pretrained(FOLDER).",
        ("unet", "a"): "has no unet.a.weight. Name the folder of the whole pipeline that the LoRA "
        "was trained for, as diffusers saves it.",
        ("unet", "b"): "unet.b.weight is I8, which is quantised. "
        "Give the model in float16, bfloat16 or float32.",
    }
    with BaseModel(tmp_path) as base:
        for (component, module), text in cases.items():
            with pytest.raises(LoraError) as caught:
                base.weight(component, module)
            assert str(caught.value) == f"base model {tmp_path}: {text}"
    save_file({"b.weight": torch.zeros(1)}, tmp_path / "unet" / "c.safetensors")
    with BaseModel(tmp_path) as base, pytest.raises(LoraError, match="two files of unet have b"):
        base.weight("unet", "b")


def test_a_config_that_is_nested_too_deeply_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with BaseModel(tmp_path) as base, pytest.raises(LoraError, match=r"nor the config\.json of a"):
        base.weight("unet", "conv_in", "weight")
