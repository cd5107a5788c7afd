"""The command line: options, output for people and programs, exit statuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from tiny_pipeline import tiny_lora, tiny_pipeline

from klora_compile.cli import main
from klora_runtime import apply_fusion, load_fusion


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("loras")
    pipe = tiny_pipeline("sd2")
    content = tiny_lora(pipe, folder / "fox.safetensors", seed=1)
    return content, tiny_lora(pipe, folder / "ink.safetensors", seed=2, rank=2)


@pytest.fixture
def artifact(loras: tuple[Path, Path], tmp_path: Path) -> Path:
    output = tmp_path / "fused.klora.safetensors"
    assert klora("compile", *loras, "-o", output).exit_code == 0
    return output


def klora(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def compiled(loras: tuple[Path, Path], folder: Path, *options: object) -> dict[str, Any]:
    output = folder / "out.klora.safetensors"
    assert klora("compile", *loras, "-o", output, "--force", *options).exit_code == 0
    return json.loads(klora("inspect", output, "--json").stdout)


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from klora_compile.cli import main\n"
        "try:\n    main(['compile', '--help'])\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'safetensors', 'tqdm.std'} & set(sys.modules)\n"
        "print('heavy', sorted(heavy - {'tqdm.std'}))\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert "--semantics" in output
    assert "heavy []" in output


#: An option -> its name in diffusers.
OF_DIFFUSERS = {
    "--steps": "--num-inference-steps",
    "--guidance": "--guidance-scale",
    "--count": "--num-images-per-prompt",
    "--dtype": "--torch-dtype",
    "--model": "--pretrained-model-name-or-path",
}


def test_options_have_the_names_of_diffusers_too() -> None:
    context = click.Context(main)
    commands = [main.get_command(context, name) for name in main.list_commands(context)]
    met = set()
    for command in commands:
        assert command is not None
        for option in command.params:
            for own in OF_DIFFUSERS.keys() & set(option.opts):
                assert OF_DIFFUSERS[own] in option.opts, (command.name, own)
                met.add(own)
    assert met == OF_DIFFUSERS.keys()


def test_compile_prints_a_summary(loras: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "fused.klora.safetensors"
    result = klora("compile", *loras, "-o", output)
    fusion = load_fusion(output)
    switching = sum(entry.fate == "switching" for entry in fusion.entries)
    assert switching > 0
    for text in (f"{switching} switching", "near ties", "gamma", "content 4, style 2", "seconds"):
        assert text in result.stdout
    assert result.stderr == ""  # the bar is silent where stderr is no terminal


def test_compile_json(loras: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "fused.klora.safetensors"
    facts = json.loads(klora("compile", *loras, "-o", output, "--json").stdout)
    assert facts["bytes_out"] == output.stat().st_size
    assert facts["bytes_in"]["content"] == loras[0].stat().st_size
    assert sum(facts["fates"].values()) == len(load_fusion(output).entries)


def test_compile_refuses_to_overwrite(loras: tuple[Path, Path], artifact: Path) -> None:
    before = artifact.read_bytes()
    result = klora("compile", *loras, "-o", artifact, "--pattern", "s*")
    assert result.exit_code == 1
    assert "add --force" in result.stderr
    assert artifact.read_bytes() == before
    assert klora("compile", *loras, "-o", artifact, "--pattern", "s*", "--force").exit_code == 0
    assert artifact.read_bytes() != before


@pytest.mark.parametrize("kind", ["LoRA", "base model"])
def test_compile_refuses_to_write_over_a_file_of_an_input_folder(
    kind: str, loras: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    read = shutil.copy(loras[0], folder / "adapter_model.safetensors")
    before = read.read_bytes()
    link = tmp_path / "link.safetensors"
    link.symlink_to(read)
    inputs = (folder, loras[1]) if kind == "LoRA" else (*loras, "--base", folder)
    for output in (read, link):
        result = klora("compile", *inputs, "-o", output, "--force")
        assert result.exit_code == 2
        assert f"{output} is a file of the input {folder}; name another file." in result.stderr
    assert read.read_bytes() == before


def test_compile_refuses_to_write_over_an_input(loras: tuple[Path, Path]) -> None:
    before = loras[0].read_bytes()
    result = klora("compile", *loras, "-o", loras[0], "--force")
    assert result.exit_code == 2
    assert "is one of the inputs" in result.stderr
    assert loras[0].read_bytes() == before


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--pattern", "t"), "'t' is not one of"),
        (("--gamma", "big"), "'big' is not paper|code|NUMBER"),
        (("--gamma", "-1"), "gamma: expected a number from 1e-12"),
        (("--top-k", "0"), "'0' is out of range"),
        (("--top-k", "2.5"), "'2.5' is not auto|N"),
        (("--device", "TPU"), "'TPU' is not auto|cpu|cuda[:N]"),
        (("--device", "tpu"), "device tpu: not a device; expected auto, cpu, cuda[:N]"),
        (("--alpha", "0", "--pattern", "s*"), "alpha: expected a number from 0.001"),
        (("--content-weight", "nan"), "content_weight: expected a number"),
    ],
)
def test_wrong_usage_is_status_2(
    loras: tuple[Path, Path], tmp_path: Path, options: tuple[str, ...], text: str
) -> None:
    output = tmp_path / "out.klora.safetensors"
    result = klora("compile", *loras, "-o", output, *options)
    assert result.exit_code == 2
    assert text in result.stderr
    assert not output.exists()


def test_a_missing_gpu_is_one_error(loras: tuple[Path, Path], tmp_path: Path) -> None:
    result = klora("compile", *loras, "-o", tmp_path / "o", "--device", "cuda:99")
    assert result.exit_code == 2
    assert "CUDA devices" in result.stderr


def test_a_bad_lora_is_status_1(loras: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = load_file(loras[0])
    key = next(key for key in tensors if "lora_B" in key)
    del tensors[key]
    broken = tmp_path / "broken.safetensors"
    save_file(tensors, broken)
    result = klora("compile", broken, loras[1], "-o", tmp_path / "o.klora.safetensors")
    assert result.exit_code == 1
    assert "has no up" in result.stderr
    assert "Traceback" not in result.stderr


def test_settings_reach_the_artifact(loras: tuple[Path, Path], tmp_path: Path) -> None:
    options = "--semantics authors --pattern s* --alpha 1.2 --gamma 0.7 --top-k 3".split()
    options += "--content-weight 0.8 --style-weight 0.5 --text-encoder style".split()
    report = compiled(loras, tmp_path, *options)
    parameters = report["rule"]["parameters"]
    assert parameters["alpha"] == 1.2
    assert parameters["beta"] == pytest.approx(0.85 * 1.2)
    assert parameters["tie"] == "style"
    assert report["gamma"] == 0.7
    unet = [layer for layer in report["layers"] if layer["name"].startswith("unet.")]
    assert {layer["k"] for layer in unet} == {3}
    values = {(row["content"], row["style"]) for layer in unet for row in layer["timeline"]}
    assert values == {(0.8, 0.0), (0.0, 0.5)}
    text = [layer for layer in report["layers"] if layer["name"].startswith("text_encoder.")]
    assert {layer["timeline"][0]["content"] for layer in text} == {0.0}


def test_inspect_json_has_the_promised_fields(artifact: Path, loras: tuple[Path, Path]) -> None:
    report = json.loads(klora("inspect", artifact, "--json").stdout)
    assert report["kind"] == "fusion"
    assert report["format_version"] == 1
    assert report["rule"]["name"] == "klora"
    assert report["sources"]["content"]["file"] == loras[0].name
    assert report["sources"]["style"]["bytes"] == loras[1].stat().st_size
    fusion = load_fusion(artifact)
    assert report["gamma"] == fusion.rule.derived["gamma"]["unet"]
    assert [layer["name"] for layer in report["layers"]] == [e.layer for e in fusion.entries]
    layer = next(layer for layer in report["layers"] if layer["fate"] == "switching")
    ratio = layer["content_topk"] / (report["gamma"] * layer["style_topk"])
    assert layer["ratio"] == pytest.approx(ratio, rel=1e-15)
    assert layer["k"] == 8
    assert layer["content_l1"] > layer["content_topk"] > 0
    assert layer["timeline"][0] == {"from": 0.0, "content": 1.0, "style": 0.0}
    assert len(layer["timeline"]) == 2


def test_inspect_shows_a_map(artifact: Path) -> None:
    result = klora("inspect", artifact)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert any(line.startswith("unet.mid_block.attentions.0 ") for line in lines)
    assert "█" in result.stdout
    assert "░" in result.stdout


def test_inspect_plots(artifact: Path, tmp_path: Path) -> None:
    picture = tmp_path / "map.png"
    assert klora("inspect", artifact, "--plot", picture).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_says_how_to_get_it(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = klora("inspect", artifact, "--plot", tmp_path / "map.png")
    assert result.exit_code == 1
    assert "pip install ./runtime '.[plot,sample]'" in result.stderr


def test_inspect_keeps_control_characters_from_the_terminal(
    loras: tuple[Path, Path], tmp_path: Path
) -> None:
    tensors = load_file(loras[0])
    hostile = tmp_path / "fox.safetensors"
    save_file(tensors, hostile, metadata={"modelspec.trigger_phrase": "\x1b[31mred\nline"})
    output = tmp_path / "o.klora.safetensors"
    assert klora("compile", hostile, loras[1], "-o", output).exit_code == 0
    shown = klora("inspect", output).stdout
    assert "\\x1b[31mred\\nline" in shown
    assert "\x1b[31mred" not in shown


def test_verify_good(artifact: Path, loras: tuple[Path, Path]) -> None:
    result = klora("verify", artifact)
    assert (result.exit_code, result.stderr) == (0, "")
    result = klora("verify", artifact, "--against", *loras)
    assert result.exit_code == 0
    assert "equal to its sources" in result.stdout


def test_verify_damaged(artifact: Path) -> None:
    data = bytearray(artifact.read_bytes())
    data[-1] ^= 1
    artifact.write_bytes(data)
    result = klora("verify", artifact)
    assert result.exit_code == 1
    assert "its bytes do not match its digest" in result.stderr


def test_verify_against_other_sources(artifact: Path, loras: tuple[Path, Path]) -> None:
    result = klora("verify", artifact, "--against", *reversed(loras))
    assert result.exit_code == 1
    assert "sources.content: it was compiled from fox.safetensors" in result.stderr


def test_verify_usage() -> None:
    assert klora("verify").exit_code == 2
    assert klora("verify", "nowhere.klora.safetensors").exit_code == 2


# --- how LoRAs are read -----------------------------------------------------------------------


def altered(path: Path, folder: Path, **metadata: str) -> Path:
    """The LoRA with a key of no known use, and metadata."""
    tensors = load_file(path) | {"state_step\x1b[2J": torch.ones(1)}
    save_file(tensors, folder / path.name, metadata=metadata or None)
    return folder / path.name


def test_keys_are_counted_and_unknown_ones_left_out_on_demand(
    loras: tuple[Path, Path], tmp_path: Path
) -> None:
    content, style = loras
    strange = altered(style, tmp_path)
    output = tmp_path / "a.klora.safetensors"
    refused = klora("compile", content, strange, "-o", output)
    assert refused.exit_code == 1
    assert "keys cannot be used" in refused.stderr
    assert not output.exists()
    text = klora("compile", content, strange, "-o", output, "--ignore-unknown").output
    keys = len(load_file(style))
    assert f"{len(load_file(content))} of {len(load_file(content))} keys of CONTENT used" in text
    assert f"{keys} of {keys + 1} keys of STYLE used" in text
    assert "left out: state_step\\x1b[2J: its ending belongs to no known form of LoRA" in text
    assert "\x1b" not in text
    found = json.loads(klora("inspect", output, "--json").stdout)["sources"]["style"]
    why = "its ending belongs to no known form of LoRA"
    assert found["notes"]["unused"] == [{"key": "state_step\x1b[2J", "why": why}]
    assert "1 keys left out" in klora("inspect", output).output
    against = klora("verify", output, "--against", content, strange)
    assert (against.exit_code, against.stderr) == (0, "")


def test_reading_in_json(loras: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "a.klora.safetensors"
    found = json.loads(klora("compile", *loras, "-o", output, "--json").stdout)["reading"]
    keys = len(load_file(loras[0]))
    assert found["content"] == {
        "keys": keys,
        "used": keys,
        "unused": [],
        "forms": {"lora": {"lowrank": keys // 2}},
        "error": 0.0,
    }


def test_alphas_that_disagree(loras: tuple[Path, Path], tmp_path: Path) -> None:
    content, style = loras
    output = tmp_path / "a.klora.safetensors"
    config = json.dumps({"lora_alpha": 1})
    tensors = load_file(style)
    name = next(key for key in tensors if key.endswith("lora_A.weight"))
    tensors[name.replace("lora_A.weight", "alpha")] = torch.tensor(2.0)
    other = tmp_path / "other.safetensors"
    save_file(tensors, other, metadata={"lora_adapter_metadata": config})
    refused = klora("compile", content, other, "-o", output)
    assert refused.exit_code == 1
    assert "alpha is 2 by tensor and 1 by lora_adapter_metadata" in refused.stderr
    assert (
        klora("compile", content, other, "-o", output, "--alpha-conflict", "first").exit_code == 0
    )
    assert klora("verify", output, "--against", content, other).exit_code == 0


def test_dora_from_compile_to_verify(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd1")
    pipe.save_pretrained(tmp_path / "base")
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {
        f"{name}.lora_A.weight": torch.randn(2, 32),
        f"{name}.lora_B.weight": torch.randn(32, 2),
    }
    save_file(
        tensors | {f"{name}.dora_scale": torch.rand(32, 1) + 1}, tmp_path / "dora.safetensors"
    )
    save_file(tensors, tmp_path / "lora.safetensors")
    output = tmp_path / "a.klora.safetensors"
    files = (tmp_path / "dora.safetensors", tmp_path / "lora.safetensors")
    refused = klora("compile", *files, "-o", output)
    assert refused.exit_code == 1
    assert "Name the base model with --base PATH" in refused.stderr
    text = klora("compile", *files, "-o", output, "--base", tmp_path / "base").output
    assert "1 dora (1 dense); nothing is lost" in text
    shown = klora("inspect", output).output
    assert "forms dora" in shown
    assert "against the base base" in shown
    assert klora("verify", output, "--against", *files, "--base", tmp_path / "base").exit_code == 0
    with apply_fusion(pipe, output, mode="auto") as handle:
        assert handle.report().mode == "merge"
