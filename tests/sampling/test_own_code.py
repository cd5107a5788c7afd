"""Models that bring Python files, in a folder and on the Hub; and the repository's own model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from drawings.shipped import BASE, style_lora, subject_lora
from PIL import ImageOps
from support.hub import Hub
from support.shipped import Shipped, error_of, klora, pixels, sampled

from klora_compile import compile_fusion
from klora_runtime import save_fusion

#: Stable Diffusion whose pictures are negatives.
CODE = """
from pathlib import Path

from diffusers import StableDiffusionPipeline
from PIL import ImageOps


class OwnPipeline(StableDiffusionPipeline):
    def __call__(self, prompt, num_inference_steps=4, generator=None):
        steps = {"num_inference_steps": num_inference_steps}
        found = super().__call__(prompt, generator=generator, **steps)
        found.images = [ImageOps.invert(image) for image in found.images]
        return found
"""

pytestmark = pytest.mark.usefixtures("modules_cache")


@pytest.fixture
def own(shipped: Shipped, tmp_path: Path) -> Path:
    """A model with a pipeline of its own."""
    model = tmp_path / "own"
    shutil.copytree(shipped.model, model)
    (model / "pipeline.py").write_text(CODE)
    rename(model, "OwnPipeline")
    return model


def rename(model: Path, pipeline: object) -> None:
    """Let the index of a model name this pipeline."""
    index = model / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": pipeline}))


def marking(place: Path) -> str:
    """The same code, which also leaves a file when it is loaded."""
    return f"{CODE}\n\nPath({str(place)!r}).touch()\n"


def test_a_pipeline_of_its_own_draws(own: Path, shipped: Shipped, tmp_path: Path) -> None:
    output = tmp_path / "x.png"
    result = sampled(shipped, output, "--trust-remote-code", model=own)
    assert result.exit_code == 0, result.output
    assert pixels(output) == pixels(ImageOps.invert(shipped.picture()))


def test_its_code_does_not_run_unless_it_is_trusted(
    own: Path, shipped: Shipped, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    (own / "pipeline.py").write_text(marking(ran))
    error = error_of(sampled(shipped, tmp_path / "x.png", model=own), 1)
    assert error == (
        f"{own} brings Python code of its own, which would run on this machine. Read it, and add "
        f"--trust-remote-code if you trust it.\n  - {own / 'pipeline.py'}"
    )
    assert not ran.exists()


@pytest.mark.parametrize("part", [None, "unet"])
def test_code_that_the_index_names(
    part: str | None, own: Path, shipped: Shipped, tmp_path: Path
) -> None:
    """The pipeline's, or that of a part, as diffusers writes it."""
    ran = tmp_path / "ran"
    (own / "pipeline.py").unlink()
    code = own / (part or "") / "mine.py"
    code.write_text(marking(ran))
    if part is None:
        rename(own, ["mine", "OwnPipeline"])
    else:
        rename(own, "StableDiffusionPipeline")
        index = json.loads((own / "model_index.json").read_text())
        (own / "model_index.json").write_text(json.dumps(index | {part: ["mine", "Unet"]}))
    error = error_of(sampled(shipped, tmp_path / "x.png", model=own), 1)
    assert "brings Python code of its own, which would run on this machine." in error
    assert str(code) in error
    assert not ran.exists()
    if part is None:
        result = sampled(shipped, tmp_path / "x.png", "--trust-remote-code", model=own)
        assert result.exit_code == 0, result.output
        assert ran.exists()


def test_a_pipeline_that_nobody_has(own: Path, shipped: Shipped, tmp_path: Path) -> None:
    (own / "pipeline.py").unlink()
    result = sampled(shipped, tmp_path / "x.png", "--trust-remote-code", model=own)
    error = error_of(result, 1)
    assert error.startswith("the model is for OwnPipeline, which diffusers ")
    assert f"and there is no {own / 'pipeline.py'}. Update diffusers" in error


@pytest.mark.parametrize("named", ["OwnPipeline", ["pipeline", "OwnPipeline"]])
def test_a_pipeline_of_its_own_on_the_hub(
    named: object, hub: Hub, own: Path, shipped: Shipped, tmp_path: Path
) -> None:
    ran, output = tmp_path / "ran", tmp_path / "x.png"
    (own / "pipeline.py").write_text(marking(ran))
    rename(own, named)
    hub.add(
        "me/own",
        {
            path.relative_to(own).as_posix(): path.read_bytes()
            for path in own.rglob("*")
            if path.is_file()
        },
    )
    error = error_of(sampled(shipped, output, model="me/own"), 1)
    assert error.startswith("hf://me/own brings Python code of its own (pipeline.py), which")
    assert not ran.exists()
    assert not any("diffusion_pytorch_model" in request for request in hub.requests)
    result = sampled(shipped, output, "--trust-remote-code", "--json", model="me/own")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["model"].startswith("hf://me/own@")
    assert pixels(output) == pixels(ImageOps.invert(shipped.picture()))


def test_a_pipeline_without_its_file_on_the_hub(
    hub: Hub, own: Path, shipped: Shipped, tmp_path: Path
) -> None:
    hub.add("me/own", {"model_index.json": (own / "model_index.json").read_bytes()})
    result = sampled(shipped, tmp_path / "x.png", "--trust-remote-code", model="me/own")
    error = error_of(result, 2)
    assert "me/own has no file pipeline.py; found model_index.json" in error


def test_the_model_of_drawings_needs_no_trust(tmp_path: Path) -> None:
    path = tmp_path / "penguin.klora.safetensors"
    loras = subject_lora("penguin"), style_lora("ink")
    save_fusion(compile_fusion(*loras, device="cpu"), path)
    words = ("sample", path, "--model", BASE, "--prompt", "a penguin, ink style", "--steps", 2)
    result = klora(*words, "--device", "cpu", "-o", tmp_path / "x.png")
    assert result.exit_code == 0, result.output


def test_an_ordinary_model_needs_no_trust(shipped: Shipped, tmp_path: Path) -> None:
    assert sampled(shipped, tmp_path / "x.png").exit_code == 0
