"""Exports of parameters that are no layer's weight or bias: tables of modulations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.exports import as_klora_reads, average, error
from support.handmade import hand_entry, hand_fusion
from support.lightx2v import LAYERS, TABLES, lightx2v

from klora_compile import compile_fusion, read_adapter
from klora_compile.export.settings import ExportSettings
from klora_compile.export.writing import export_phases, export_static
from klora_compile.rules import Klora
from klora_runtime.artifact.delta import Dense, Stored
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.artifact.timeline import Timeline
from klora_runtime.errors import KloraError

#: Keys of the tables, as ComfyUI calls its parameters.
KEYS = {f"diffusion_model.blocks.{i}.modulation.diff" for i in range(LAYERS)}
KEYS |= {"diffusion_model.head.modulation.diff"}


@pytest.fixture(scope="module")
def fusion(tmp_path_factory: pytest.TempPathFactory) -> Fusion:
    folder = tmp_path_factory.mktemp("loras")
    files = [lightx2v(folder / f"{seed}.safetensors", seed) for seed in (1, 2)]
    found = compile_fusion(*files, Klora(), device="cpu")
    assert any(each.timeline.switches for each in found.entries if "table" in each.parameter)
    return found


@pytest.mark.parametrize("rank", [None, 1])
def test_tables_come_back_as_klora_reads_them(
    fusion: Fusion, rank: int | None, tmp_path: Path
) -> None:
    """No rank makes factors of them, which nothing could read."""
    path = tmp_path / "out.safetensors"
    export_static(fusion, path, ExportSettings(keys="kohya", rank=rank))
    assert {key for key in load_file(path) if "modulation" in key} == KEYS
    survey, found = read_adapter(path).survey, as_klora_reads(path)
    assert survey.used == survey.keys
    assert found.keys() == {entry.layer for entry in fusion.entries}
    for entry in fusion.entries:
        if rank is None or entry.parameter != "weight":
            assert found[entry.layer].shape == entry.shape
            assert error(found[entry.layer], average(entry)) < 1e-6, entry.layer


def test_each_phase_has_the_tables_of_its_time(fusion: Fusion, tmp_path: Path) -> None:
    export_phases(fusion, tmp_path / "phases", 2, ExportSettings(keys="kohya"))
    for index, (start, stop) in enumerate(((0.0, 0.5), (0.5, 1.0)), start=1):
        found = as_klora_reads(tmp_path / "phases" / f"phase-{index}-of-2.safetensors")
        for entry in (each for each in fusion.entries if each.parameter == "scale_shift_table"):
            assert error(found[entry.layer], average(entry, start, stop)) < 1e-6, entry.layer


def test_peft_keys_have_no_place_for_them(fusion: Fusion, tmp_path: Path) -> None:
    with pytest.raises(KloraError) as caught:
        export_static(fusion, tmp_path / "out.safetensors", ExportSettings(keys="peft", rank=2))
    assert str(caught.value).startswith(
        f"{len(TABLES)} parameters are neither a layer's weight nor its bias, and ordinary LoRA "
        "files of this kind have no keys for them. Apply the artifact itself.\n"
    )
    assert "transformer.scale_shift_table" in caught.value.issues


def test_a_parameter_without_a_name_of_its_authors_is_refused(tmp_path: Path) -> None:
    table = Entry(
        component="transformer",
        module="blocks.0",
        parameter="new_table",
        shape=(1, 6, 24),
        fate="always content",
        timeline=Timeline.constant({"content": 1.0, "style": 0.0}),
        factors={"content": Stored(1.0, Dense(torch.ones(1, 6, 24)))},
        scores={},
    )
    layer = hand_entry("transformer.blocks.0.attn1.to_q", (24, 24))
    fusion = hand_fusion(table, layer, family="wan")
    with pytest.raises(KloraError, match="1 parameters are neither") as caught:
        export_static(fusion, tmp_path / "out.safetensors")
    assert caught.value.issues == ("transformer.blocks.0.new_table",)
