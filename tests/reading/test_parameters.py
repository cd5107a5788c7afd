"""Differences of parameters that are no module's weight or bias: read, compiled, applied whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.bases import torchao_int8
from support.generation import TOLERANCE
from support.lightx2v import RANK, TABLES, WIDTH, lightx2v
from support.lora_files import random_pair, write_lora
from support.video_families import VIDEOS
from tiny_pipeline import relative_difference

from klora_compile import compile_fusion, read_adapter
from klora_compile.rules import Direct, Klora, NpLora
from klora_compile.settings.read_options import ReadOptions
from klora_compile.verify import verify_fusion
from klora_runtime import apply_fusion, load_fusion, save_fusion
from klora_runtime.artifact.delta import Dense
from klora_runtime.errors import LoraError

(CASE,) = (case for case in VIDEOS if case.name == "Wan 2.2")


def tables(path: Path) -> dict[str, torch.Tensor]:
    layers = read_adapter(path).layers
    return {
        layer.module: layer.delta.matrix().reshape(layer.shape)
        for layer in layers.values()
        if layer.parameter == "scale_shift_table"
    }


def test_every_key_of_such_a_file_is_used(tmp_path: Path) -> None:
    adapter = read_adapter(lightx2v(tmp_path / "lora.safetensors", 1))
    assert adapter.survey.used == adapter.survey.keys
    assert adapter.survey.families == ("wan", "wan-vace")  # both have these layers
    own = {layer.module: layer for name, layer in adapter.layers.items() if "shift_table" in name}
    assert {module: layer.shape for module, layer in own.items()} == dict(TABLES.values())
    assert all(layer.scaling == 1.0 for layer in own.values())
    assert "transformer.scale_shift_table" in adapter.layers


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("diffusion_model.blocks.0.modulation.diff", "transformer.blocks.0.scale_shift_table"),
        ("lora_unet__blocks_0.diff_m", "transformer.blocks.0.scale_shift_table"),
        ("transformer.blocks.0.scale_shift_table.diff", "transformer.blocks.0.scale_shift_table"),
        ("transformer.scale_shift_table.diff", "transformer.scale_shift_table"),
    ],
)
def test_the_same_difference_in_other_spellings(key: str, name: str, tmp_path: Path) -> None:
    values = torch.randn(1, 6, WIDTH)
    adapter = read_adapter(write_lora(tmp_path / "lora.safetensors", {key: values}))
    assert set(adapter.layers) == {name}
    assert torch.equal(adapter.layers[name].delta.values, values)


def test_a_difference_of_few_ranks_stays_as_it_is(tmp_path: Path) -> None:
    """No module multiplies with it, so factors would be of no use."""
    values = torch.outer(torch.randn(6), torch.randn(64))
    key = "diffusion_model.transformer_blocks.0.scale_shift_table.diff"
    (layer,) = read_adapter(
        write_lora(tmp_path / "lora.safetensors", {key: values})
    ).layers.values()
    assert isinstance(layer.delta, Dense)


def test_factors_of_such_a_parameter_are_refused(tmp_path: Path) -> None:
    down, up = random_pair(6, WIDTH, RANK)
    path = write_lora(
        tmp_path / "lora.safetensors",
        {
            "diffusion_model.blocks.0.modulation.lora_down.weight": down,
            "diffusion_model.blocks.0.modulation.lora_up.weight": up,
        },
    )
    with pytest.raises(LoraError) as caught:
        read_adapter(path)
    (issue,) = caught.value.issues
    assert issue == (
        "blocks.0.modulation: blocks.0.scale_shift_table is a parameter and no layer, expected its "
        "difference alone"
    )


@pytest.mark.parametrize("rule", [Klora(), Direct(), NpLora()], ids=lambda rule: rule.name)
def test_an_artifact_is_what_its_files_give(rule: Any, tmp_path: Path) -> None:
    content, style = (lightx2v(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    path = tmp_path / "a.klora.safetensors"
    save_fusion(compile_fusion(content, style, rule, device="cpu"), path)
    fusion = load_fusion(path, check="full")
    assert {entry.layer for entry in fusion.entries if "shift_table" in entry.layer} == {
        ".".join(filter(None, ("transformer", module, "scale_shift_table")))
        for module, _ in TABLES.values()
    }
    assert not verify_fusion(fusion, {"content": content, "style": style}, device="cpu")


def test_no_input_directions_are_taken_off_a_table(tmp_path: Path) -> None:
    content, style = (lightx2v(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    fusion = compile_fusion(content, style, NpLora(), device="cpu")
    for entry in fusion.entries:
        if entry.parameter == "scale_shift_table":
            found = entry.factors["content"].delta.matrix().reshape(entry.shape)
            assert torch.equal(found, tables(content)[entry.module])


@pytest.mark.parametrize("mode", ["merge", "branch"])
def test_a_file_acts_whole(mode: str, tmp_path: Path) -> None:
    """As the same numbers do that are added to the model by hand."""
    content, style = (lightx2v(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    fusion = compile_fusion(content, style, Direct(), device="cpu")
    pipe = CASE.pipeline()
    bare = CASE.generate(pipe)
    with apply_fusion(pipe, fusion, mode=mode):
        found = CASE.generate(pipe)
    assert torch.equal(CASE.generate(pipe), bare)
    by_hand(pipe, content, style)
    expected = CASE.generate(pipe)
    assert relative_difference(found, expected) < TOLERANCE
    for path in (content, style):  # without the tables it is another picture
        for module, delta in tables(path).items():
            pipe.transformer.get_submodule(module).scale_shift_table.data -= delta.float()
    assert relative_difference(found, CASE.generate(pipe)) > 100 * TOLERANCE


def by_hand(pipe: Any, *files: Path) -> None:
    for path in files:
        for layer in read_adapter(path).layers.values():
            module = pipe.transformer.get_submodule(layer.module)
            parameter = module.get_parameter(layer.parameter)
            delta = layer.scaling * layer.delta.matrix()
            parameter.data.add_(delta.reshape(parameter.shape).to(parameter.dtype))


def test_both_modes_switch_alike(tmp_path: Path) -> None:
    content, style = (lightx2v(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    fusion = compile_fusion(content, style, Klora(), device="cpu")
    assert any(entry.timeline.switches for entry in fusion.entries if "table" in entry.parameter)
    pipe = CASE.pipeline()
    found = []
    for mode in ("merge", "branch"):
        with apply_fusion(pipe, fusion, mode=mode):
            found.append(CASE.generate(pipe))
    assert relative_difference(*found) < TOLERANCE


def test_a_quantised_base_keeps_tables_that_are_written(tmp_path: Path) -> None:
    content, style = (lightx2v(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    fusion = compile_fusion(content, style, Direct(), device="cpu")
    pipe = CASE.pipeline()
    torchao_int8(pipe.transformer)
    block = pipe.transformer.blocks[1]
    before = block.scale_shift_table.detach().clone()
    with apply_fusion(pipe, fusion, mode="branch"):
        written = tables(content)["blocks.1"] + tables(style)["blocks.1"]
        torch.testing.assert_close(block.scale_shift_table.double() - before, written)
    assert torch.equal(block.scale_shift_table, before)


def test_a_new_value_needs_the_base(tmp_path: Path) -> None:
    """Of a folder of diffusers, and of one file in the authors' names."""
    pipe = CASE.pipeline()
    own = pipe.transformer.blocks[0].scale_shift_table.detach()
    new = torch.randn(own.shape)
    path = write_lora(
        tmp_path / "lora.safetensors", {"diffusion_model.blocks.0.modulation.set_weight": new}
    )
    with pytest.raises(LoraError, match="needed for 1 module of the form value"):
        read_adapter(path)
    pipe.transformer.save_pretrained(tmp_path / "folder")
    save_file(
        {
            "blocks.0.modulation": own.contiguous(),
            "blocks.0.self_attn.q.weight": torch.zeros(WIDTH, WIDTH),
        },
        tmp_path / "model.safetensors",
    )
    for base in (tmp_path / "folder", tmp_path / "model.safetensors"):
        layers = read_adapter(path, ReadOptions(base=base)).layers
        delta = layers["transformer.blocks.0.scale_shift_table"].delta.values
        torch.testing.assert_close(delta, new - own)
