"""``klora export`` as a command: what it prints, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.golden_fusion import golden_fusion
from support.handmade import hand_entry, hand_fusion
from support.lora_files import run_python
from support.shipped import error_of, klora

from klora_compile.export.settings import ExportSettings
from klora_runtime import save_fusion
from klora_runtime.errors import ConfigError

EXISTS = "exists already; add --force (overwrite=True in Python) to replace it."
BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    entries = (
        hand_entry(f"{BLOCK}.{name}", (6, 4), seed=seed, switch=switch)
        for seed, (name, switch) in enumerate({"attn1.to_q": 0.25, "ff.net.2": None}.items())
    )
    layers = hand_fusion(*entries).entries
    path = tmp_path / "fox.klora.safetensors"
    save_fusion(replace(golden_fusion(), family="sd1", entries=layers), path)
    return path


def rows(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_one_lora(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "fox.safetensors"
    result = klora("export", artifact, "--static", "-o", out, "--rank", 3)
    assert result.exit_code == 0, result.output
    layer = f"{BLOCK}.attn1.to_q"
    flat = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    facts = json.loads(
        klora("export", artifact, "--static", "-o", out, "--rank", 3, "--force", "--json").stdout
    )
    schedule, truncation = facts["schedule_error"], facts["truncation_error"]
    assert schedule["layer"] == layer
    assert truncation["layer"] == flat
    assert rows(result.stdout) == [
        f"LoRA {out}",
        "layers 2, rank 3, float32",
        f"schedule the average differs from the schedule by {schedule['total']:.2%} (most, "
        f"{schedule['worst']:.2%}, in {layer})",
        f"rank the cut loses {truncation['total']:.2%} (most, {truncation['worst']:.2%}, in "
        f"{flat})",
        "keys kohya's, for ComfyUI; for Forge and A1111 where they know the base model",
        f"bytes {out.stat().st_size / 1000:.1f} kB",
    ]
    assert facts["output"] == str(out)
    assert facts["bytes"] == out.stat().st_size
    assert facts["progress"] == [0.0, 1.0]


def test_phases(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "fox"
    result = klora("export", artifact, "--phases", 2, "-o", out, "--keys", "peft", "--rank", 4)
    assert result.exit_code == 0, result.output
    again = klora("export", artifact, "--phases", 2, "-o", out, "--force", "--json")
    facts = json.loads(again.stdout)
    first = facts["phases"][0]
    lost = first["schedule_error"]
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert size == sum(each["bytes"] for each in facts["phases"])
    together = facts["schedule_error"]
    assert rows(result.stdout)[:5] == [
        f"LoRAs {out}",
        "layers 2, rank 4, float32, in phase-1-of-2.safetensors",
        f"schedule the averages differ from the schedule by {together['total']:.2%} (most, "
        f"{together['worst']:.2%}, in {BLOCK}.attn1.to_q)",
        f"progress 0 to 0.5: differs by {lost['total']:.2%} (most, {lost['worst']:.2%}, in "
        f"{BLOCK}.attn1.to_q); cut off: 0.00%",
        "0.5 to 1: differs by 0.00%; cut off: 0.00%",
    ]
    assert rows(result.stdout)[5:7] == [
        "keys PEFT's, for diffusers alone; ComfyUI, Forge and A1111 leave out many layers or all",
        "when schedule.json: in ComfyUI take its ksampler_advanced; start_percent is a step late "
        "under sgm_uniform on flow models, and wrong under beta and karras",
    ]


def test_steps_are_of_the_schedule(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "fox"
    words = ("export", artifact, "--phases", 2, "-o", out)
    assert klora(*words, "--steps", 6, "--steps", 12).exit_code == 0
    told = json.loads((out / "schedule.json").read_text())["phases"][1]["ksampler_advanced"]
    assert told == [
        {"steps": 6, "start_at_step": 3, "end_at_step": 6},
        {"steps": 12, "start_at_step": 6, "end_at_step": 12},
    ]
    words = ("export", artifact, "--static", "-o", out, "--steps", 6)
    assert "--steps is for schedule.json" in error_of(klora(*words), 2)


def test_refusals_before_any_work(artifact: Path, tmp_path: Path) -> None:
    out, folder = tmp_path / "out.safetensors", tmp_path / "folder"
    out.write_bytes(b"old")
    folder.mkdir()
    static, phases = ("export", artifact, "--static"), ("export", artifact, "--phases", 2)
    missing = tmp_path / "nowhere"
    for arguments, status, message in (
        (
            (*static, "-o", out),
            1,
            f"{out} {EXISTS}",
        ),
        (
            (*phases, "-o", folder),
            1,
            f"{folder} {EXISTS}",
        ),
        (("export", artifact, "-o", out), 2, "name one of --static and --phases N."),
        ((*static, "--phases", 2, "-o", out), 2, "name one of --static and --phases N."),
        (
            (*static, "-o", artifact, "--force"),
            2,
            f"{artifact} is one of the inputs; name another file.",
        ),
        (
            (*phases, "-o", tmp_path, "--force"),
            2,
            f"{tmp_path} is the folder of the input; name another.",
        ),
        ((*static, "-o", folder), 2, f"{folder} is not a regular file; name another."),
        ((*phases, "-o", out), 2, f"{out} is not a folder; name another."),
        ((*static, "-o", missing / "a"), 2, f"{missing} is not a folder; make it first."),
        ((*phases, "-o", missing / "a"), 2, f"{missing} is not a folder; make it first."),
        (
            (*static, "-o", out, "--force", "--gain", 0),
            2,
            "gain: expected a number other than 0, at most 10000 either way, found 0.0.",
        ),
    ):
        assert error_of(klora(*arguments), status) == message
    assert out.read_bytes() == b"old"
    assert list(folder.iterdir()) == []
    (folder / "holiday.jpg").write_bytes(b"1")
    assert error_of(klora(*phases, "-o", folder, "--force"), 1) == (
        f"{folder} holds files that klora did not write; name another folder.\n  - holiday.jpg"
    )
    long = tmp_path / ("n" * 256)
    for arguments in (static, phases):
        assert error_of(klora(*arguments, "-o", long), 1).endswith(
            "cannot be written: its name takes 256 bytes, more than the 255 allowed. Name a "
            "shorter one."
        )


def test_an_artifact_that_is_damaged_or_none_is_refused(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    assert klora("export", artifact, "--static", "-o", out).exit_code == 0
    lora = error_of(klora("export", out, "--static", "-o", tmp_path / "again"), 1)
    assert "out.safetensors is not a klora artifact" in lora
    whole = artifact.read_bytes()
    artifact.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    damaged = error_of(klora("export", artifact, "--static", "-o", out, "--force"), 1)
    assert "1 of 6 tensors are damaged" in damaged


def test_a_family_without_kohyas_names(artifact: Path, tmp_path: Path) -> None:
    fusion = replace(golden_fusion(), entries=golden_fusion().entries[1:])
    save_fusion(fusion, artifact, overwrite=True)
    message = error_of(klora("export", artifact, "--static", "-o", tmp_path / "out"), 1)
    assert message.startswith("the layers do not say which base model this artifact is for")
    result = klora("export", artifact, "--static", "-o", tmp_path / "out", "--keys", "peft")
    assert result.exit_code == 0, result.output


def test_the_help_says_that_fractions_of_steps_and_timesteps_differ() -> None:
    text = " ".join(klora("export", "--help").stdout.split())
    assert "The last two are equal only if the sampler's timesteps are spaced linearly." in text


def test_the_help_imports_no_torch() -> None:
    result = run_python(
        "import sys\nfrom click.testing import CliRunner\nfrom klora_compile.cli import main\n"
        "assert CliRunner().invoke(main, ['export', '--help']).exit_code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keys": "comfy"}, "keys: expected kohya or peft, found 'comfy'."),
        (
            {"dtype": "float64"},
            "dtype: expected one of float16, bfloat16, float32, found 'float64'.",
        ),
        ({"rank": 0}, "rank: expected a whole number from 1 to 4096, found 0."),
        (
            {"gain": float("nan")},
            "gain: expected a number other than 0, at most 10000 either way, found nan.",
        ),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        ExportSettings(**settings)  # type: ignore[arg-type]
    assert str(refusal.value) == message
