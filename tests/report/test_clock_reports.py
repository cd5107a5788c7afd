"""What reports say of the clock, and of the steps of runs that they assume."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
from support.handmade import hand_entry, hand_fusion
from support.lora_files import peft_keys, random_pair, write_lora
from support.shipped import klora

from klora_compile import Settings, compile_fusion
from klora_compile.export.schedule import NOISE_NOTE, NOTE
from klora_compile.export.writing import export_phases
from klora_compile.report.few_steps import few_steps
from klora_compile.report.plot import plot_schedule
from klora_compile.report.schedule_map import text_map
from klora_compile.report.summary import summarise, summary_lines
from klora_compile.rules import Klora, Switch
from klora_compile.runs import Run
from klora_compile.settings.config import Config
from klora_runtime import load_fusion
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.errors import ConfigError

BLOCK = "unet.mid_block.attentions.0.transformer_blocks.0"
NAMES = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "attn2.to_k")
TEXT = "text_encoder.encoder.layers.0.self_attn.q_proj"


def switching(*switches: float | None) -> Fusion:
    """A layer of the denoiser for each of these moments, and one of a text encoder."""
    entries = [
        hand_entry(f"{BLOCK}.{name}", (6, 4), switch=switch)
        for name, switch in zip(NAMES, switches, strict=False)
    ]
    return hand_fusion(*entries, hand_entry(TEXT, (6, 4), switch=None), family="sd2")


def by_noise(fusion: Fusion) -> Fusion:
    return replace(fusion, clock="noise")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pair")
    names = [f"{BLOCK}.{name}" for name in NAMES]
    return [
        write_lora(
            folder / f"{seed}.safetensors",
            peft_keys({n: random_pair(32, 32, 2, seed=i + seed) for i, n in enumerate(names)}),
        )
        for seed in (0, 50)
    ]


# Few steps.


def test_few_steps_leave_few_schedules() -> None:
    """Of four steps at 1/8, 3/8, 5/8 and 7/8, three of these layers do the same."""
    fusion = switching(0.2, 0.3, 0.35, 0.6, None)
    (four, eight) = few_steps(fusion, [Run()])
    assert (four.steps, four.shift, four.layers) == (4, None, 5)
    assert (four.schedules, four.different) == (3, 3)
    assert (eight.schedules, eight.different) == (4, 4)
    assert four.text == (
        "at 4: 3 different schedules (which LoRAs act at each step) among 5 layers, 3 different "
        "steps"
    )


def test_few_steps_depend_on_the_shift_by_the_clock_of_the_noise() -> None:
    """At shift 5, three of four steps are before progress 0.3."""
    fusion = by_noise(switching(0.2, 0.3, 0.5, 0.65))
    found = {few.shift: few.schedules for few in few_steps(fusion, [Run(1.0), Run(5.0)])[:2]}
    assert found == {1.0: 3, 5.0: 2}


@pytest.mark.parametrize("fusion", [switching(), switching(None, None)])
def test_a_fusion_that_never_switches_has_no_steps(fusion: Fusion) -> None:
    assert few_steps(fusion, [Run()]) == ()


def test_one_is_one() -> None:
    (_, eight) = few_steps(switching(0.01), [Run()])
    assert eight.text == (
        "at 8: 1 different schedule (which LoRAs act at each step) among 1 layer, 1 different step"
    )


# The summary and the map.


def test_the_summary_says_the_clock_and_what_it_assumes() -> None:
    steps, noise = switching(0.3), by_noise(switching(0.3))
    rows = summary_lines(summarise(steps))
    assert ("clock", "step") in rows
    assert not any("shift" in text for _, text in rows)
    rows = summary_lines(summarise(noise))
    assert ("clock", "noise; what is said of steps assumes a schedule of shift 1 and 3") in rows
    (first, *_) = [text for label, text in rows if label == "few steps"]
    assert first.startswith("at 4, shift 1: ")
    assert summarise(noise, 5.0).shifts == (5.0,)
    assert summarise(steps).shifts == ()


def test_near_ties_are_those_of_the_assumed_runs(pair: list[Path]) -> None:
    fusion = compile_fusion(*pair, device="cpu")
    place = 1 - (1 + 0.75) / 2  # the first of two steps at shift 3
    entry = next(entry for entry in fusion.entries if entry.timeline.switches)
    moved = replace(entry.timeline, starts=(0.0, place + 1e-7))
    fusion = replace(fusion, entries=(replace(entry, timeline=moved),))
    (tie,) = summarise(by_noise(fusion), 3.0).near_ties
    assert tie.why == "switches at 0.1250001, step 0 of 2, shift 3"
    assert [tie.why for tie in summarise(fusion).near_ties] == [
        "switches at 0.1250001, step 0 of 4"
    ]
    both = {tie.why for tie in summarise(by_noise(fusion)).near_ties}
    assert both == {
        "switches at 0.1250001, step 0 of 2, shift 3",
        "switches at 0.1250001, step 0 of 4, shift 1",
    }


def test_the_map_marks_the_steps_of_each_run() -> None:
    steps, noise = switching(0.5), by_noise(switching(0.5))
    plain = click.unstyle(text_map(steps, 40)).splitlines()
    lines = click.unstyle(text_map(noise, 40)).splitlines()
    assert "progress by noise" not in plain[1]
    assert "progress by noise" in lines[1]
    for line, shift in zip(lines[2:4], (1.0, 3.0), strict=True):
        name, _, marks = line.partition(f"shift {shift:g}")
        assert name == "8 steps, "
        assert marks.count("|") == len({int(40 * p) for p in Run(shift).progress(8)})
    named = click.unstyle(text_map(noise, 40, 5.0)).splitlines()
    assert [line[:16] for line in named if "8 steps" in line] == ["8 steps, shift 5"]
    at = len("unet.mid_block.attentions.0") + 2  # where progress begins
    assert named[2][at : at + 10] == "|| | |  | "


def test_the_plot_marks_the_steps_of_each_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []

    def keep(figure: Any, path: Path, **_: Any) -> None:
        drawn.append(figure.axes[0])
        Path(path).write_text("")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", keep)
    for fusion in (switching(0.5), by_noise(switching(0.5))):
        plot_schedule(fusion, tmp_path / "map.png", overwrite=True)
    plot_schedule(by_noise(switching(0.5)), tmp_path / "map.png", overwrite=True, shift=5.0)
    steps, noise, named = drawn
    assert (steps.get_xlabel(), list(steps.lines)) == ("progress of sampling", [])
    assert noise.get_xlabel() == (
        "progress of sampling by noise; lines: 8 steps, shift 1 dotted, shift 3 dashed"
    )
    places = [line.get_xdata()[0] for line in noise.lines]
    assert places == [*Run(1.0).progress(8), *Run(3.0).progress(8)]
    assert named.get_xlabel().endswith("8 steps, shift 5 dotted")


# The clock as a setting.


def test_the_clock_changes_neither_choice_nor_factor(pair: list[Path]) -> None:
    steps = compile_fusion(*pair, device="cpu")
    noise = compile_fusion(*pair, Klora(), Settings(clock="noise"), device="cpu")
    assert (steps.clock, noise.clock) == ("step", "noise")
    assert [e.timeline for e in steps.entries] == [e.timeline for e in noise.entries]
    assert "clock" not in steps.rule.parameters
    assert noise.rule.parameters["clock"] == "noise"


@pytest.mark.parametrize("settings", [{"clock": "sun"}, {"clock": None}])
def test_another_clock_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="clock: expected one of step, noise, found"):
        Settings(**settings)


def test_a_rule_that_counts_steps_is_refused_by_the_clock_of_the_noise() -> None:
    with pytest.raises(ConfigError) as error:
        Config(Switch(steps=8), Settings(clock="noise"))
    assert str(error.value) == (
        "clock: rule switch counts steps, which a clock that follows the noise does not. Take "
        "--clock step, or another rule."
    )
    Config(Klora(semantics="authors"), Settings(clock="noise"))  # its S is of progress


def test_the_commands(pair: list[Path], tmp_path: Path) -> None:
    """Compiled by the noise, compiled by the steps and then changed: the same bytes."""
    made, plain, again = (tmp_path / f"{name}.klora.safetensors" for name in "abc")
    assert klora("compile", *pair, "-o", made, "--clock", "noise").exit_code == 0
    assert klora("compile", *pair, "-o", plain).exit_code == 0
    result = klora("recompile", plain, "-o", again, "--clock", "noise", "--shift", "5", "--json")
    assert again.read_bytes() == made.read_bytes() != plain.read_bytes()
    printed = json.loads(result.stdout)
    assert (printed["clock"], printed["shifts"]) == ("noise", [5.0])
    assert {few["shift"] for few in printed["few_steps"]} == {5.0}
    shown = klora("inspect", made).output
    assert "shift 1 and 3" in shown
    assert "8 steps, shift 3" in shown
    kept = klora("recompile", made, "-o", plain, "--bias", "0.2", "--force")
    assert kept.exit_code == 0
    assert load_fusion(plain).clock == "noise"
    assert klora("verify", made, "--against", *pair).exit_code == 0
    told = klora("card", made, "-o", tmp_path / "README.md")
    assert told.exit_code == 0
    assert "| clock | noise |" in (tmp_path / "README.md").read_text()


def test_what_commands_refuse(pair: list[Path], tmp_path: Path) -> None:
    noise, steps, out = (tmp_path / f"{name}.klora.safetensors" for name in "abc")
    klora("compile", *pair, "-o", noise, "--clock", "noise")
    klora("compile", *pair, "-o", steps)
    for arguments, problem in (
        (("compile", *pair, "-o", out, "--shift", "3"), "under every shift"),
        (("compile", *pair, "-o", out, "--clock", "noise", "--shift", "0"), "from 0.01 to 1000"),
        (("recompile", steps, "-o", out, "--shift", "3"), "under every shift"),
        (("recompile", noise, "-o", out, "--rule", "switch", "--steps", "8"), "counts steps"),
        (("inspect", steps, "--shift", "3"), "under every shift"),
        (("inspect", pair[0], "--shift", "3"), "is not an artifact"),
        (("export", noise, "--static", "--shift", "3", "-o", tmp_path / "x"), "schedule.json"),
        (("export", steps, "--phases", "2", "--shift", "3", "-o", tmp_path / "x"), "every shift"),
    ):
        result = klora(*arguments)
        assert result.exit_code != 0
        assert problem in result.output, arguments
        assert not out.exists()
        assert not (tmp_path / "x").exists()


def test_a_verification_sees_another_clock(pair: list[Path], tmp_path: Path) -> None:
    from klora_compile import verify_fusion
    from klora_compile.sources import by_source

    fusion = by_noise(compile_fusion(*pair, device="cpu"))
    found = verify_fusion(fusion, by_source(pair[:1], pair[1:]), device="cpu")
    assert found == ["clock: stated noise, computed step"]


# schedule.json


def test_phases_by_noise_are_told_by_noise(tmp_path: Path) -> None:
    export_phases(by_noise(switching(0.5)), tmp_path / "out", 2)
    told = json.loads((tmp_path / "out" / "schedule.json").read_text())
    assert (told["note"], told["clock"]) == (NOISE_NOTE, "noise")
    first, second = told["phases"]
    assert (first["noise_level"], second["noise_level"]) == ([1.0, 0.5], [0.5, 0.0])
    shares = {each["shift"]: each["step_fraction"] for each in first["at_shift"]}
    assert shares == {1.0: [0.0, 0.5], 3.0: [0.0, 0.75]}  # 3 * 0.25 / (1 + 2 * 0.25) = 0.5
    assert "step_fraction" not in first
    export_phases(by_noise(switching(0.5)), tmp_path / "out", 2, shift=5.0, overwrite=True)
    told = json.loads((tmp_path / "out" / "schedule.json").read_text())
    assert [each["shift"] for each in told["phases"][0]["at_shift"]] == [5.0]


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_step_ranges_by_noise_follow_the_middle_of_each_step(shift: float, tmp_path: Path) -> None:
    export_phases(by_noise(switching(0.5)), tmp_path / "out", 4, shift=shift, steps=[9])
    told = json.loads((tmp_path / "out" / "schedule.json").read_text())["phases"]
    left = [1 - i / 9 for i in range(10)]
    levels = [shift * u / (1 + (shift - 1) * u) for u in left]
    middles = [(before + after) / 2 for before, after in pairwise(levels)]
    for phase in told:
        most, least = phase["noise_level"]
        steps = [i for i, level in enumerate(middles) if least < level <= most]
        found = phase["at_shift"][0]["ksampler_advanced"]
        expected = [{"steps": 9, "start_at_step": steps[0], "end_at_step": steps[-1] + 1}]
        assert found == (expected if steps else [])


def test_phases_by_steps_are_told_as_before(tmp_path: Path) -> None:
    export_phases(switching(0.5), tmp_path / "out", 2)
    told = json.loads((tmp_path / "out" / "schedule.json").read_text())
    assert (told["note"], "clock" in told) == (NOTE, False)
    assert told["phases"][0]["step_fraction"] == [0.0, 0.5]
