"""Models that bring Python files, in a folder and on the Hub; and the repository's own models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from drawings.pipeline import load
from PIL import Image
from support.hub import Hub
from support.lora_files import ROOT
from support.shipped import Shipped, error_of, klora, pixels
from tiny_pipeline import tiny_lora

from klora_compile import compile_fusion
from klora_runtime import apply_fusion, save_fusion

DRAWINGS = ROOT / "examples" / "drawings"
WEIGHTS = DRAWINGS / "weights"
PROMPT = "a penguin, ink style"

pytestmark = pytest.mark.usefixtures("modules_cache")


@pytest.fixture(scope="module")
def penguin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fusion for the model of drawings."""
    path = tmp_path_factory.mktemp("fused") / "penguin.klora.safetensors"
    loras = (WEIGHTS / f"{name}.safetensors" for name in ("subject-penguin", "style-ink"))
    save_fusion(compile_fusion(*loras, device="cpu"), path)
    return path


def sample(artifact: Path, model: object, output: Path, *options: object) -> object:
    words = ("sample", artifact, "--model", model, "--prompt", PROMPT, "--steps", 2)
    return klora(*words, "--device", "cpu", "-o", output, *options)


def test_the_model_of_drawings_works_with_its_own_pipeline(penguin: Path, tmp_path: Path) -> None:
    output = tmp_path / "penguin.png"
    result = sample(penguin, WEIGHTS / "base", output, "--trust-remote-code")
    assert result.exit_code == 0, result.output
    pipe = load(WEIGHTS)
    with apply_fusion(pipe, penguin):
        generator = torch.Generator().manual_seed(0)
        expected = pipe(PROMPT, num_inference_steps=2, generator=generator).images[0]
    with Image.open(output) as found:
        assert found.convert("RGB").tobytes() == expected.tobytes()


def test_its_code_does_not_run_unless_it_is_trusted(penguin: Path, tmp_path: Path) -> None:
    model, ran = tmp_path / "base", tmp_path / "ran"
    shutil.copytree(WEIGHTS / "base", model)
    (model / "pipeline.py").write_text(marking(ran))
    error = error_of(sample(penguin, model, tmp_path / "x.png"), 1)
    assert error == (
        f"{model} brings Python code of its own, which would run on this machine. Read it, and add "
        f"--trust-remote-code if you trust it.\n  - {model / 'pipeline.py'}"
    )
    assert not ran.exists()


def marking(place: Path) -> str:
    """The pipeline of drawings, which also leaves a file when it is loaded."""
    code = (DRAWINGS / "pipeline.py").read_text()
    return f"{code}\nPath({str(place)!r}).touch()\n"


@pytest.mark.parametrize("part", [None, "unet"])
def test_code_that_the_index_names(part: str | None, penguin: Path, tmp_path: Path) -> None:
    """The pipeline's, or that of a part, as diffusers writes it."""
    model, ran = tmp_path / "base", tmp_path / "ran"
    shutil.copytree(WEIGHTS / "base", model)
    (model / "pipeline.py").rename(model / "mine.py")
    (model / "mine.py").unlink()
    code = model / (part or "") / "mine.py"
    code.write_text(marking(ran))
    index = json.loads((model / "model_index.json").read_text())
    if part is None:
        index["_class_name"] = ["mine", "DrawingPipeline"]
    else:
        index |= {"_class_name": "DiffusionPipeline", part: ["mine", "Unet"]}
    (model / "model_index.json").write_text(json.dumps(index))
    error = error_of(sample(penguin, model, tmp_path / "x.png"), 1)
    assert "brings Python code of its own, which would run on this machine." in error
    assert str(code) in error
    assert not ran.exists()
    if part is None:
        result = sample(penguin, model, tmp_path / "x.png", "--trust-remote-code")
        assert result.exit_code == 0, result.output
        assert ran.exists()


def test_a_pipeline_that_nobody_has(penguin: Path, tmp_path: Path) -> None:
    model = tmp_path / "base"
    shutil.copytree(WEIGHTS / "base", model)
    (model / "pipeline.py").unlink()
    error = error_of(sample(penguin, model, tmp_path / "x.png", "--trust-remote-code"), 1)
    assert error.startswith("the model is for DrawingPipeline, which diffusers ")
    assert f"and there is no {model / 'pipeline.py'}. Update diffusers" in error


@pytest.mark.parametrize("named", ["DrawingPipeline", ["pipeline", "DrawingPipeline"]])
def test_a_pipeline_of_its_own_on_the_hub(
    named: object, hub: Hub, penguin: Path, tmp_path: Path
) -> None:
    ran, folder = tmp_path / "ran", WEIGHTS / "base"
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    index = {**json.loads(files["model_index.json"]), "_class_name": named}
    files |= {
        "model_index.json": json.dumps(index).encode(),
        "pipeline.py": marking(ran).encode(),
    }
    hub.add("me/drawings", files)
    error = error_of(sample(penguin, "me/drawings", tmp_path / "x.png"), 1)
    assert error.startswith("hf://me/drawings brings Python code of its own (pipeline.py), which")
    assert not ran.exists()
    assert not any("diffusion_pytorch_model" in request for request in hub.requests)
    output = tmp_path / "there.png"
    result = sample(penguin, "me/drawings", output, "--trust-remote-code", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["model"].startswith("hf://me/drawings@")
    here = tmp_path / "here.png"
    assert sample(penguin, folder, here, "--trust-remote-code").exit_code == 0
    assert pixels(output) == pixels(here)


def test_a_pipeline_without_its_file_on_the_hub(hub: Hub, penguin: Path, tmp_path: Path) -> None:
    index = (WEIGHTS / "base" / "model_index.json").read_bytes()
    hub.add("me/drawings", {"model_index.json": index})
    error = error_of(sample(penguin, "me/drawings", tmp_path / "x.png", "--trust-remote-code"), 2)
    assert "me/drawings has no file pipeline.py; found model_index.json" in error


def test_the_next_model_of_drawings_needs_no_code(tmp_path: Path) -> None:
    model = DRAWINGS / "base" / "weights"
    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
    loras = [tiny_lora(pipe, tmp_path / f"{n}.safetensors", seed=n) for n in (1, 2)]
    path = tmp_path / "fused.klora.safetensors"
    save_fusion(compile_fusion(*loras, device="cpu"), path)
    result = sample(path, model, tmp_path / "x.png")
    assert result.exit_code == 0, result.output


def test_an_ordinary_model_needs_no_trust(shipped: Shipped, tmp_path: Path) -> None:
    assert sample(shipped.artifact, shipped.model, tmp_path / "x.png").exit_code == 0
