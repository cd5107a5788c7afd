"""``klora export --phases``: averages over parts of the sampling, and when each acts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.exports import (
    as_klora_reads,
    average,
    error,
    exportable_fusion,
    exportable_pipeline,
    lost_over_time,
)
from support.handmade import hand_entry, hand_fusion

from klora_compile.export.averaging import WHOLE, Loss, Window, mean_coefficients, phases
from klora_compile.export.schedule import KSAMPLER_NOTE
from klora_compile.export.settings import ExportSettings
from klora_compile.export.writing import export_phases, export_static
from klora_runtime.artifact.delta import Dense, Stored
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.artifact.timeline import Timeline
from klora_runtime.errors import ConfigError, KloraError

LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"


@pytest.fixture(scope="module")
def fusion(tmp_path_factory: pytest.TempPathFactory) -> Fusion:
    pipe = exportable_pipeline("sd1")
    return exportable_fusion("sd1", pipe, tmp_path_factory.mktemp("loras"))


def aligned(*switches: float) -> Fusion:
    """A layer for each of these moments, at which it switches."""
    entries = (
        hand_entry(f"{LAYER}.to_{name}", (6, 4), switch=switch, seed=seed)
        for seed, (name, switch) in enumerate(zip("qkv", switches, strict=False))
    )
    return hand_fusion(*entries, family="sd2")


def test_each_file_is_the_average_over_its_phase(fusion: Fusion, tmp_path: Path) -> None:
    for lora in export_phases(fusion, tmp_path / "three", 3, ExportSettings(gain=1.25)).loras:
        found = as_klora_reads(tmp_path / "three" / lora.file)
        start, stop = lora.window.start, lora.window.stop
        for entry in (entry for entry in fusion.entries if entry.acts):
            expected = average(entry, start, stop, gain=1.25)
            assert error(found[entry.layer], expected) < 1e-6, entry.layer


@pytest.mark.parametrize("count", [2, 3, 7, 10])
def test_the_mean_over_all_phases_is_the_static_average(fusion: Fusion, count: int) -> None:
    windows = phases(count)
    assert (windows[0].start, windows[-1].stop) == (0.0, 1.0)
    for entry in fusion.entries:
        whole = mean_coefficients(entry.timeline, WHOLE)
        parts = [mean_coefficients(entry.timeline, window) for window in windows]
        for slot in ("content", "style"):
            mean = sum(
                part[slot] * window.length for part, window in zip(parts, windows, strict=True)
            )
            assert mean == pytest.approx(whole[slot], abs=1e-15)


def test_files_of_phases_have_the_static_files_as_their_mean(
    fusion: Fusion, tmp_path: Path
) -> None:
    export_static(fusion, tmp_path / "static.safetensors")
    loras = export_phases(fusion, tmp_path / "four", 4).loras
    parts = [as_klora_reads(tmp_path / "four" / lora.file) for lora in loras]
    for layer, whole in as_klora_reads(tmp_path / "static.safetensors").items():
        assert error(torch.stack([part[layer] for part in parts]).mean(0), whole) < 1e-6, layer


@pytest.mark.parametrize("count", [4, 8])
def test_phases_between_all_breakpoints_lose_nothing(count: int, tmp_path: Path) -> None:
    phases = export_phases(aligned(0.25, 0.5, 0.75), tmp_path / "out", count)
    for lost in (phases.schedule, *(lora.schedule for lora in phases.loras)):
        assert lost == Loss(0.0, 0.0, None)


def test_the_loss_of_each_phase_is_that_over_its_progress(fusion: Fusion, tmp_path: Path) -> None:
    phases = export_phases(fusion, tmp_path / "out", 3, ExportSettings(keys="peft", rank=2))
    for lora in phases.loras:
        total, worst, layer = lost_over_time(fusion, lora.window.start, lora.window.stop)
        assert lora.schedule.total == pytest.approx(total, rel=1e-6, abs=1e-9)
        assert lora.schedule.worst == pytest.approx(worst, rel=1e-6, abs=1e-9)
        assert lora.schedule.layer == layer
        assert lora.truncation is not None
    lost = [lora.schedule.total for lora in phases.loras]
    assert max(lost) > 0.05
    assert min(lost) < phases.schedule.total < max(lost)


def test_the_loss_of_all_phases_together(tmp_path: Path) -> None:
    """Of two layers of equal deltas, one switches in the middle of the first half."""
    fusion = aligned(0.25, 0.5)
    one, other = fusion.entries
    ones = Dense(torch.ones(6, 4))
    unit = {"content": Stored(1.0, ones), "style": Stored(-1.0, ones)}
    fusion = replace(fusion, entries=tuple(replace(e, factors=unit) for e in (one, other)))
    phases = export_phases(fusion, tmp_path / "out", 2)
    assert phases.schedule.total == pytest.approx(0.5)
    assert phases.schedule.worst == pytest.approx(0.5**0.5)
    assert phases.loras[0].schedule.total == pytest.approx(0.5**0.5)
    assert phases.loras[1].schedule.total == 0.0


def test_a_slot_that_does_not_act_in_a_phase_takes_no_rank(tmp_path: Path) -> None:
    halves = export_phases(aligned(0.5, 0.5), tmp_path / "out", 2)
    assert [lora.rank for lora in halves.loras] == [2, 2]
    assert export_static(aligned(0.5, 0.5), tmp_path / "out.safetensors").rank == 4


def test_one_segment_keeps_its_coefficients_to_the_bit() -> None:
    """Although 0.7 * 0.4 / 0.7 is not 0.4."""
    timeline = Timeline((0.0, 0.3), {"content": (0.1, 0.4), "style": (0.2, 0.8)})
    assert mean_coefficients(timeline, Window(0.3, 1.0)) == {"content": 0.4, "style": 0.8}
    assert mean_coefficients(timeline, Window(0.0, 0.3)) == {"content": 0.1, "style": 0.2}


def test_the_schedule_says_when_each_file_acts(tmp_path: Path) -> None:
    loras = export_phases(aligned(0.25), tmp_path / "out", 2, steps=[5, 1]).loras
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == ["phase-1-of-2.safetensors", "phase-2-of-2.safetensors", "schedule.json"]
    schedule = json.loads((tmp_path / "out" / "schedule.json").read_text())
    assert schedule.pop("note_on_ksampler_advanced") == KSAMPLER_NOTE
    assert schedule.pop("note_on_percent") == (
        "start_percent and end_percent are compared with the noise before a step. Under "
        "sgm_uniform, with models of flow matching, each phase begins one step late. "
        "Under beta and karras a fifth of the steps or more get the LoRA of another phase."
    )
    assert schedule == {
        "note": "step_fraction is exact for every sampler: of N steps, a LoRA acts in step i (from "
        "0) where from <= (i + 1/2) / N < to. timestep_percent, the start_percent and end_percent "
        "of ComfyUI, counts timesteps and not steps: it is equal to the step fraction, to within a "
        "step, only where the sampler's timesteps are spaced linearly over its steps (schedulers "
        "normal, simple and ddim_uniform).",
        "phases": [
            {
                "file": "phase-1-of-2.safetensors",
                "step_fraction": [0.0, 0.5],
                "timestep_percent": [0.0, 0.5],
                "ksampler_advanced": [{"steps": 5, "start_at_step": 0, "end_at_step": 2}],
                "error": float(f"{loras[0].schedule.total:.6g}"),
            },
            {
                "file": "phase-2-of-2.safetensors",
                "step_fraction": [0.5, 1.0],
                "timestep_percent": [0.5, 1.0],
                "ksampler_advanced": [
                    {"steps": 1, "start_at_step": 0, "end_at_step": 1},
                    {"steps": 5, "start_at_step": 2, "end_at_step": 5},
                ],
                "error": 0.0,
            },
        ],
    }


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_step_ranges_are_those_that_the_runtime_would_play(count: int, tmp_path: Path) -> None:
    """Each step is in the range of one phase, by the literal formula of the note."""
    export_phases(aligned(0.25, 0.5, 0.75), tmp_path / "out", count, steps=range(1, 60))
    told = json.loads((tmp_path / "out" / "schedule.json").read_text())["phases"]
    for steps in range(1, 60):
        covered = []
        for phase in told:
            start, end = (math.ceil(steps * edge - 0.5) for edge in phase["step_fraction"])
            (one,) = [e for e in phase["ksampler_advanced"] if e["steps"] == steps] or [None]
            if one is None:
                assert start == end
                continue
            assert (one["start_at_step"], one["end_at_step"]) == (start, end)
            covered += range(start, end)
        assert covered == list(range(steps))


@pytest.mark.parametrize("steps", [0, 10_001, 2.0, True])
def test_a_number_of_steps_out_of_range(steps: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="steps: expected whole numbers from 1 to 10000"):
        export_phases(aligned(0.5), tmp_path / "out", 2, steps=[steps])
    assert list(tmp_path.iterdir()) == []


def test_a_phase_in_which_nothing_acts_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    timeline = Timeline((0.0, 0.5), {"content": (1.0, 0.0), "style": (0.0, 0.0)})
    early = replace(hand_entry(f"{LAYER}.to_q", (6, 4)), timeline=timeline)
    with pytest.raises(KloraError) as refusal:
        export_phases(hand_fusion(early, family="sd2"), tmp_path / "out", 2)
    assert str(refusal.value) == (
        "no layer acts between progress 0.5 and 1, so there is no LoRA to write. Use fewer phases."
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [1, 101, 2.0, True])
def test_a_count_out_of_range(count: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        export_phases(aligned(0.5), tmp_path / "out", count)
    assert str(refusal.value) == f"phases: expected a whole number from 2 to 100, found {count!r}."


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_an_old_export_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_phases(aligned(0.5), out, 3)
    with pytest.raises(KloraError, match="exists already; add --force"):
        export_phases(aligned(0.5), out, 2)
    export_phases(aligned(0.5), out, 2, overwrite=True)
    assert set(contents(out)) == {
        "phase-1-of-2.safetensors",
        "phase-2-of-2.safetensors",
        "schedule.json",
    }
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_a_folder_with_anything_else_in_it_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_phases(aligned(0.5), out, 2)
    (out / "holiday.jpg").write_bytes(b"1")
    (out / "phase-1-of-9.safetensors").mkdir()
    before = contents(out)
    with pytest.raises(KloraError) as refusal:
        export_phases(aligned(0.5), out, 2, overwrite=True)
    assert str(refusal.value) == (
        f"{out} holds files that klora did not write; name another folder."
        "\n  - holiday.jpg\n  - phase-1-of-9.safetensors"
    )
    assert contents(out) == before


@pytest.mark.parametrize("fails", ["write_tensors", "rename"])
def test_a_failed_export_leaves_the_old_one_as_it_was(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export_phases(aligned(0.5), out, 3)
    before = contents(out)
    rename = Path.rename

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def rename_to(source: Path, target: Path) -> Path:
        if target == out and len(contents(source)) == 3:
            full()
        return rename(source, target)

    if fails == "rename":
        monkeypatch.setattr(Path, "rename", rename_to)
    else:
        monkeypatch.setattr(f"klora_compile.export.writing.{fails}", full)
    with pytest.raises(KloraError) as refusal:
        export_phases(aligned(0.5), out, 2, overwrite=True)
    assert str(refusal.value) == f"{out} cannot be written: No space left on device."
    assert contents(out) == before
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_a_failed_static_export_leaves_the_old_one_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.safetensors"
    export_static(aligned(0.5), path)
    before = path.read_bytes()

    def half(temporary: Path, *_: object) -> None:
        temporary.write_bytes(b"1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("klora_compile.export.writing.write_tensors", half)
    with pytest.raises(KloraError, match="cannot be written: No space left on device"):
        export_static(aligned(0.25), path, overwrite=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
