"""What someone has who samples, an artifact and a model; and what ``klora sample`` makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner, Result
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_pipeline import tiny_lora, tiny_pipeline

from klora_compile import compile_fusion
from klora_compile.cli import main
from klora_runtime import apply_fusion, save_fusion

PROMPT = "a fox in ink"


@dataclass(frozen=True)
class Shipped:
    """An artifact and a diffusers folder."""

    artifact: Path
    model: Path

    @classmethod
    def into(cls, folder: Path) -> Shipped:
        """Write both."""
        pipe = tiny_pipeline("sd1")
        pipe.save_pretrained(folder / "model")
        files = [
            tiny_lora(pipe, folder / f"{name}.safetensors", seed=seed, strength=3.0)
            for seed, name in enumerate(("fox", "ink"), start=1)
        ]
        artifact = folder / "fox-in-ink.klora.safetensors"
        save_fusion(compile_fusion(*files, device="cpu"), artifact)
        return cls(artifact, folder / "model")

    @property
    def pair(self) -> tuple[Path, Path]:
        """The files of the artifact's LoRAs."""
        return self.artifact.with_name("fox.safetensors"), self.artifact.with_name(
            "ink.safetensors"
        )

    def picture(self, prompt: str = PROMPT, seed: int = 0, **options: Any) -> Image.Image:
        """What the Python API gives."""
        pipe = DiffusionPipeline.from_pretrained(self.model)
        if (scheduler := options.pop("scheduler", None)) is not None:
            pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        with apply_fusion(pipe, self.artifact, weights=options.pop("weights", None)):
            generator = torch.Generator().manual_seed(seed)
            settings = {"num_inference_steps": 2} | options
            return pipe(prompt, generator=generator, **settings).images[0]


def klora(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def sampled(shipped: Shipped, output: Path, *options: object, model: object = None) -> Result:
    """``klora sample`` with one prompt and two steps; options come after and go before."""
    model = model or shipped.model
    fixed = ("--model", model, "--prompt", PROMPT, "--steps", 2, "--device", "cpu", "-o", output)
    return klora("sample", shipped.artifact, *fixed, *options)


def error_of(result: Result, status: int) -> str:
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    return result.stderr.partition("Error: ")[2].rstrip("\n")


def pixels(picture: Path | Image.Image) -> tuple[tuple[int, int], bytes]:
    image = Image.open(picture) if isinstance(picture, Path) else picture
    return image.size, image.convert("RGB").tobytes()
