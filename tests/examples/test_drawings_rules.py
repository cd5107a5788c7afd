"""The rules of the table: each acts on a base of drawings, and leaves nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from drawings.table.pictures import folder_of
from drawings.table.rules import RULES, alike, nothing
from support.tiny_drawings import tiny_drawings
from tiny_pipeline import tiny_lora

LAYERS = ("to_q", "to_v", "ff.net.0.proj", "conv1")


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return tiny_drawings()


@pytest.fixture(scope="module")
def loras(pipe: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("loras")
    return [
        tiny_lora(pipe, folder / f"{seed}.safetensors", seed=seed, modules=LAYERS)
        for seed in (1, 2)
    ]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn(pipe: StableDiffusionPipeline) -> Any:
    generator = torch.Generator().manual_seed(0)
    found = pipe("a fox", num_inference_steps=2, generator=generator, output_type="latent")
    return found.images


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if index % 4 == 0 else pytest.mark.slow)
        for index, name in enumerate(RULES)
    ],
)
def test_a_rule_acts_and_leaves_nothing(
    name: str, pipe: StableDiffusionPipeline, loras: list[Path]
) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    bare = drawn(pipe)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    with RULES[name](pipe, *loras):
        moved = (drawn(pipe) - bare).abs().max()
    assert (moved > 1e-2) == (RULES[name] is not nothing)
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.allclose(drawn(pipe), bare, atol=1e-4)


def test_rules_have_folders_of_their_own() -> None:
    folders = {folder_of(Path(), name) for name in RULES}
    assert len(folders) == len(RULES)
    assert folder_of(Path(), "K-LoRA s*") != folder_of(Path(), "K-LoRA s")


def test_all_layers_alike_switch_together(pipe: StableDiffusionPipeline, loras: list[Path]) -> None:
    with alike("style", 0.25)(pipe, *loras) as handle:
        entries: Any = handle.fusion.entries  # type: ignore[attr-defined]
    assert {entry.timeline.starts for entry in entries} == {(0.0, 0.25)}
    assert {str(entry.timeline.at(0.3)) for entry in entries} == {"{'content': 1.0, 'style': 0.0}"}
